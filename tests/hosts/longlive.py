"""A stand-in for LongLive 1 (arXiv:2509.22622).

A rolled cache with a sink; attention returns where the cache ends and what is to be written, and the model
writes once all layers ran.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headforcing.roles import HeadRole, SlidingWindow
from tests.hosts.standin import Cache, CountingHost, StandInAttention


class LongLiveAttention(StandInAttention):
    """A rolled cache that is read here and written by the model.

    Attributes:
        local_attn_size: frames that are cached.
        sink_size: first frames that are never evicted.
    """

    tells = True
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
        sink_recache_after_switch: bool = False,
    ) -> Any:
        """The output, and with a cache its two end indices and what is to be written."""
        q, k, v = self.projected(x, freqs, current_start)
        if kv_cache is None:
            return self.attended(q, k, v)
        rows, local_end = self.rolled(kv_cache, k, v, current_start, self.sink_size)
        out = self.attended(q, rows["k"], rows["v"])
        return out, (current_start + x.shape[1], local_end, rows)


class LongLiveHost(CountingHost):
    """A stand-in with LongLive's interface: nine frames and a sink."""

    memory: HeadRole = SlidingWindow(9, 1, positions="absolute")
    attention = LongLiveAttention
