"""Checks before a store changes: does a chunk follow the one before, does it begin a video, is it finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headforcing.errors import ChunkOrderError, NonFiniteKVError, StreamShapeError
from headforcing.stores.bank import Bank
from headforcing.types import Chunk


@dataclass(frozen=True)
class Shape:
    """The shape of a chunk; all but the number of frames must not change inside one video."""

    frames: int
    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device

    @classmethod
    def of(cls, chunk: Chunk) -> Shape:
        """The shape of a chunk.

        Raises:
            StreamShapeError: its keys and values differ.
        """
        if chunk.v.shape != chunk.k.shape:
            raise StreamShapeError(
                f"keys are {tuple(chunk.k.shape)}, values {tuple(chunk.v.shape)}: expected the same"
            )
        batch, frames, *rest = chunk.k.shape
        return cls(frames, (batch, *rest), (chunk.k.dtype, chunk.v.dtype), chunk.k.device)

    def check_follows(self, before: Shape | None, layer: int) -> None:
        """Checks that both are alike but for the number of frames.

        Raises:
            StreamShapeError: they are not.
        """
        if before is not None and dataclasses.replace(before, frames=self.frames) != self:
            raise StreamShapeError(
                f"layer {layer}: keys of this video were {before}, now they are {self}: start a new video "
                "(frame 0) to change batch, resolution, dtype or device"
            )

    def __str__(self) -> str:
        batch, *rest = self.sizes
        return f"[{batch}, F, {', '.join(map(str, rest))}] {self.dtypes[0]} on {self.device}"


def rolls(chunk: Chunk, pending: range | None) -> bool:
    """Whether it is the pending chunk with another number of frames."""
    if not chunk.rolling or pending is None:
        return False
    return pending.start == chunk.start and pending.stop != chunk.frames.stop


def begins_video(chunk: Chunk, pending: range | None, before: Shape | None, again: int | None) -> bool:
    """Whether it begins at frame 0 and is not the pending chunk, of shape `before`, again.

    Nor does it if it rolls, or if a prompt switch announced that frames from `again` = 0 on are recomputed.
    """
    if chunk.start != 0 or again == 0 or (again is None and rolls(chunk, pending)):
        return False
    return pending is None or pending != chunk.frames or before != Shape.of(chunk)


def check_order(frames: range, pending: range | None, end: int, again: int | None, layer: int) -> None:
    """Checks the frames of a chunk that is not the pending one again.

    Args:
        frames: of the chunk that begins.
        pending: of the chunk before it, if it is not committed yet.
        end: frames committed.
        again: the first of the recomputed frames, if a prompt switch announced them.
        layer: for the message.

    Raises:
        ChunkOrderError: a frame would be skipped or lost, or the chunk lies in the past.
    """
    if again is not None:
        if frames.start != again:
            raise ChunkOrderError(
                f"layer {layer}: a chunk starts at frame {frames.start}, expected {again}: a prompt switch "
                "with mode 'recache' announced that the frames from there on are recomputed"
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


class FiniteCheck:
    """Largest magnitudes per head on their way to the CPU; one that is not finite reveals a broken head.

    Attributes:
        reported: whether the result was reported.
    """

    reported = False

    def __init__(self, largest: Tensor, heads: tuple[int, ...], layer: int, frames: range) -> None:
        waits = largest.device.type not in ("cpu", "meta")
        self._largest = largest.to("cpu", non_blocking=True) if waits else largest
        self._event: Any = None
        if waits:
            self._event = torch.Event(largest.device)
            self._event.record()
        self._heads, self._layer, self._frames = heads, layer, frames

    @classmethod
    def of(cls, banks: Iterable[Bank], queries: Tensor | None, layer: int, frames: range) -> FiniteCheck:
        """Of the pending chunk, `frames`: of keys and values as they are staged.

        `queries` are the largest magnitudes of queries, `[H]`.
        """
        found: list[Tensor] = []
        heads: tuple[int, ...] = ()
        for bank in banks:
            found += map(largest_of, bank.staged())
            heads += bank.heads.indices * 2
        if queries is not None:
            found.append(queries)
            heads += tuple(range(len(queries)))
        return cls(torch.cat(found), heads, layer, frames)

    @property
    def ready(self) -> bool:
        """Whether the result is there without waiting."""
        return self._event is None

    def broken(self) -> str | None:
        """Waits for the result: which heads hold NaN or infinity; `None`: none does."""
        if self._event is not None:
            self._event.synchronize()
        if self._largest.is_meta:  # a shape without numbers
            return None
        finite = torch.isfinite(self._largest).tolist()
        stored = 2 * len(set(self._heads))  # keys and values come first
        for what, part in (("keys or values", slice(stored)), ("queries", slice(stored, None))):
            each = zip(self._heads[part], finite[part], strict=True)
            if broken := sorted({head for head, fine in each if not fine}):
                return (
                    f"layer {self._layer}, heads {', '.join(map(str, broken))}: {what} of frames "
                    f"{self._frames.start}..{self._frames.stop - 1} hold NaN or infinity"
                )
        return None

    def check(self, consequence: str) -> None:
        """Waits for the result.

        Raises:
            NonFiniteKVError: a head holds NaN or infinity.
        """
        if (broken := self.broken()) is not None:
            raise NonFiniteKVError(f"{broken}, and {consequence}")


class FiniteGuard:
    """The checks of one layer on one stream.

    On an accelerator the result of a check is read one chunk later, when it is there without waiting. A
    history that turned out to be broken stays so until the next video.

    Args:
        banks: where the pending chunk lies.
        layer: for messages.
    """

    def __init__(self, banks: Collection[Bank], layer: int) -> None:
        self._banks, self._layer = banks, layer
        self.clear()

    def clear(self) -> None:
        """Forgets all of it, with the history."""
        self._committed: FiniteCheck | None = None
        self.drop()

    def drop(self) -> None:
        """There is no pending chunk any more."""
        self._frames: range | None = None
        self._queries: Tensor | None = None
        self._pending: FiniteCheck | None = None

    def wrote(self, chunk: Chunk) -> None:
        """The pending chunk is this one now."""
        self._queries = None if chunk.q is None else largest_of(chunk.q)
        self._frames, self._pending = chunk.frames, None

    def check(self, wait: bool) -> None:
        """Checks the pending chunk and reads the results that are there; with `wait`, also its own.

        Raises:
            NonFiniteKVError: a head holds NaN or infinity.
        """
        if self._committed is not None:
            self._committed.check(
                "were committed before this was known: reset the stream, or start a new video at frame 0"
            )
            self._committed = None
        self._begin()
        if self._pending is not None and (wait or self._pending.ready):
            self._pending.check("were not committed: write the chunk again, or reset the stream")

    def commit(self) -> None:
        """The pending chunk is history now; its result is read with the next one."""
        late = self._pending is not None and not self._pending.ready
        self._committed = self._pending if late else None
        self.drop()

    def unreported(self) -> list[FiniteCheck]:
        """Checks whose results were not reported, that of the pending chunk included."""
        self._begin()
        return [
            check for check in (self._committed, self._pending) if check is not None and not check.reported
        ]

    def _begin(self) -> None:
        if self._frames is not None and self._pending is None:
            self._pending = FiniteCheck.of(self._banks, self._queries, self._layer, self._frames)


def largest_of(x: Tensor) -> Tensor:
    """Largest magnitude per head, `[B, F, P, Hr, D] -> [Hr]`: finite if all are, where a sum may overflow."""
    largest: Tensor = torch.linalg.vector_norm(x, torch.inf, (0, 1, 2, 4))
    return largest


def check_ended(videos: Iterable[Sequence[FiniteCheck]]) -> None:
    """Waits for the results of chunks that videos ended with; each video is reported once.

    Args:
        videos: checks of every video that were not reported, its first layer first.

    Raises:
        NonFiniteKVError: one holds NaN or infinity.
    """
    found = []
    for checks in videos:
        for check in checks:  # the first broken layer broke those after it
            check.reported = True
        found.append(next(filter(None, (check.broken() for check in checks)), None))
    if broken := "; ".join(filter(None, found)):
        raise NonFiniteKVError(
            f"{broken}, and the video ended with them, so it is broken; the next one knows nothing of it"
        )
