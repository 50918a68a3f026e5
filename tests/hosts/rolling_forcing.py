"""A stand-in for Rolling Forcing (arXiv:2509.25161).

Only the first chunk of a call is written, into a cache that rolls behind its first chunk. A noisy call sees
that one, right before the last frames that the window leaves beside its own; a clean call sees the last
frames of the window. Keys are kept before RoPE here; the original keeps those of the first chunk so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headforcing.integrations.rolling_forcing import RollingForcing
from headforcing.roles import HeadRole
from headforcing.roles.rolling_forcing import Rolling
from tests.hosts.standin import TOKENS, Cache, CountingHost, StandInAttention, turned, write


class RollingForcingAttention(StandInAttention):
    """A rolled cache beside a window of several chunks; sizes are in tokens.

    Attributes:
        frame_length: of one frame.
        block_length: of the chunk that is written, and of the one that is never evicted.
        max_attention_size: of all that is seen.
    """

    frame_length, block_length, max_attention_size = TOKENS, 3 * TOKENS, 9 * TOKENS

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: Any,
        kv_cache: Cache | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
        updating_cache: bool = False,
    ) -> Tensor:
        """Attends from `x [B, L, C]` to the cache and to itself."""
        if kv_cache is None:
            return self.attended(*self.projected(x, freqs, current_start))
        q, k, v = self.plain(x)
        block = self.block_length
        rows, end = self.rolled(kv_cache, k[:, :block], v[:, :block], current_start, block // TOKENS)
        write(kv_cache, current_start + block, end, rows)
        before, room = end - block, self.max_attention_size - x.shape[1]
        first = 0 if updating_cache else min(block, before)
        recent = max(before - room + first, first)
        seen = []
        for name, own in (("k", k), ("v", v)):
            seen.append(torch.cat([rows[name][:, :first], rows[name][:, recent:before], own], 1))
        at = current_start + x.shape[1] - seen[0].shape[1]
        return self.attended(turned(q, freqs, current_start), turned(seen[0], freqs, at), seen[1])


class RollingForcingHost(CountingHost):
    """A stand-in with Rolling Forcing's interface, a window of nine frames, and one chunk at a time."""

    unconcerned = frozenset({"single_frames"})
    adapter = RollingForcing(chunks=1)
    slots, single = 12, False
    memory: HeadRole = Rolling(9)
    attention = RollingForcingAttention

    def told(self, start: int, end: int, clean: bool) -> dict[str, int]:
        """A clean pass writes the cache."""
        return {"current_start": start, "updating_cache": clean}

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """The keys as they are rotated when they are read."""
        k, v = super().cached(model, caches, layer)
        return turned(k, model.freqs, 0), v  # type: ignore[arg-type]
