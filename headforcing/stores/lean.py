"""The small store: keys before RoPE and values, each once, and nothing that can be made again.

Like `ring` (see `headforcing.stores.bank`) without buffers for rotated keys: all visible keys of a role are
rotated in every pass, into memory that is free again when the layer is done. So it stores what the roles
keep, the current chunk, and a number per frame and role; a layer at work allocates at most as much again as
it attends to. Its views equal those of `ring`, bit for bit.

The price is time: a pass rotates its whole view instead of the current chunk, and where a role attends to a
part of what it keeps, or per query frame, copies that part in every pass. Compressed tokens are put together
in every pass, too.

A role without a capacity has buffers for up to twice what it keeps, as in `ring`.
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
