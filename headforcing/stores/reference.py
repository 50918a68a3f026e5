"""The specification of a store: lists of frames, sample by sample, nothing clever.

One Python list per role and sample; every view copies and rotates all of it. Every other store is tested
against this one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headforcing.roles.base import HeadRole
from headforcing.stores.bank import Bank, Kept, PositionsOf
from headforcing.stores.store import KVStore
from headforcing.types import Encode, FrameTable, Heads, Selection


@dataclass(frozen=True)
class _Frame:
    """One frame of one sample: its number, keys before RoPE and values, `[P, Hr, D]`."""

    number: int
    k: Tensor
    v: Tensor


class FrameLists(Bank):
    """A list of frames per sample."""

    def __init__(self, role: HeadRole, heads: Heads) -> None:
        super().__init__(role, heads)
        self._samples: list[list[_Frame]] = []
        self._pending: tuple[Tensor, Tensor] | None = None

    def begin(self, table: FrameTable, kept: Selection, chunk: range, positions: PositionsOf) -> None:
        for index, sample in enumerate(self._samples):
            chosen = [] if kept.chosen is None else kept.chosen[index].tolist()
            self._samples[index] = [sample[row] for row in (*kept.before, *chosen, *kept.after)]
        super().begin(table, kept, chunk, positions)

    def stage(self, k: Tensor, v: Tensor) -> None:
        self._pending = self.heads.take(k.detach()).clone(), self.heads.take(v.detach()).clone()
        self._samples = self._samples or [[] for _ in k]

    def staged(self) -> tuple[Tensor, Tensor]:
        assert self._pending is not None
        return self._pending

    def append(self, frames: range, inside: range) -> None:
        self._samples = [
            [*sample, *(_Frame(n, k[i].clone(), v[i].clone()) for i, n in enumerate(frames))]
            for sample, k, v in zip(self._samples, *self.staged(), strict=True)
        ]
        super().append(frames, inside)

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        if not rows:
            k, v = (x[:, :0].clone() for x in self.staged())
        else:
            chosen = [[sample[row] for row in rows] for sample in self._samples]
            k, v = (torch.stack([torch.stack([getattr(f, x) for f in s]) for s in chosen]) for x in "kv")
        return k, v

    def take(self, rows: Sequence[int]) -> Kept:
        numbers = [[sample[row].number for row in rows] for sample in self._samples]
        frames = tuple(self.frames[row] for row in rows)
        return Kept(frames, *self.rows(rows), torch.tensor(numbers, dtype=torch.long))

    def put(self, kept: Kept) -> None:
        self._samples = [
            [_Frame(n, x.clone(), y.clone()) for n, x, y in zip(numbers, k, v, strict=True)]
            for numbers, k, v in zip(kept.numbers.tolist(), kept.k, kept.v, strict=True)
        ]
        super().put(kept)

    def view(
        self, rows: Sequence[int], positions: Sequence[float], encode: Encode, query: int | None
    ) -> tuple[Tensor, Tensor]:
        k, v = (torch.cat(parts, 1) for parts in zip(self.rows(rows), self.staged(), strict=True))
        return encode(k, positions).to(v.dtype), v

    def numbers(self) -> list[list[int]]:
        return [[frame.number for frame in sample] for sample in self._samples]

    def tensors(self) -> list[Tensor]:
        frames = [frame for sample in self._samples for frame in sample]
        return [*(x for frame in frames for x in (frame.k, frame.v)), *(self._pending or ())]

    def clear(self) -> None:
        self._samples, self._pending = [], None
        super().clear()


class ReferenceStore(KVStore):
    """Slow, obvious, trusted."""

    def new_bank(self, role: HeadRole, heads: Heads) -> FrameLists:
        return FrameLists(role, heads)
