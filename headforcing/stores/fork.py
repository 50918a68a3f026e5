"""A fork of a store: all that can fail happens to it, then the store takes it over in one step.

So an error, an interrupt, or a device out of memory, at whatever line or operator, leaves the store as it
was, and the chunk can be written again. What overwrites stored frames is noted on the fork (`Bank.moves`) and
done last, when the store took it over; interrupted there, it is finished before anything else happens.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from headforcing.stores.store import KVStore

_T = TypeVar("_T")


def fork(one: _T, **changed: Any) -> _T:
    """A shallow copy with lists, dicts and deques of its own; attributes in `changed` are replaced."""
    twin = object.__new__(type(one))
    for name, value in {**one.__dict__, **changed}.items():
        own = isinstance(value, list | dict | deque) and name not in changed
        twin.__dict__[name] = value.copy() if own else value
    return twin


def fork_store(store: KVStore) -> KVStore:
    """A store with the same contents, to change in its place."""
    after = fork(store, compressed=store.compressed.fork(), _shifts=fork(store._shifts))
    after._banks = {role: fork(b, compressed=after.compressed.get(role)) for role, b in store._banks.items()}
    after.scenes = fork(store.scenes, _banks=after._banks, _compressed=after.compressed)
    after._finite = fork(store._finite, _banks=after._banks.values())
    return after
