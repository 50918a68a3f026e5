"""The specification of a store: lists of frames, sample by sample, nothing clever.

Keeps one Python list per role and sample, copies freely, and rotates all of it for every view. Every
other store is tested against it, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headforcing.roles.base import HeadRole, visible_rows
from headforcing.stores.scenes import Kept
from headforcing.stores.store import KVStore
from headforcing.types import Chunk, Encode, FrameTable, Heads, KVView, Phase, Selection


@dataclass(frozen=True)
class _Frame:
    """One frame of one sample: its number, keys before RoPE and values, `[P, Hr, D]`."""

    number: int
    k: Tensor
    v: Tensor


class ReferenceStore(KVStore):
    """Lists of frames: slow, obvious, trusted."""

    def __init__(self, heads: Mapping[HeadRole, Heads], *, window: int, layer: int) -> None:
        super().__init__(heads, window=window, layer=layer)
        self._history: dict[HeadRole, list[list[_Frame]]]
        self._known: dict[HeadRole, tuple[int | None, ...]]
        self._chunk: Chunk | None
        self._new: int
        self._clear()

    def view(self, role: HeadRole, phase: Phase, encode: Encode, query: int | None = None) -> KVView:
        own = self._chunk
        assert own is not None
        inside, asked = self._inside(role, query)
        table = dataclasses.replace(self._table(role, 0, inside), query=asked)
        rows = list(visible_rows(role, table, phase))
        frames = (*(self._known[role][row] for row in rows), *inside)
        positions = self._place(role, frames, len(inside), asked)
        heads = self.heads[role]
        k, v = heads.take(own.k), heads.take(own.v)
        if rows:
            k = torch.cat([self._stack(role, rows, "k"), k], dim=1)
            v = torch.cat([self._stack(role, rows, "v"), v], dim=1)
        shown = self.scenes.outside(role, frames)
        return KVView(shown, positions, encode(k, positions).to(v.dtype), v)

    def frames(self, role: HeadRole) -> list[list[int]]:
        return [[frame.number for frame in sample] for sample in self._history[role]]

    def _tensors(self) -> Iterator[Tensor]:
        for frame in (f for samples in self._history.values() for sample in samples for f in sample):
            yield from (frame.k, frame.v)
        if self._chunk is not None:
            yield from (self._chunk.k, self._chunk.v)

    def _begin(self, own: range) -> None:
        for role, samples in self._history.items():
            table = self._table(role, self._new, self.scenes.inside(role, own))
            kept = role.retain(table)
            selection = kept if isinstance(kept, Selection) else Selection(tuple(kept))
            self.digests.evicted(role, selection, table, functools.partial(self._rows, role), self._grid)
            for index, sample in enumerate(samples):
                chosen = [] if selection.chosen is None else selection.chosen[index].tolist()
                rows = [*selection.before, *chosen, *selection.after]
                samples[index] = [sample[row] for row in rows]
            self._known[role] = selection.frames(table)
        self._new = 0

    def _stage(self, chunk: Chunk) -> None:
        self._chunk = Chunk(chunk.start, chunk.k.detach().clone(), chunk.v.detach().clone(), chunk.grid)
        for samples in self._history.values():
            samples.extend([] for _ in range(chunk.k.shape[0] - len(samples)))

    def _append(self, frames: range) -> None:
        assert self._chunk is not None
        for role, samples in self._history.items():
            k, v = self.heads[role].take(self._chunk.k), self.heads[role].take(self._chunk.v)
            for index, sample in enumerate(samples):
                sample += [_Frame(n, k[index, i].clone(), v[index, i].clone()) for i, n in enumerate(frames)]
            self._known[role] = (*self._known[role], *self.scenes.inside(role, frames))
        self._new = len(frames)

    def _held(self, role: HeadRole) -> Sequence[int | None]:
        return self._known[role]

    def _take(self, role: HeadRole, rows: Sequence[int]) -> Kept:
        frames = tuple(self._known[role][row] for row in rows)
        numbers = [[sample[row].number for row in rows] for sample in self._history[role]]
        return Kept(frames, *self._rows(role, rows), torch.tensor(numbers, dtype=torch.long))

    def _put(self, role: HeadRole, kept: Kept) -> None:
        self._known[role] = kept.frames
        self._history[role] = [
            [_Frame(n, x.clone(), y.clone()) for n, x, y in zip(numbers, k, v, strict=True)]
            for numbers, k, v in zip(kept.numbers.tolist(), kept.k, kept.v, strict=True)
        ]
        self._new = 0

    def _staged(self) -> Iterator[tuple[HeadRole, Tensor, Tensor]]:
        assert self._chunk is not None
        for role, heads in self.heads.items():
            yield role, heads.take(self._chunk.k), heads.take(self._chunk.v)

    def _clear(self) -> None:
        self._history = {role: [] for role in self.heads}
        self._known = dict.fromkeys(self.heads, ())
        self._chunk = None
        self._new = 0

    def _table(self, role: HeadRole, new: int, own: range) -> FrameTable:
        def keys(rows: Sequence[int]) -> Tensor:
            return self._stack(role, rows, "k")

        return FrameTable(self._known[role], new, len(own), keys, own.start, pin=self.scenes.pin(role))

    def _rows(self, role: HeadRole, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of history rows, `[B, rows, P, Hr, D]`; also of none."""
        own = self.heads[role].take(self._chunk.k) if self._chunk is not None else None
        if not rows:
            assert own is not None
            return own[:, :0], own[:, :0]
        return self._stack(role, rows, "k"), self._stack(role, rows, "v")

    def _stack(self, role: HeadRole, rows: Sequence[int], name: str) -> Tensor:
        """Keys or values of history rows, `[B, rows, P, Hr, D]`."""
        samples = self._history[role]
        return torch.stack([torch.stack([getattr(sample[row], name) for row in rows]) for sample in samples])
