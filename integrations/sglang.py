"""SGLang's causal Wan: FastVideo's attention, with a cache object that evicts by itself.

Facts (0.5.23): a `CausalSelfAttentionKVCache` per layer holds keys after RoPE, the two counters as tensors
and again as numbers, and sizes in tokens; a full one is always rolled, keeping its sink. With
`local_attn_size` -1 it has room for `sliding_window_num_frames` of the model's configuration. Pinned frames
and a second sink are for other models. Nothing tells the tokens of a frame but the RoPE tables.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headforcing.adapters.base import Memo
from headforcing.adapters.wan_counted import INDICES
from headforcing.adapters.wan_given import GIVEN, GivenWan
from headforcing.errors import ExternalEditError
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.types import AttentionCall


class SGLang(GivenWan):
    """`CausalWanSelfAttention` with a cache object."""

    name = "sglang"
    forward = (*GIVEN, "freqs_cis", "block_mask", "kv_cache", "current_start", "cache_start")
    verified = {"bfb2d091d59a86cb": "absolute"}  # 0.5.23
    rolls = True

    def window(self, model: nn.Module) -> int:
        """Frames that a cache has room for."""
        sizes = {int(module.local_attn_size) for _, module in self.attentions(model)}  # type: ignore[arg-type]
        return super().window(model) if sizes != {-1} else int(model.config.sliding_window_num_frames)  # type: ignore

    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        """See `Adapter.own_memory`; a full cache is always rolled."""
        size = self.window(model)
        sinks = [int(module.sink_size) for _, module in self.attentions(model)]  # type: ignore[arg-type]
        return [SlidingWindow(size, sink, positions="absolute") for sink in sinks]

    def anchor(self, cache: Any) -> object:
        """See `GivenWan.anchor`.

        Raises:
            ExternalEditError: the cache pins frames.
        """
        if cache.pinned_len or cache.global_sink_tokens:
            raise ExternalEditError(
                f"the cache pins frames (pinned_len {cache.pinned_len}, global_sink_tokens "
                f"{cache.global_sink_tokens}): expected none, set global_sink to 0"
            )
        return super().anchor(cache)

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        """See `CountingWan.output`; the counters are there twice."""
        y = super().output(module, out, call, memo)
        for name, end in zip(INDICES, memo["ends"], strict=True):
            setattr(call.arguments[self.cache], f"{name}_int", end)
        return y


ADAPTER = SGLang()
