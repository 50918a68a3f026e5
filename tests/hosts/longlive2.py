"""A stand-in for LongLive 2.

A rolled cache whose sink is the first frames of the video, or those and the first frames of a later shot that
was pinned; frames of a shot are moved in time. With relative positions, keys are kept before RoPE and sit at
their place in the cache. The prompt is projected in every pass, and attention returns what the model writes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headforcing.roles import HeadRole, SlidingWindow
from tests.hosts.standin import TOKENS, Cache, CountingHost, StandInAttention, StandInModel, turned


class LongLive2Attention(StandInAttention):
    """A rolled cache with pins.

    Attributes:
        local_attn_size: frames that are cached.
        sink_size: first frames that are never evicted where no shot is pinned.
        global_sink_size: first frames that are never evicted.
    """

    tells = True
    local_attn_size, sink_size, global_sink_size = 9, 1, 0

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
        t_scale: float = 1.0,
        use_relative_rope: bool = False,
        method: str = "linear",
        original_seq_len: int | None = None,
        temporal_offset: float = 0.0,
    ) -> Any:
        """The output, and with a cache its two end indices and what is to be written."""
        if kv_cache is None:
            return self.attended(*self.projected(x, freqs, current_start))
        q, k, v = self.plain(x)
        start = current_start // TOKENS
        if not use_relative_rope:
            q, k = (_moved(part, freqs, start, temporal_offset) for part in (q, k))
        pinned, length = (int(kv_cache[name]) for name in ("pinned_start", "pinned_len"))
        sink = self.global_sink_size * TOKENS
        if not length:
            sink = max(sink, self.sink_size * TOKENS)
        elif pinned == sink:
            sink += length
        before = int(kv_cache["local_end_index"])
        rows, end = self.rolled(kv_cache, k, v, current_start, sink // TOKENS)
        evicted = before + current_start + x.shape[1] - int(kv_cache["global_end_index"]) - end
        if evicted > 0 and length and pinned >= sink:
            kv_cache["pinned_start"] -= evicted
        keys = rows["k"]
        if use_relative_rope:
            q, keys = _moved(q, freqs, (end - x.shape[1]) // TOKENS), _moved(keys, freqs, 0)
        return self.attended(q, keys, rows["v"]), (current_start + x.shape[1], end, rows)


class LongLive2Model(StandInModel):
    """The stand-in, which also tells its attention of shots.

    Attributes:
        rope_temporal_offset: how far the frames of the present shot are moved.
        use_relative_rope: whether frames sit at their place in the cache.
    """

    rope_temporal_offset, use_relative_rope = 0.0, False

    def forward(self, *args: Any, **told: Any) -> Tensor:
        """See `StandInModel.forward`; the prompt is not kept."""
        for cross in told.get("crossattn_cache") or (args[4] if len(args) > 4 else ()):
            cross["is_init"] = False
        if len(args) > 3 or "kv_cache" in told:
            told["temporal_offset"] = self.rope_temporal_offset
            told["use_relative_rope"] = self.use_relative_rope
        return super().forward(*args, **told)


class LongLive2Host(CountingHost):
    """A stand-in with LongLive 2's interface: nine frames and a sink, one shot."""

    memory: HeadRole = SlidingWindow(9, 1, positions="absolute")
    attention = LongLive2Attention

    def model(self, dtype: torch.dtype = torch.float32) -> LongLive2Model:
        """See `Host.model`."""
        return LongLive2Model(self.attention).eval().requires_grad_(False).to(dtype)

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """See `Host.caches`."""
        caches = super().caches(model, batch)
        for cache in caches["kv"]:
            cache["pinned_start"], cache["pinned_len"] = torch.tensor([-1]), torch.tensor([0])
        return caches

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """The same dicts with other end indices."""
        for cache in caches["kv"]:
            for name in ("global_end_index", "local_end_index"):
                cache[name] = torch.zeros(1, dtype=torch.long)
            cache["pinned_start"].fill_(-1)
            cache["pinned_len"].zero_()


def _moved(x: Tensor, freqs: Tensor, start: int, offset: float = 0) -> Tensor:
    """Whole frames `[B, L, H, D]`, rotated from frame `start` on, and moved."""
    if offset:
        time = freqs.shape[1] - 2 * (freqs.shape[1] // 3)
        positions = torch.arange(len(freqs), dtype=torch.float64) + offset
        angles = positions[:, None] * freqs[1, :time].angle()
        freqs = torch.cat([torch.polar(torch.ones_like(angles), angles), freqs[:, time:]], 1)
    return turned(x, freqs, start * TOKENS)
