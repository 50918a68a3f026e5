"""A stand-in for Reward Forcing (arXiv:2512.04678).

A rolled cache of keys before RoPE, which are rotated to their place in it. What leaves it changes its first
frames: as many as these are averaged into them, another number replaces the first of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headforcing.roles import EmaSink, HeadRole
from tests.hosts.standin import TOKENS, Cache, CountingHost, StandInAttention, turned, write


class RewardForcingAttention(StandInAttention):
    """A rolled cache with a sink that changes.

    Attributes:
        local_attn_size: frames that are cached.
        sink_size: frames of the sink.
        compression_alpha: weight of the sink when frames are averaged into it.
    """

    local_attn_size: int = 8
    sink_size: int = 3
    compression_alpha: float = 0.75

    def incremental_update(self, sink: Tensor, gone: Tensor) -> Tensor:
        """The sink and as many evicted tokens, averaged."""
        return self.compression_alpha * sink + (1 - self.compression_alpha) * gone

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
    ) -> Tensor:
        """Attends from `x [B, L, C]` to the cache, which it writes; to itself where there is none."""
        if kv_cache is None:
            return self.attended(*self.projected(x, freqs, current_start))
        q, k, v = self.plain(x)
        sink, before = self.sink_size * TOKENS, int(kv_cache["local_end_index"])
        rows, end = self.rolled(kv_cache, k, v, current_start, self.sink_size)
        grown = current_start + x.shape[1] - int(kv_cache["global_end_index"])
        evicted = before + grown - end
        for name, own in rows.items():
            if evicted:
                gone = kv_cache[name][:, sink : sink + evicted]
                rows[name] = torch.cat([self._changed(own[:, :sink], gone), own[:, sink:]], 1)
        write(kv_cache, current_start + x.shape[1], end, rows)
        return self.attended(turned(q, freqs, end - x.shape[1]), turned(rows["k"], freqs, 0), rows["v"])

    def _changed(self, sink: Tensor, gone: Tensor) -> Tensor:
        if sink.shape == gone.shape:
            return self.incremental_update(sink, gone)
        first = gone[:, : sink.shape[1]]
        return torch.cat([first, sink[:, first.shape[1] :]], 1)


class RewardForcingHost(CountingHost):
    """A stand-in with Reward Forcing's interface.

    Of eight frames the third chunk evicts one, which replaces one of the sink, and later ones evict three,
    which are averaged into it.
    """

    dense, window, slots = 6, 8, 8
    memory: HeadRole = EmaSink(8, 3, 0.75)
    attention = RewardForcingAttention

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """The keys as they are rotated when they are read."""
        k, v = super().cached(model, caches, layer)
        return turned(k, model.freqs, 0), v  # type: ignore[arg-type]
