"""The dynamic heads of Forcing-KV (arXiv:2605.09681); its static heads are `Local(recent=1, sink=1)`.

From its released code. Beside the first frame, the last one and the current chunk, a dynamic head attends to
one frame's worth of pieces of the three frames before the last: of their horizontal bands, those least like
the same band of the next frame, by the mean cosine of rotated keys. One layer selects for all layers after
it. There the selection is made for the first video of a batch; here, for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headforcing.errors import RoleError, StreamShapeError, WindowError
from headforcing.roles.base import HeadRole, ends
from headforcing.roles.compressed import CompressedHistory, Past, Tokens, wide_dtype
from headforcing.roles.positions import PositionScheme
from headforcing.types import Encode, FrameTable, Grid


@dataclass(frozen=True)
class Dynamic(HeadRole):
    """First frames, the pieces that moved most, and the last frame.

    The keys of all heads of this role in a layer are compared together. The first layer with such heads
    selects, and the layers after it use its selection.

    Attributes:
        sink: first frames of the video.
        pieces: bands that a frame is cut into, and bands that are selected.
        skip: first chunks that are not cut; the first one never is. 2 there, as heads get their labels after
            the second.
    """

    sink: int = 1
    pieces: int = 6
    skip: int = 2
    positions: PositionScheme = field(default="absolute", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions not in ("absolute", "compact"):
            raise RoleError(f"{self}: expected positions 'absolute' or 'compact', for pieces")
        if self.pieces < 1:
            raise RoleError(f"{self}: expected at least 1 piece")

    def capacity(self, chunk: int) -> int | None:
        """Whole frames; pieces come on top, one frame in size."""
        return self.sink + 1

    def retain(self, table: FrameTable) -> Sequence[int]:
        return ends(table, self.sink, 1)

    def fit(self, window: int, chunk: int) -> HeadRole:
        """With compact positions, every frame that was cut takes a position.

        Raises:
            WindowError: the window has fewer.
        """
        if self.positions == "compact" and self.sink + 1 + 2 * chunk > window:
            raise WindowError(f"{self} takes {self.sink + 1 + 2 * chunk} positions of {window}: lower sink")
        return super().fit(window, chunk)

    def compressed(self) -> CompressedHistory | None:
        return Pieces(self)


@dataclass(frozen=True)
class _Choice:
    """Pieces that a layer selected, `[B, m]`, of the frames that were cut."""

    layer: int
    frames: tuple[int | None, ...]
    pieces: Tensor


class Pieces(CompressedHistory):
    """Pieces of the frames before the last one."""

    def __init__(self, role: Dynamic) -> None:
        self.role = role
        self._chunks = 0
        self._past: Past | None = None  # the frame before the last chunk, and that chunk; later its last one
        self._cut = 0
        self._seen: Tokens | None = None

    def max_tokens(self, patches: int) -> int:
        return patches

    @property
    def gap(self) -> int:
        """A position for every frame that was cut."""
        return self._cut

    def check(self, grid: Grid | None) -> None:
        """Refuses a grid that cannot be cut.

        Raises:
            StreamShapeError: the grid is not known, or has no equal bands.
        """
        if grid is None or grid[0] * grid[1] % self.role.pieces:
            raise StreamShapeError(
                f"frames have {grid} patches, height and width: cannot cut them into {self.role.pieces} "
                "equal pieces, give the role another number of pieces"
            )

    def add(self, past: Past) -> None:
        """Keeps the frames of a chunk; all but the last one can be cut, unless they are first frames."""
        before = self._past
        self._chunks += 1
        self._past = _after_sink(
            self.role.sink, _joined(past) if before is None else _joined(_last(before), past)
        )
        early = before is None or self._chunks <= self.role.skip
        self._cut = 0 if early else max(0, len(self._past.frames) - 1)
        self._seen = None

    def view(self, start: int, query: int | None, encode: Encode) -> Tokens | None:
        """The pieces, oldest first; selected when they are attended to for the first time."""
        if self._seen is None and self._cut and self._past is not None:
            past, first = self._past, self.role.sink
            absolute = self.role.positions == "absolute"
            k = encode(past.k, tuple(past.frames if absolute else range(first, first + self._cut + 1)))
            pieces = self._choice(past, k)
            k = k.to(past.v.dtype)
            self._seen = _taken(k[:, :-1], pieces, self.role), _taken(past.v[:, :-1], pieces, self.role)
            self._past = _joined(_last(past))
        return self._seen

    def tensors(self) -> Iterator[Tensor]:
        if self._past is not None:
            yield from (self._past.k, self._past.v)
        yield from self._seen or ()

    def clear(self) -> None:
        self._chunks, self._past, self._cut, self._seen = 0, None, 0, None

    def _choice(self, past: Past, k: Tensor) -> Tensor:
        """The pieces that are least like their next frame, `[B, m]`, of rotated keys `[B, n, P, Hr, D]`."""
        frames = tuple(past.frames)
        before: _Choice | None = past.shared.get("choice")
        if before is not None and before.layer < past.layer and before.frames == frames:
            return before.pieces.to(k.device)
        spots = k.flatten(3).to(wide_dtype(k))
        alike = torch.cosine_similarity(spots[:, :-1], spots[:, 1:], dim=-1)  # [B, n - 1, P]
        scores = alike.unflatten(2, (self.role.pieces, -1)).mean(-1).flatten(1)
        least = torch.sort(scores, dim=1, stable=True).indices[:, : self.role.pieces]
        pieces: Tensor = torch.sort(least, dim=1).values
        past.shared["choice"] = _Choice(past.layer, frames, pieces)
        return pieces


def _joined(*pasts: Past) -> Past:
    """Copies of frames, one after the other."""
    k, v = torch.cat([past.k for past in pasts], 1), torch.cat([past.v for past in pasts], 1)
    return replace(pasts[-1], frames=[frame for past in pasts for frame in past.frames], k=k, v=v)


def _after_sink(sink: int, past: Past) -> Past:
    """Without the first frames of the video."""
    first = sum(frame is not None and frame < sink for frame in past.frames)
    return replace(past, frames=past.frames[first:], k=past.k[:, first:], v=past.v[:, first:])


def _last(past: Past) -> Past:
    """The last frame."""
    return replace(past, frames=past.frames[-1:], k=past.k[:, -1:], v=past.v[:, -1:])


def _taken(x: Tensor, pieces: Tensor, role: Dynamic) -> Tensor:
    """Some pieces of frames `[B, n, P, Hr, D]`, as tokens `[B, m, Hr, D]`."""
    cut = x.flatten(1, 2).unflatten(1, (x.shape[1] * role.pieces, -1))  # [B, pieces, tokens, Hr, D]
    tokens: Tensor = cut.gather(1, pieces[:, :, None, None, None].expand(-1, -1, *cut.shape[2:]))
    return tokens.flatten(1, 2)
