"""Whether a chunk may follow the one before it."""

from __future__ import annotations

from headforcing.errors import ChunkOrderError


def check_order(frames: range, pending: range | None, end: int, again: int | None, layer: int) -> None:
    """Looks at the frames of a chunk that is not the pending one again.

    Args:
        frames: of the chunk that begins.
        pending: of the chunk before it, where it is not committed yet.
        end: frames committed.
        again: the frame from which the host said that it runs the last ones again.
        layer: for the message.

    Raises:
        ChunkOrderError: a frame would be skipped or lost, or the chunk lies in the past.
    """
    if again is not None:
        if frames.start != again:
            raise ChunkOrderError(
                f"layer {layer}: a chunk starts at frame {frames.start}, expected {again}: a prompt switch "
                "with mode 'recache' said that the frames from there on come again"
            )
        return
    before = range(end - 1, end) if pending is None else pending
    if pending is not None and frames.start == before.start:
        raise ChunkOrderError(
            f"layer {layer}: the chunk at frame {frames.start} comes again with {len(frames)} frames, "
            f"expected {len(before)}: a chunk keeps its length"
        )
    if not before.start < frames.start <= before.stop:
        or_again = "" if pending is None else f" (or {before.start} again)"
        raise ChunkOrderError(
            f"layer {layer}: a chunk starts at frame {frames.start}, expected {before.stop}{or_again}: "
            "chunks come in order, a new video starts at frame 0"
        )
    if frames.stop < before.stop:
        raise ChunkOrderError(
            f"layer {layer}: a chunk ends before frame {frames.stop}, expected at least {before.stop}: "
            "it overlaps the chunk before it and would lose its last frames"
        )
