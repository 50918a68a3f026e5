"""The fast store: slots made once, kept in time order, moved and rotated at most once per chunk.

Every role has three rooms of `capacity + chunk` frames: keys before RoPE, the same keys rotated to where they
sit now, and values; see `headforcing.stores.bank` for how they lie. Only frames whose position changed are
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

from headforcing.roles.base import HeadRole
from headforcing.stores.rotated import RotatedBank
from headforcing.stores.store import KVStore
from headforcing.types import Heads


class RingStore(KVStore):
    """Buffers for keys before RoPE, rotated keys, and values."""

    def new_bank(self, role: HeadRole, heads: Heads) -> RotatedBank:
        return RotatedBank(role, heads, self.digests.get(role))
