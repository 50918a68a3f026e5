"""The fast store: buffers allocated once, kept in time order, moved and rotated once per chunk.

Every role owns three buffers of `capacity + chunk` frames: keys before RoPE, the same keys rotated to
where they sit now, and values. The pending chunk is written right behind the history, so a view is one
slice: no gather and no `cat` per pass. When a chunk begins, the frames that stay slide to the front
like in upstream's rolled cache, and only frames whose position changed are rotated again.

Roles that read a part of what they keep, or per query frame, have that part packed once per chunk (and
query frame) instead of the rotated keys.

Softmax does not care about the order of keys, but its last bits do: time order is what makes the
result equal to upstream's, bit for bit. Holding keys twice costs 1.5 times the bytes of a plain cache
of the same frames; `nbytes` says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from headforcing.bank import Bank
from headforcing.role import HeadRole
from headforcing.scene import Kept
from headforcing.stores import KVStore
from headforcing.types import Chunk, Encode, Heads, KVView, Phase


class RingStore(KVStore):
    """Preallocated slots per role."""

    def __init__(self, heads: Mapping[HeadRole, Heads], *, window: int, layer: int) -> None:
        super().__init__(heads, window=window, layer=layer)
        self._banks = {role: Bank(role, heads[role]) for role in heads}

    def view(self, role: HeadRole, phase: Phase, encode: Encode, query: int | None = None) -> KVView:
        bank = self._banks[role]
        own, asked = self._inside(role, query)
        table = bank.table(0, own, self.scenes.pin(role))
        rows = tuple(role.attend(dataclasses.replace(table, query=asked), phase))
        frames = (*(bank.frames[row] for row in rows), *own)
        positions = self._place(role, frames, len(own), asked)
        if query is None and len(rows) == len(bank.frames):
            k, v = bank.see(positions, encode)
        else:
            k, v = bank.see_some(rows, positions, encode, query)
        return KVView(self.scenes.outside(role, frames), positions, k, v)

    def frames(self, role: HeadRole) -> list[list[int]]:
        return self._banks[role].numbers()

    def _nbytes(self) -> int:
        return sum(bank.nbytes() for bank in self._banks.values())

    def _begin(self, own: range) -> None:
        for role, bank in self._banks.items():
            inside = self.scenes.inside(role, own)
            table, kept = bank.choose(inside, self.scenes.pin(role))
            self.digests.let_go(role, kept, table, bank.rows, self._grid)
            bank.begin(table, kept, inside, functools.partial(self._place, role))

    def _stage(self, chunk: Chunk) -> None:
        for bank in self._banks.values():
            bank.stage(chunk.k, chunk.v)

    def _append(self, frames: range) -> None:
        for role, bank in self._banks.items():
            bank.append(frames, self.scenes.inside(role, frames))

    def _held(self, role: HeadRole) -> Sequence[int | None]:
        return self._banks[role].frames

    def _take(self, role: HeadRole, rows: Sequence[int]) -> Kept:
        return self._banks[role].take(rows)

    def _put(self, role: HeadRole, kept: Kept) -> None:
        self._banks[role].put(kept)

    def _staged(self) -> Iterator[tuple[HeadRole, Tensor, Tensor]]:
        assert self._pending is not None
        for role, bank in self._banks.items():
            yield role, *bank.staged(len(self._pending))

    def _clear(self) -> None:
        for bank in self._banks.values():
            bank.clear()
