"""Blocks of frames merged in time and space: the past at low resolution."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from headforcing.errors import StreamShapeError
from headforcing.roles.compressed import CompressedHistory, Past, Tokens, wide_dtype
from headforcing.types import Encode, Grid


class Blocks(CompressedHistory):
    """The last complete blocks, oldest first, and the block that is being filled.

    A block begins at a multiple of its length. Frames come one by one; their squares of patches are averaged
    and summed in float32, which gives the mean of the block. It sits at the lower median of its frames in
    time, and at the top left of its squares.

    Args:
        keep: complete blocks stored.
        frames: frames of a block.
        patch: side of the squares of patches that are averaged.
        hidden: last frames before a chunk; blocks that overlap them are not visible.
        origin: the time of position 0, by the first frame of the chunk.
    """

    def __init__(self, keep: int, frames: int, patch: int, hidden: int, origin: Callable[[int], int]) -> None:
        self.keep, self.frames, self.patch = keep, frames, patch
        self.hidden, self.origin = hidden, origin
        length = min(keep, sys.maxsize)  # a deque takes no larger number
        self._starts: deque[int] = deque(maxlen=length)
        self._k: deque[Tensor] = deque(maxlen=length)  # [B, P / patch**2, Hr, D] each
        self._v: deque[Tensor] = deque(maxlen=length)
        self._sum: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def check(self, grid: Grid | None) -> None:
        """Refuses a grid whose squares cannot be merged.

        Raises:
            StreamShapeError: the grid is not known, or has a side that is no multiple of the patch.
        """
        side = self.patch
        if grid is None or grid[0] % side or grid[1] % side:
            raise StreamShapeError(
                f"frames have {grid} patches, height and width: expected multiples of {side} to merge them"
            )

    def max_tokens(self, patches: int) -> int:
        return self.keep * (patches // self.patch**2)

    def add(self, past: Past) -> None:
        assert past.grid is not None  # checked
        pooled = [_pooled(x, past.grid, self.patch).unbind(1) for x in (past.k, past.v)]
        for frame, k, v in zip(past.frames, *pooled, strict=True):
            assert frame is not None  # committed frames are numbered
            first = frame % self.frames == 0
            if first or self._sum is None:
                self._sum = k.clone(), v.clone()
            else:
                self._sum = self._sum[0] + k, self._sum[1] + v
            self._count = 1 if first else self._count + 1
            if self._count == self.frames:
                self._push(frame + 1 - self.frames, past.k.dtype, past.v.dtype)

    def restarted(self, past: Past) -> None:
        """They are the first frames of the first block."""
        self.add(past)

    def view(self, start: int, query: int | None, encode: Encode) -> Tokens | None:
        """The blocks that do not overlap the last frames, at their true distance from every query frame."""
        rows = [row for row, first in enumerate(self._starts) if first + self.frames <= start - self.hidden]
        if not rows:
            return None
        middle = (self.frames - 1) // 2 - self.origin(start)
        positions = tuple(self._starts[row] + middle for row in rows)
        k, v = (torch.stack([held[row] for row in rows], 1) for held in (self._k, self._v))
        return encode(k, positions, self.patch).to(v.dtype).flatten(1, 2), v.flatten(1, 2)

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self._k, *self._v, *(self._sum or ()))

    def clear(self) -> None:
        for held in (self._starts, self._k, self._v):
            held.clear()
        self._sum, self._count = None, 0

    def _push(self, start: int, k_dtype: torch.dtype, v_dtype: torch.dtype) -> None:
        assert self._sum is not None
        k, v = (total / self.frames for total in self._sum)
        self._starts.append(start)
        self._k.append(k.to(k_dtype))
        self._v.append(v.to(v_dtype))
        self._sum, self._count = None, 0


def _pooled(x: Tensor, grid: Grid, side: int) -> Tensor:
    """Means over squares of patches, `[B, n, P, Hr, D] -> [B, n, P / side**2, Hr, D]`, float32 or wider."""
    batch, frames, _, heads, dim = x.shape
    x = x.to(wide_dtype(x))
    squares = x.reshape(batch, frames, grid[0] // side, side, grid[1] // side, side, heads, dim)
    return squares.mean((3, 5)).flatten(2, 3)
