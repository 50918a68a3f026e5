"""A stand-in for Infinity-RoPE (arXiv:2511.20649).

A rolled cache of keys before RoPE, which are rotated to their place in it; its prompt flush and its hard cut
are left out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headforcing.roles import HeadRole, SlidingWindow
from tests.hosts.standin import Cache, CountingHost, StandInAttention, turned, write


class InfinityRopeAttention(StandInAttention):
    """A rolled cache of keys before RoPE: frames sit at their place in it.

    Attributes:
        local_attn_size: frames that are cached.
        sink_size: first frames that are never evicted.
    """

    local_attn_size: int = 9
    sink_size: int = 1

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
        timestep: Tensor | None = None,
    ) -> Tensor:
        """Attends from `x [B, L, C]` to the cache, which it writes; to itself where there is none."""
        if kv_cache is None:
            return self.attended(*self.projected(x, freqs, current_start))
        q, k, v = self.plain(x)
        rows, end = self.rolled(kv_cache, k, v, current_start, self.sink_size)
        write(kv_cache, current_start + x.shape[1], end, rows)
        return self.attended(turned(q, freqs, end - x.shape[1]), turned(rows["k"], freqs, 0), rows["v"])


class InfinityRopeHost(CountingHost):
    """A stand-in with Infinity-RoPE's interface: frames sit at their place in the cache."""

    unconcerned = frozenset({"release_frees", "cache_comes_back"})
    memory: HeadRole = SlidingWindow(9, 1, positions="compact")
    attention = InfinityRopeAttention

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """The keys as they are rotated when they are read."""
        k, v = super().cached(model, caches, layer)
        return turned(k, model.freqs, 0), v  # type: ignore[arg-type]
