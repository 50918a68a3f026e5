"""A stand-in for CausVid (arXiv:2412.07772).

Cache dicts hold `k` and `v` and nothing else; tokens are written from `current_start` to `current_end`, and
everything up to there is attended.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headforcing.roles import Full, HeadRole
from tests.hosts.standin import Cache, StandInAttention, StandInHost


class CausVidAttention(StandInAttention):
    """Absolute slots, which the caller counts."""

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: Any,
        kv_cache: Cache | None = None,
        current_start: int = 0,
        current_end: int = 0,
    ) -> Tensor:
        """Attends from `x [B, L, C]` to all tokens up to `current_end`; to itself where there is no cache."""
        q, k, v = self.projected(x, freqs, current_start)
        if kv_cache is not None:
            if current_end > kv_cache["k"].shape[1]:
                raise ValueError(f"tokens up to {current_end} do not fit {kv_cache['k'].shape[1]} slots")
            for name, new in (("k", k), ("v", v)):
                kv_cache[name][:, current_start:current_end] = new
            k, v = (kv_cache[name][:, :current_end] for name in ("k", "v"))
        return self.attended(q, k, v)


class CausVidHost(StandInHost):
    """A stand-in with CausVid's interface: it holds everything and has room for seven chunks."""

    unconcerned = frozenset(
        {"parity_through_eviction", "parity_through_eviction_bf16", "edited_cache_refused"}
    )
    frames, dense, window, slots = 18, 18, 21, 21
    memory: HeadRole = Full()
    attention = CausVidAttention

    def told(self, start: int, end: int, clean: bool) -> dict[str, int]:
        """See `StandInHost.told`."""
        return {"current_start": start, "current_end": end}

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """The whole cache is slots by frame, so the end is where zeros begin."""
        k, v = (caches["kv"][layer][name] for name in ("k", "v"))
        end = int(k[0].flatten(1).any(1).sum())
        return k[:, :end], v[:, :end]
