"""Stores with another bank, for planted bugs."""

from __future__ import annotations

from typing import Any

from headforcing.stores.ring import RingStore
from headforcing.stores.rotated import RotatedBank


def store_of_banks(bank: type[RotatedBank]) -> type[RingStore]:
    """A ring store whose frames lie in banks of a class, by whose name it goes."""

    def new_bank(self: RingStore, role: Any, heads: Any) -> RotatedBank:
        return bank(role, heads, self.compressed.get(role))

    return type(bank.__name__, (RingStore,), {"new_bank": new_bank})
