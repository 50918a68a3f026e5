"""The fast store: slots made once, kept in time order, moved and rotated at most once per chunk.

Every role has three rooms of `capacity + chunk` frames: keys before RoPE, the same keys rotated to where they
sit now, and values; see `headforcing.stores.banked` for how they lie. Only frames whose position changed are
rotated again, when a chunk begins.

Roles that read a part of what they keep, or per query frame, have that part copied once per chunk (and
query frame); those that read per query frame have no room for rotated keys. What a role keeps beside
whole frames is rotated once per chunk, too, and lies right in front of them, so that a pass reads both as
one: `view` says where frames are seen, `view_digest` then lays its tokens before them, until the next chunk.

Softmax does not care about the order of keys, but its last bits do: time order is what makes the
result equal to upstream's, bit for bit. Holding keys twice costs 1.5 times the bytes of a plain cache
of the same frames; `nbytes` says so, and the `lean` store does not.
"""

from __future__ import annotations

from collections.abc import Mapping

from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import Tokens
from headforcing.stores.banked import Banked
from headforcing.stores.rotated import RotatedBank, side_by_side
from headforcing.stores.store import KVStore
from headforcing.types import Heads


class RingStore(Banked, KVStore):
    """Slots for keys before RoPE, rotated keys, and values."""

    _banks: dict[HeadRole, RotatedBank]

    def __init__(self, heads: Mapping[HeadRole, Heads], *, window: int, layer: int) -> None:
        super().__init__(heads, window=window, layer=layer)
        self._banks = {role: RotatedBank(role, heads[role], self.digests.get(role)) for role in heads}

    def _begin(self, own: range) -> None:
        super()._begin(own)
        side_by_side(self._banks.values())

    def _lay(self, role: HeadRole, which: int | None, tokens: Tokens) -> Tokens:
        return self._banks[role].lay(which, tokens)
