"""The small store: keys before RoPE and values, each once, and nothing that can be computed again.

The same as `ring` without the buffers for rotated keys: all that a role sees is rotated in every pass, into
memory that is free again when the layer is done. So it stores what the roles keep, the current chunk, and a
number per frame and role; a layer at work takes at most as much again as it attends to. Views are those of
`ring`, bit for bit.

The price is time: a pass rotates its whole view instead of the current chunk, and where a role attends to a
part of its history, or reads per query frame, copies that part in every pass. Compressed tokens are rotated
and joined with the frames in every pass, too.

A role without a capacity, or with a large one, has buffers for up to twice what it keeps, as in `ring`.
"""

from __future__ import annotations

from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import Tokens
from headforcing.stores.buffered import BufferedBank
from headforcing.stores.store import KVStore
from headforcing.types import Encode, Heads


class LeanStore(KVStore):
    """Keys before RoPE, and values."""

    def new_bank(self, role: HeadRole, heads: Heads) -> BufferedBank:
        return BufferedBank(role, heads, self.compressed.get(role))

    def view_compressed(self, role: HeadRole, encode: Encode, query: int | None = None) -> Tokens | None:
        tokens = super().view_compressed(role, encode, query)
        self.compressed.forget_views()
        return tokens
