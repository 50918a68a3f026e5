"""How tests plant bugs in a store."""

from __future__ import annotations

from headforcing.roles import HeadRole
from headforcing.stores.ring import RingStore
from headforcing.stores.rotated import RotatedBank
from headforcing.types import Heads


def with_banks(bank: type[RotatedBank]) -> type[RingStore]:
    """The ring store with other banks, under their name."""

    def new_bank(self: RingStore, role: HeadRole, heads: Heads) -> RotatedBank:
        return bank(role, heads, self.compressed.get(role))

    return type(bank.__name__, (RingStore,), {"new_bank": new_bank})
