"""Which frames the roles of one store see in a pass, and where these sit: worked out once per chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headforcing.roles.base import HeadRole, newest_rows
from headforcing.stores.bank import Bank
from headforcing.stores.compressed import CompressedHistories
from headforcing.stores.scenes import Scenes
from headforcing.stores.shifts import Shifts
from headforcing.types import Phase


@dataclass(frozen=True)
class Planned:
    """What a role sees in a pass.

    Attributes:
        rows: of its history; the pending chunk follows them.
        positions: of the rows and the pending chunk.
        frames: of the rows and the pending chunk, as the base model counts them.
    """

    rows: tuple[int, ...]
    positions: tuple[float, ...]
    frames: tuple[int | None, ...]


class Placement:
    """See the module.

    Args:
        banks: of the store, by role.
        scenes: of the store.
        compressed: the compressed histories of the store.
        shifts: of the store.
        window: frames the model was trained on.
    """

    def __init__(
        self,
        banks: Mapping[HeadRole, Bank],
        scenes: Scenes,
        compressed: CompressedHistories,
        shifts: Shifts,
        window: int,
    ) -> None:
        self._banks, self._scenes, self._compressed, self._shifts = banks, scenes, compressed, shifts
        self._window = window
        self._plans: dict[tuple[HeadRole, Phase, int | None], Planned] = {}

    def plan(self, role: HeadRole, pending: range, phase: Phase, query: int | None) -> Planned:
        """What the heads of `role` see in passes of a phase over the frames `pending`, until `forget`."""
        key = role, phase, query
        if key not in self._plans:
            self._plans[key] = self._plan(role, pending, phase, query)
        return self._plans[key]

    def inside(self, role: HeadRole, pending: range, query: int | None) -> tuple[range, int | None]:
        """The pending chunk and a query frame, as a role counts them."""
        own = self._scenes.inside(role, pending)
        return own, None if query is None else own.start + query - pending.start

    def positions(
        self, role: HeadRole, frames: Sequence[int | None], chunk: int, query: int | None = None
    ) -> tuple[float, ...]:
        """RoPE positions of the frames of a view, as the role counts them; the last `chunk` are its own."""
        more = {} if query is None else {"query": query}
        if (compressed := self._compressed.get(role)) is not None:
            more["gap"] = compressed.gap
        placed = role.positions_of(frames, chunk, self._window, **more)
        return self._shifts.moved(placed, self._scenes.outside(role, frames), role.positions)

    def forget(self) -> None:
        """Frames came or went, or count otherwise."""
        self._plans.clear()

    def _plan(self, role: HeadRole, pending: range, phase: Phase, query: int | None) -> Planned:
        bank, pin = self._banks[role], self._scenes.pin(role)
        own, query = self.inside(role, pending, query)
        table = bank.table(own, pin, query)
        every = tuple(role.visible(table, phase))
        rows = newest_rows(role, table, every, phase)
        placed = self.positions(role, (*(bank.frames[row] for row in every), *own), len(own), query)
        positions = (*(placed[every.index(row)] for row in rows), *placed[len(every) :])
        frames = (*(bank.frames[row] for row in rows), *own)
        return Planned(tuple(rows), positions, self._scenes.outside(role, frames))
