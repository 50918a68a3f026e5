"""The small store: keys before RoPE and values, each once, and nothing that can be made again.

Lies and moves like `ring` (see `headforcing.stores.bank`), without the room for rotated keys: all that a role sees
is rotated in every pass, into memory that is free again when the layer is through. So it holds what the
roles keep, the own chunk, and a number per frame and role; a layer at work takes at most as much again as
what it sees. It shows what `ring` shows, bit for bit.

The price is time: a pass rotates its whole view instead of the own chunk, and where a role reads a part of
what it keeps, or per query frame, copies that part in every pass. What is kept beside whole frames is put
together in every pass, too.

A role without a capacity has room for up to twice what it keeps, as in `ring`.
"""

from __future__ import annotations

from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import Tokens
from headforcing.stores.bank import Bank
from headforcing.stores.store import KVStore
from headforcing.types import Encode, Heads


class LeanStore(KVStore):
    """Buffers for keys before RoPE and values."""

    def new_bank(self, role: HeadRole, heads: Heads) -> Bank:
        return Bank(role, heads)

    def view_digest(self, role: HeadRole, encode: Encode, query: int | None = None) -> Tokens | None:
        tokens = super().view_digest(role, encode, query)
        self.digests.refresh()
        return tokens
