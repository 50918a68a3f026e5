"""Where retained frames sit on the temporal RoPE axis.

A scheme maps the visible frames (current chunk last) to integer positions, in Python, without reading a
tensor. RoPE only feels differences, so `compact` and `clamped` may move the query as well. Head Forcing
re-encodes "within the pretrained range" (arXiv:2605.14487, abstract); which of the two it uses is not public
(our choice, see the docs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from headforcing.errors import RoleError

PositionScheme = Literal["absolute", "adjoining", "compact", "clamped"]
SCHEMES: tuple[PositionScheme, ...] = ("absolute", "adjoining", "compact", "clamped")
BOUNDED: tuple[PositionScheme, ...] = ("compact", "clamped")
"""Those that stay in the range the model was trained on."""
TRUE: tuple[PositionScheme, ...] = ("absolute", "adjoining")
"""Those where the current chunk sits at its frame number."""


def scheme_positions(
    scheme: PositionScheme, frames: Sequence[int | None], chunk: int, window: int
) -> tuple[int, ...]:
    """Temporal positions of `frames`, current chunk last.

    Args:
        scheme: `absolute`: the frame number; `adjoining`: every frame right before the next, the last at its
            number; `compact`: 0, 1, 2, ...; `clamped`: see `_clamped`.
        frames: absolute frame indices, ascending; the last `chunk` are the current chunk.
        chunk: frames of the current chunk, `F`.
        window: frames the model was trained on; `clamped` stays in `[0, window)`.

    Raises:
        RoleError: the scheme has to know every frame, but some were chosen by content.
    """
    if scheme == "compact":
        return tuple(range(len(frames)))
    if scheme == "adjoining" and (last := frames[-1]) is not None:
        return tuple(range(last + 1 - len(frames), last + 1))
    known = [frame for frame in frames if frame is not None]
    if len(known) != len(frames):
        raise RoleError(
            f"positions={scheme!r} requires the index of every frame, but {len(frames) - len(known)} of "
            f"{len(frames)} frames were chosen by content: use positions='compact'"
        )
    return tuple(known) if scheme == "absolute" else _clamped(known, chunk, window)


def _clamped(frames: Sequence[int], chunk: int, window: int) -> tuple[int, ...]:
    """True distances while they fit; then the oldest frames stay at 0, 1, 2, ..."""
    history, current = frames[: len(frames) - chunk], frames[len(frames) - chunk :]
    query = min(current[0], window - chunk)
    kept = [max(rank, query - (current[0] - frame)) for rank, frame in enumerate(history)]
    return (*kept, *[query + frame - current[0] for frame in current])
