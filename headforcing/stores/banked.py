"""A store whose roles have a bank each, all in the same few pieces of memory.

The pending chunk is written right behind the history, so a view is one slice: no gather and no `cat` per
pass. When a chunk begins, the frames that stay slide to the front like in upstream's rolled cache.

A role has room for `capacity + chunk` frames. Keys before RoPE of all roles are one allocation, the longest
role first, values another one, and so on; see `headforcing.stores.buffers`. They are made when the first chunk
comes and stay where they are, also for the next video, unless a role without a capacity or a longer chunk
needs more, or a role needs less from now on, as what it keeps beside whole frames took the place of some:
then all of them move, with what they hold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from headforcing.roles.base import HeadRole, visible_rows
from headforcing.stores.bank import Bank
from headforcing.stores.buffers import Size, cut
from headforcing.stores.scenes import Kept
from headforcing.stores.storage import Storage
from headforcing.types import Chunk, Encode, KVView, Phase


class Banked(Storage):
    """See the module. A store says what its banks are."""

    _banks: Mapping[HeadRole, Bank]

    def view(self, role: HeadRole, phase: Phase, encode: Encode, query: int | None = None) -> KVView:
        """See `Storage.view`."""
        bank = self._banks[role]
        own, asked = self._inside(role, query)
        table = bank.table(0, own, self.scenes.pin(role))
        rows = tuple(visible_rows(role, dataclasses.replace(table, query=asked), phase))
        frames = (*(bank.frames[row] for row in rows), *own)
        positions = self._place(role, frames, len(own), asked)
        if asked is None and len(rows) == len(bank.frames):
            k, v = bank.see(positions, encode)
        else:
            k, v = bank.see_some(rows, positions, encode, None if asked is None else asked - own.start)
        return KVView(self.scenes.outside(role, frames), positions, k, v)

    def frames(self, role: HeadRole) -> list[list[int]]:
        """See `Storage.frames`."""
        return self._banks[role].numbers()

    def _tensors(self) -> Iterator[Tensor]:
        for bank in self._banks.values():
            yield from bank.tensors()

    def _begin(self, own: range) -> None:
        for role, bank in self._banks.items():
            inside = self.scenes.inside(role, own)
            table, kept = bank.choose(inside, self.scenes.pin(role))
            self.digests.evicted(role, kept, table, bank.rows, self._grid)
            bank.begin(table, kept, inside, functools.partial(self._place, role))
            digest = self.digests.get(role)
            if digest is not None and digest.gap:
                bank.tighten(len(own))

    def _stage(self, chunk: Chunk) -> None:
        make_room([*self._banks.values()], chunk.k, chunk.v)
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


def make_room(banks: Sequence[Bank], k: Tensor, v: Tensor) -> None:
    """Gives the banks of a layer rooms for a chunk `[B, F, P, H, D]`, if one of them has none."""
    wanted = [bank.wanted(k, v) for bank in banks]
    if wanted == [bank.slots(k, v) for bank in banks]:
        return
    if not any(bank.frames for bank in banks):  # nothing to take along: let go before there is more
        for bank in banks:
            bank.leave()
    frame = (k.shape[0], k.shape[2], k.shape[4])
    rooms: list[dict[str, Tensor]] = [{} for _ in banks]
    for name in dict.fromkeys(name for bank in banks for name in bank.rooms):
        some = [index for index, bank in enumerate(banks) if name in bank.rooms]
        sizes = [
            Size(wanted[index], len(banks[index].heads), banks[index].front(name, k.shape[2]))
            for index in some
        ]
        for index, room in zip(some, cut(sizes, frame, k if name == "raw" else v), strict=True):
            rooms[index][name] = room
    for bank, own in zip(banks, rooms, strict=True):
        bank.move(own)
