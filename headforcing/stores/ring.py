"""The fast store: buffers made once, kept in time order, moved and rotated at most once per chunk.

Every role has three buffers of `capacity + chunk` frames: keys before RoPE, the same keys rotated to their
present positions, and values; see `headforcing.stores.buffered`. Only frames whose position changed are
rotated again, when a chunk begins.

For roles that attend to a part of their history, or read per query frame, that part is copied once per chunk
(and query frame); those that read per query frame have no buffer for rotated keys. Compressed tokens are
rotated once per chunk, too, and copied right in front of the frames, so that a pass reads both as one: `view`
says where frames are read, `view_compressed` then puts the tokens in front of them, until the next chunk.

The order of keys does not matter to softmax, but it does to its last bits: time order makes the result
equal to upstream's, bit for bit. Storing keys twice costs 1.5 times the bytes of a plain KV cache of the
same frames; `nbytes` counts them, and the `lean` store avoids it.
"""

from __future__ import annotations

from headforcing.roles.base import HeadRole
from headforcing.stores.rotated import RotatedBank
from headforcing.stores.store import KVStore
from headforcing.types import Heads


class RingStore(KVStore):
    """Keys before RoPE, rotated keys, and values."""

    def new_bank(self, role: HeadRole, heads: Heads) -> RotatedBank:
        return RotatedBank(role, heads, self.compressed.get(role))
