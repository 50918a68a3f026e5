"""A stand-in for Krea Realtime 14B.

Self Forcing's cache without eviction; before every chunk the last frames are computed again in one call under
a mask, which fills the cache. Its projections are fused, and trained on after that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad, scaled_dot_product_attention

from headforcing.roles import Full, HeadRole
from tests.hosts.standin import (
    CHANNELS,
    DIM,
    TOKENS,
    StandInAttention,
    StandInHost,
    StandInModel,
    dtype_of,
    noise_of,
)

CHUNK = 3
ALIGNED = 128
"""Calls under a mask are filled up to a multiple of this."""


class KreaAttention(StandInAttention):
    """A cache that is written as far as the video goes, or anew from its beginning where there is a mask.

    Attributes:
        local_attn_size: -1, no frame is evicted.
        sink_size: of no effect.
        fused_projections: whether `to_qkv` is called instead of `q`, `k` and `v`, which stay.
    """

    local_attn_size: int = -1
    sink_size: int = 0
    fused_projections = False

    def fuse_projections(self) -> None:
        """Makes one layer of three."""
        parts = (self.q, self.k, self.v)
        self.to_qkv = nn.Linear(DIM, 3 * DIM)
        self.to_qkv.weight.data.copy_(torch.cat([part.weight for part in parts]))
        self.to_qkv.bias.data.copy_(torch.cat([part.bias for part in parts]))
        self.fused_projections = True

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, L, H, D]` before RoPE."""
        if not self.fused_projections:
            return super().plain(x)
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        return self.norm_q(q).view(shape), self.norm_k(k).view(shape), v.view(shape)

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: BlockMask | None,
        kv_cache: Any = None,
        current_start: int = 0,
        cache_start: int | None = None,
    ) -> Tensor:
        """Attends from `x [B, L, C]` to the cache; under a mask to `x`, which is all that is cached then."""
        start = current_start if block_mask is None else 0
        end = start + x.shape[1]
        q, k, v = self.projected(x, freqs, start)
        kv_cache["k"][:, start:end], kv_cache["v"][:, start:end] = k, v
        kv_cache["global_end_index"] = kv_cache["local_end_index"] = end
        if block_mask is not None:
            return self.masked(q, k, v, block_mask)
        return self.attended(q, kv_cache["k"][:, :end], kv_cache["v"][:, :end])

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        """Attention of tokens that see alike, one after the other; zeros fill the length of the mask."""
        length = mask.shape[-1]
        k, v = (pad(x, (0, 0, 0, 0, 0, length - x.shape[1])) for x in (k, v))
        seen = mask.mask_mod(0, 0, torch.arange(q.shape[1])[:, None], torch.arange(length))
        alike, counts = seen.unique_consecutive(dim=0, return_counts=True)
        outs = []
        for row, own in zip(alike, q.split(counts.tolist(), dim=1), strict=True):
            sees = (x.transpose(1, 2) for x in (own, k[:, row], v[:, row]))
            outs.append(scaled_dot_product_attention(*sees).transpose(1, 2))
        projected: Tensor = self.o(torch.cat(outs, dim=1).flatten(2))
        return projected


class KreaHost(StandInHost):
    """Chunks of three frames behind as many of the last ones as the pipeline computes again.

    Args:
        context: frames that are computed again at most.
        fused: whether projections are fused.
    """

    unconcerned = frozenset(
        {
            "parity_through_eviction",
            "parity_through_eviction_bf16",
            "uncached_calls_pass_through",
            "prompt_switch_takes_effect",
            "edited_cache_refused",
            "compiled_is_one_operator",
        }
    )
    chunk, frames, dense, window, single = CHUNK, 12, 12, 21, True
    memory: HeadRole = Full()
    attention = KreaAttention

    def __init__(self, context: int = 9, fused: bool = True) -> None:
        self.context, self.fused, self.slots = context, fused, context + CHUNK

    def model(self, dtype: torch.dtype = torch.float32) -> StandInModel:
        """See `Host.model`; what is fused was trained on."""
        model = super().model()
        for block in model.blocks if self.fused else ():
            attention: Any = block.self_attn
            attention.fuse_projections()
            attention.to_qkv.weight.data += 0.05 * noise_of((3 * DIM, DIM), 0, 1, torch.float32)
        return model.requires_grad_(False).to(dtype)

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """See `Host.caches`; with the latents so far."""
        caches = super().caches(model, batch)
        for cache in caches["kv"]:
            cache["global_end_index"] = cache["local_end_index"] = 0
        return {**caches, "latents": {}, "chunk": -1}

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """See `Host.call`; the first pass over a chunk computes its past again."""
        if start != caches["chunk"]:
            self._begin(model, caches, start)
        shape = (len(caches["kv"][0]["k"]), frames, TOKENS, CHANNELS)
        caches["latents"][start] = noise_of(shape, start, draw, dtype_of(model))
        return self._pass(model, caches, caches["latents"][start], start, 100 * (draw % 10))

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """See `Host.new_video`."""
        super().new_video(model, caches)
        caches["latents"].clear()
        caches["chunk"] = -1

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """See `Host.cached`."""
        cache = caches["kv"][layer]
        end = cache["local_end_index"]
        return cache["k"][:, :end], cache["v"][:, :end]

    def uncached(self, model: nn.Module) -> None:
        """See `Host.uncached`: it always has a cache."""

    def _begin(self, model: Any, caches: Any, start: int) -> None:
        """Empties the cache and fills it with the last frames, of which the first is not what it was."""
        for cache in caches["kv"]:
            cache["k"].zero_()
            cache["v"].zero_()
            cache["global_end_index"] = cache["local_end_index"] = 0
        caches["chunk"] = start
        past = [latents for first, latents in sorted(caches["latents"].items()) if first < start]
        if not past:
            return
        frames = torch.cat(past, dim=1).to(dtype_of(model))
        if frames.shape[1] > self.context:
            frames = frames[:, -self.context :]
            frames = torch.cat([0.9 * frames[:, :1], frames[:, 1:]], dim=1)
        model.block_mask = mask_of(frames.shape[1])
        self._pass(model, caches, frames, start, 0)
        model.block_mask = None

    def _pass(self, model: nn.Module, caches: Any, latents: Tensor, start: int, time: int) -> Tensor:
        """One pass, which says that it begins behind the frames that are computed again."""
        batch = len(latents)
        out: Tensor = model(
            latents,
            torch.full((batch,), time),
            noise_of((batch, 3, DIM), 0, 999, latents.dtype),
            caches["kv"],
            caches["cross"],
            current_start=min(start, self.context) * TOKENS,
        )
        return out


@functools.cache
def mask_of(frames: int) -> BlockMask:
    """Chunks attend to themselves and those before; the last one to what would complete it, too."""
    length = -(-frames * TOKENS // ALIGNED) * ALIGNED
    whole = CHUNK * TOKENS

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key < (query // whole + 1) * whole) | (query == key)

    return create_block_mask(sees, None, None, length, length, device="cpu")
