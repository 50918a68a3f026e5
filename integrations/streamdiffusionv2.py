"""StreamDiffusionV2 (arXiv:2511.07399): the attention interface of CausVid, with a ring of slots.

Facts: starts and the two end indices are tensors with one element per sample; a chunk overwrites the slot of
the oldest one, positions are absolute. The first chunk, and frames within `sink_size`, are never evicted.
Which slot is next is kept on the attention module, so it outlives a video. There is no clean pass: the last
denoising pass writes the cache. In a stream batch, every sample is another chunk at another denoising step.
From frame 50 on, the pipeline moves positions back (`t_refresh`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from headforcing.adapters.base import Memo
from headforcing.adapters.wan import CALL
from headforcing.adapters.wan_counted import CountingWan
from headforcing.errors import ChunkOrderError, UnsupportedModelError
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.types import AttentionCall


class StreamDiffusionV2(CountingWan):
    """`CausalWanSelfAttention` with RoPE factors that the model computed.

    Args:
        context_noise: see `WanAdapter`.
        num_kv_cache: frames that its cache has room for, as in the configuration of the pipeline; needed for
            the model's own memory alone.
        sink: first frames that this cache never evicts: `num_sink_tokens` of the configuration, at least 3,
            because the pipeline's first chunk has two frames and the slot after it is kept as well.
    """

    name = "streamdiffusionv2"
    forward = (*CALL, "current_end", "causal_rope_cache")
    numbers = ("num_heads", "head_dim", "sink_size")
    rolls = True
    verified = {"dca85cf41a802963": "absolute"}  # 0.1.1, c5a0f20

    def __init__(self, context_noise: float = 0, num_kv_cache: int | None = None, sink: int = 3) -> None:
        super().__init__(context_noise)
        self.num_kv_cache, self.sink = num_kv_cache, sink

    def own_role(self, module: nn.Module) -> HeadRole:
        """See `WanAdapter.own_role`.

        Raises:
            UnsupportedModelError: nobody said how many frames the cache has room for.
        """
        if self.num_kv_cache is None:
            raise UnsupportedModelError(
                "only the pipeline knows how many frames its cache has room for: pass "
                "adapter=StreamDiffusionV2(num_kv_cache=...) with the number of its configuration"
            )
        return SlidingWindow(self.num_kv_cache, self.sink, positions="absolute")

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`.

        Raises:
            UnsupportedModelError: the sink is adaptive, or the call is a stream batch.
        """
        call = super().read(module, args, kwargs)
        if call is not None and module.adapt_sink_thr > -1:  # type: ignore[operator]
            raise UnsupportedModelError(
                f"the pipeline replaces first frames that no longer resemble the video (adapt_sink_thr is "
                f"{module.adapt_sink_thr}), but roles decide which frames are stored: set "
                "adapt_sink_threshold of the pipeline to -1"
            )
        return call

    def begin(self, module: nn.Module, given: Mapping[str, Any]) -> int:
        """See `WanAdapter.begin`.

        Raises:
            UnsupportedModelError: every sample has a start of its own.
        """
        starts = given[self.start]
        if isinstance(starts, Tensor) and starts.numel() > 1:
            raise UnsupportedModelError(
                f"the call is a stream batch, {starts.numel()} chunks at different denoising steps (starts "
                f"{starts.tolist()}): use mode='single-wo' or streamv2v/inference_wo_batch.py, which denoise "
                "one chunk after another"
            )
        return super().begin(module, given)

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """See `Adapter.begins_video`.

        Raises:
            ChunkOrderError: the pipeline moved its positions back.
        """
        end, before = (call.start + call.grid[0]) * call.tokens_per_frame, memo.get("ends", (0,))[0]
        if call.start and end < before:
            raise ChunkOrderError(
                f"after {before // call.tokens_per_frame} frames, the pipeline moved its positions back to "
                f"frame {call.start} (t_refresh): set t_refresh of the pipeline manager to float('inf'); "
                "compact positions stay in the trained range without it"
            )
        return super().begins_video(call, memo)


ADAPTER = StreamDiffusionV2()
