"""A fork of a store: all that can fail happens to it, then the store takes it over in one step.

So an error, an interrupt, or a device out of memory, at whatever line or operator, leaves the store as it
was, and the chunk can be written again. What overwrites stored frames is noted on the fork (`Bank.moves`) and
done last, when the store took it over; interrupted there, it is finished before anything else happens. One
more pass over the pending chunk decides nothing, so it takes no fork: the store notes it, stages it, and if
that is interrupted, whoever comes next finishes it (`KVStore.settle`).
"""

from __future__ import annotations

from collections import deque
from typing import Any, TypeVar

_T = TypeVar("_T")


def fork(one: _T, **changed: Any) -> _T:
    """A shallow copy with lists, dicts and deques of its own; attributes in `changed` are replaced."""
    twin = object.__new__(type(one))
    for name, value in {**one.__dict__, **changed}.items():
        own = isinstance(value, list | dict | deque) and name not in changed
        twin.__dict__[name] = value.copy() if own else value
    return twin


def fork_store(store: _T) -> _T:
    """A `KVStore` with the same contents, to change in its place."""
    parts = vars(store)
    compressed, shifts = parts["compressed"].fork(), fork(parts["_shifts"])
    banks = {role: fork(bank, compressed=compressed.get(role)) for role, bank in parts["_banks"].items()}
    scenes = fork(parts["scenes"], _banks=banks, _compressed=compressed)
    placed = {"_banks": banks, "_scenes": scenes, "_compressed": compressed, "_shifts": shifts, "_plans": {}}
    return fork(
        store,
        compressed=compressed,
        _banks=banks,
        scenes=scenes,
        _shifts=shifts,
        _placement=fork(parts["_placement"], **placed),
        _finite=fork(parts["_finite"], _banks=banks.values()),
    )
