"""A stand-in for SGLang's causal Wan: FastVideo's model, with an object for a cache that evicts by itself."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.roles import HeadRole, SlidingWindow
from tests.hosts.fastvideo import SINK, WINDOW, FastVideoAttention, FastVideoHost, Tables, turned
from tests.hosts.standin import HEAD_DIM, HEADS, LAYERS, TOKENS, dtype_of


@dataclass(slots=True)
class SGLangCache:
    """Keys and values of one layer, the counters twice, and sizes in tokens."""

    k: Tensor
    v: Tensor
    global_end_index: Tensor
    local_end_index: Tensor
    sink_tokens: int
    global_end_index_int: int | None = None
    local_end_index_int: int | None = None
    global_sink_tokens: int = 0
    pinned_len: int = 0

    def update(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Puts new tokens in their place, the oldest after the sink evicted; returns all."""
        end, room = start + k.shape[1], self.k.shape[1]
        global_end, local_end = int(self.global_end_index), int(self.local_end_index)
        over = max(0, local_end + max(0, end - global_end) - room)
        for held, new in ((self.k, k), (self.v, v)):
            if over:
                held[:, self.sink_tokens : local_end - over] = held[
                    :, self.sink_tokens + over : local_end
                ].clone()
            last = local_end + max(0, end - global_end) - over
            held[:, last - new.shape[1] : last] = new
        self.count(max(end, global_end), last)
        return self.k[:, :last], self.v[:, :last]

    def count(self, global_end: int, local_end: int) -> None:
        """Writes the counters."""
        self.global_end_index.fill_(global_end)
        self.local_end_index.fill_(local_end)
        self.global_end_index_int, self.local_end_index_int = global_end, local_end


class SGLangAttention(FastVideoAttention):
    """Nothing says how many tokens a frame has."""

    def __init__(self) -> None:
        super().__init__("absolute")
        del self.rope_cache_policy

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        freqs_cis: Tables,
        block_mask: Any,
        kv_cache: SGLangCache | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
    ) -> Tensor:
        """Attends from `q [B, L, H, D]` to the cache, which it writes; to itself where there is none."""
        q, k = turned(q, freqs_cis), turned(k, freqs_cis)
        if kv_cache is not None:
            k, v = kv_cache.update(k, v, current_start)
        out: Tensor = self.attn(q, k, v)
        return out


class SGLangHost(FastVideoHost):
    """A stand-in with SGLang's interface: nine frames and a sink."""

    memory: HeadRole = SlidingWindow(WINDOW, SINK, positions="absolute")
    attention: type[nn.Module] = SGLangAttention
    numbers: int | None = 0
    unconcerned = FastVideoHost.unconcerned | {"compiled_is_one_operator"}

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """See `Host.model`."""
        model = super().model(dtype)
        model.config = SimpleNamespace(sliding_window_num_frames=WINDOW)
        for block in model.blocks:
            block.attn1, block.told = self.made().eval(), {}
        return model

    def made(self) -> nn.Module:
        """One attention."""
        return self.attention()

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """See `Host.caches`."""
        shape, dtype = (batch, self.slots * TOKENS, HEADS, HEAD_DIM), dtype_of(model)
        kv = [self.cache(shape, dtype) for _ in range(LAYERS)]
        return {"kv": kv, "cross": [{"is_init": False} for _ in kv], "prompt": [0]}

    def cache(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        """The cache of one layer."""
        counters = (torch.zeros(1, dtype=torch.long) for _ in range(2))
        held = (torch.zeros(shape, dtype=dtype) for _ in range(2))
        return SGLangCache(*held, *counters, SINK * TOKENS, self.numbers, self.numbers)

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """Zeros in the counters of the same caches."""
        for cache, cross in zip(caches["kv"], caches["cross"], strict=True):
            cross["is_init"] = False
            cache.count(0, 0)

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """See `Host.cached`."""
        cache = caches["kv"][layer]
        end = int(cache.local_end_index)
        return cache.k[:, :end], cache.v[:, :end]
