"""Blocks of frames merged in time and space, for roles that remember the past at low resolution."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from headforcing.errors import StreamShapeError
from headforcing.types import Grid, Merge


class Blocks:
    """The merged past of one role: complete blocks, oldest first, and the one that is being filled.

    A block begins at a multiple of its length. Frames come one by one, in order; their patches are
    averaged and added up in float32, which is the mean over all of them at once.
    """

    def __init__(self, merge: Merge) -> None:
        self.merge = merge
        self.starts: deque[int] = deque(maxlen=merge.keep)
        self._k: deque[Tensor] = deque(maxlen=merge.keep)  # [B, P / patch**2, Hr, D] each
        self._v: deque[Tensor] = deque(maxlen=merge.keep)
        self._sum: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def check(self, grid: Grid | None, before: Grid | None) -> None:
        """Looks whether frames of a grid can be merged, and with those before.

        Raises:
            StreamShapeError: the grid is not known, is another one than before, or has a side that is no
                multiple of the patch.
        """
        if before is not None and grid != before:
            raise StreamShapeError(
                f"frames of this video had {before} patches, now {grid}: start a new video"
            )
        side = self.merge.patch
        if grid is None or grid[0] % side or grid[1] % side:
            raise StreamShapeError(
                f"frames have {grid} patches, height and width: expected multiples of {side} to merge them"
            )

    def add(self, frames: range, k: Tensor, v: Tensor, grid: Grid) -> None:
        """Takes committed frames, keys before RoPE and values `[B, F, P, Hr, D]` of a grid of patches."""
        side = self.merge.patch
        for index, frame in enumerate(frames):
            small = _pooled(k[:, index], grid, side), _pooled(v[:, index], grid, side)
            first = frame % self.merge.frames == 0
            self._sum = small if first or self._sum is None else _added(self._sum, small)
            self._count = 1 if first else self._count + 1
            if self._count == self.merge.frames:
                self._push(frame + 1 - self.merge.frames, k.dtype, v.dtype)

    def take(self, starts: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of some blocks, `[B, blocks, P / patch**2, Hr, D]`."""
        rows = [self.starts.index(start) for start in starts]
        return torch.stack([self._k[row] for row in rows], 1), torch.stack([self._v[row] for row in rows], 1)

    def nbytes(self) -> int:
        """Bytes held."""
        held = [*self._k, *self._v, *(self._sum or ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def clear(self) -> None:
        """Forgets everything."""
        for held in (self.starts, self._k, self._v):
            held.clear()
        self._sum, self._count = None, 0

    def _push(self, start: int, k_dtype: torch.dtype, v_dtype: torch.dtype) -> None:
        assert self._sum is not None
        k, v = (total / self.merge.frames for total in self._sum)
        self.starts.append(start)
        self._k.append(k.to(k_dtype))
        self._v.append(v.to(v_dtype))
        self._sum, self._count = None, 0


def _pooled(x: Tensor, grid: Grid, side: int) -> Tensor:
    """Means over squares of patches, `[B, P, Hr, D] -> [B, P / side**2, Hr, D]` float32."""
    batch, _, heads, dim = x.shape
    squares = x.float().reshape(batch, grid[0] // side, side, grid[1] // side, side, heads, dim)
    return squares.mean((2, 4)).flatten(1, 2)


def _added(total: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return total[0] + more[0], total[1] + more[1]
