"""KV stores: where the keys and values of the frames that roles keep are.

A store is a subclass of `KVStore` that answers one question: which `Bank` holds the frames of a role.
"""

from headforcing.errors import OptionError
from headforcing.stores.bank import Bank
from headforcing.stores.lean import LeanStore
from headforcing.stores.reference import ReferenceStore
from headforcing.stores.ring import RingStore
from headforcing.stores.store import KVStore

__all__ = ["STORES", "Bank", "KVStore", "LeanStore", "ReferenceStore", "RingStore", "store_class"]

STORES: dict[str, type[KVStore]] = {"lean": LeanStore, "reference": ReferenceStore, "ring": RingStore}


def store_class(name: str) -> type[KVStore]:
    """The store of a name.

    Raises:
        OptionError: there is none; the message lists those there are.
    """
    if name not in STORES:
        raise OptionError(f"unknown store {name!r}: expected one of {', '.join(STORES)}")
    return STORES[name]
