"""The specification of a store: lists of frames, sample by sample, nothing clever.

Keeps one Python list per role and sample, copies freely, and rotates all of it for every view. Every
other store is tested against it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headforcing.roles.base import HeadRole
from headforcing.stores.bank import Bank, Place
from headforcing.stores.scenes import Kept
from headforcing.stores.store import KVStore
from headforcing.types import Encode, FrameTable, Heads, Selection


@dataclass(frozen=True)
class _Frame:
    """One frame of one sample: its number, keys before RoPE and values, `[P, Hr, D]`."""

    number: int
    k: Tensor
    v: Tensor


class FrameLists(Bank):
    """Lists of frames: slow, obvious, trusted."""

    def __init__(self, role: HeadRole, heads: Heads) -> None:
        super().__init__(role, heads)
        self._samples: list[list[_Frame]] = []
        self._own: tuple[Tensor, Tensor] | None = None

    def wanted(self, k: Tensor, v: Tensor) -> int:
        """Lists need no room."""
        return self.slots(k, v)

    def begin(self, table: FrameTable, kept: Selection, own: range, place: Place) -> None:
        for index, sample in enumerate(self._samples):
            chosen = [] if kept.chosen is None else kept.chosen[index].tolist()
            self._samples[index] = [sample[row] for row in (*kept.before, *chosen, *kept.after)]
        self.frames, self._new = kept.frames(table), 0

    def stage(self, k: Tensor, v: Tensor) -> None:
        self._own = self.heads.take(k.detach()).clone(), self.heads.take(v.detach()).clone()
        self._samples = self._samples or [[] for _ in k]

    def append(self, frames: range, inside: range) -> None:
        for sample, k, v in zip(self._samples, *self.staged(0), strict=True):
            sample += [_Frame(n, k[i].clone(), v[i].clone()) for i, n in enumerate(frames)]
        self.frames, self._new = (*self.frames, *inside), len(frames)

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        k, v = self.staged(0)
        return (self._stack(rows, "k"), self._stack(rows, "v")) if rows else (k[:, :0], v[:, :0])

    def take(self, rows: Sequence[int]) -> Kept:
        numbers = [[sample[row].number for row in rows] for sample in self._samples]
        frames = tuple(self.frames[row] for row in rows)
        return Kept(frames, *self.rows(rows), torch.tensor(numbers, dtype=torch.long))

    def put(self, kept: Kept) -> None:
        self._samples = [
            [_Frame(n, x.clone(), y.clone()) for n, x, y in zip(numbers, k, v, strict=True)]
            for numbers, k, v in zip(kept.numbers.tolist(), kept.k, kept.v, strict=True)
        ]
        self.frames, self._new = kept.frames, 0

    def staged(self, chunk: int) -> tuple[Tensor, Tensor]:
        assert self._own is not None
        return self._own

    def see(self, positions: Sequence[float], encode: Encode) -> tuple[Tensor, Tensor]:
        return self.see_some(range(len(self.frames)), positions, encode, None)

    def see_some(
        self, rows: Sequence[int], positions: Sequence[float], encode: Encode, which: int | None
    ) -> tuple[Tensor, Tensor]:
        k, v = (torch.cat(parts, 1) for parts in zip(self.rows(rows), self.staged(0), strict=True))
        return encode(k, positions).to(v.dtype), v

    def numbers(self) -> list[list[int]]:
        return [[frame.number for frame in sample] for sample in self._samples]

    def tensors(self) -> list[Tensor]:
        return [x for sample in self._samples for f in sample for x in (f.k, f.v)] + [*(self._own or ())]

    def clear(self) -> None:
        super().clear()
        self._samples, self._own = [], None

    def _keys(self, rows: Sequence[int]) -> Tensor:
        return self._stack(rows, "k")

    def _stack(self, rows: Sequence[int], name: str) -> Tensor:
        """Keys or values of history rows, `[B, rows, P, Hr, D]`."""
        return torch.stack([torch.stack([getattr(s[row], name) for row in rows]) for s in self._samples])


class ReferenceStore(KVStore):
    """Lists of frames: slow, obvious, trusted."""

    def new_bank(self, role: HeadRole, heads: Heads) -> FrameLists:
        return FrameLists(role, heads)
