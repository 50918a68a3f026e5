"""A stand-in for FastVideo's causal Wan.

Blocks project and normalise queries, keys and values, and project what attention returns; attention rotates
by cosines and sines of the frames of the call, two columns per pair, puts other tensors into the cache dict
in every call that evicts nothing, and counts in the same two.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from headforcing.adapters.host_cache import entry
from headforcing.demo.model.attention import DemoConfig, DemoCrossAttention, RMSNorm
from headforcing.roles import HeadRole, SlidingWindow
from tests.hosts.standin import (
    CHANNELS,
    DIM,
    GRID,
    HEAD_DIM,
    HEADS,
    LAYERS,
    TOKENS,
    Cache,
    CountingHost,
    dtype_of,
    noise_of,
)

WINDOW, SINK = 9, 1
Tables = tuple[Tensor, Tensor]


class _Attend(nn.Module):
    """Attention of `[B, L, H, D]`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)


class FastVideoAttention(nn.Module):
    """A rolled cache with a sink; it has no weights.

    Args:
        policy: `"absolute"`, or `"relativistic"` where it keeps keys before RoPE and turns them when read.
    """

    def __init__(self, policy: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, HEAD_DIM
        self.local_attn_size, self.sink_size, self.rope_cache_policy = WINDOW, SINK, policy
        self.attn = _Attend()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        freqs_cis: Tables,
        block_mask: Any,
        kv_cache: dict[str, Any] | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
        frame_seqlen: int = TOKENS + 1,
    ) -> Tensor:
        """Attends from `q [B, L, H, D]` to the cache, which it writes; to itself where there is none."""
        late = self.rope_cache_policy == "relativistic" and kv_cache is not None
        if not late:
            q, k = turned(q, freqs_cis), turned(k, freqs_cis)
        if kv_cache is not None:
            end = self._write(kv_cache, k, v, current_start, self.sink_size * frame_seqlen)
            k, v = kv_cache["k"][:, :end], kv_cache["v"][:, :end]
            if late:
                q, k = turned(q, freqs_cis, end - q.shape[1]), turned(k, freqs_cis)
        out: Tensor = self.attn(q, k, v)
        return out

    def _write(self, cache: dict[str, Any], k: Tensor, v: Tensor, start: int, sink: int) -> int:
        """Puts new tokens behind the others, evicts the oldest after the sink, and says where they end."""
        global_end, local_end = (int(cache[name]) for name in ("global_end_index", "local_end_index"))
        grown = start + k.shape[1] - global_end
        evicted = max(0, local_end + grown - cache["k"].shape[1]) if grown > 0 else 0
        local_end += grown - evicted
        for name, new in (("k", k), ("v", v)):
            if evicted:
                kept = cache[name][:, sink + evicted :].clone()
                cache[name][:, sink : sink + kept.shape[1]] = kept
            else:
                cache[name] = cache[name].detach()
            cache[name][:, local_end - new.shape[1] : local_end] = new
        cache["global_end_index"].fill_(start + k.shape[1])
        cache["local_end_index"].fill_(local_end)
        return local_end


class FastVideoBlock(nn.Module):
    """Self-attention and its projections, cross-attention, MLP.

    Attributes:
        told: what its attention is told besides.
    """

    def __init__(self, policy: str) -> None:
        super().__init__()
        self.told: dict[str, Any] = {"frame_seqlen": TOKENS}
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(DIM, 1e-6), RMSNorm(DIM, 1e-6)
        self.attn1 = FastVideoAttention(policy)
        self.attn2 = DemoCrossAttention(DemoConfig(dim=DIM, layers=LAYERS, heads=HEADS))
        self.norm = nn.LayerNorm(DIM)
        self.ffn = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU())

    def forward(
        self, x: Tensor, context: Tensor, tables: Tables, crossattn_cache: Any, **cached: Any
    ) -> Tensor:
        """One block on `[B, L, C]`."""
        y = self.norm(x)
        q, k, v = self.norm_q(self.to_q(y)), self.norm_k(self.to_k(y)), self.to_v(y)
        parts = (part.unflatten(2, (HEADS, HEAD_DIM)) for part in (q, k, v))
        x = x + self.to_out(self.attn1(*parts, tables, None, **self.told, **cached).flatten(2))
        x = x + self.attn2(self.norm(x), context, crossattn_cache)
        out: Tensor = x + self.ffn(self.norm(x))
        return out


class FastVideoModel(nn.Module):
    """A tiny causal video model that is called as the original is."""

    def __init__(self, policy: str) -> None:
        super().__init__()
        self.num_frame_per_block = 3
        self.patch_embedding = nn.Linear(CHANNELS, DIM)
        self.condition_embedder = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(FastVideoBlock(policy) for _ in range(LAYERS))
        self.proj_out = nn.Linear(DIM, CHANNELS)
        self.policy = policy
        generator = torch.Generator().manual_seed(7)
        for name, parameter in self.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            matrix = noise * parameter.shape[-1] ** -0.5
            parameter.data.copy_(matrix if parameter.dim() == 2 else 1.0 * ("norm" in name) + 0.3 * noise)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        kv_cache: list[Cache] | None = None,
        crossattn_cache: list[dict[str, Any]] | None = None,
        current_start: int = 0,
        start_frame: int = 0,
    ) -> Tensor:
        """One pass.

        Args:
            hidden_states: noisy patches `[B, F, P, CHANNELS]`.
            encoder_hidden_states: prompt `[B, words, C]`.
            timestep: `[B, 1]`.
            kv_cache: a dict per layer.
            crossattn_cache: a dict per layer.
            current_start: first token.
            start_frame: first frame, for RoPE.

        Returns:
            As `hidden_states`.
        """
        times = self.condition_embedder(timestep[:, None].to(hidden_states.dtype) / 1000)
        tokens = self.patch_embedding(hidden_states).flatten(1, 2) + times
        late = self.policy == "relativistic" and kv_cache is not None
        made = tables_of(0, WINDOW) if late else tables_of(start_frame, hidden_states.shape[1])
        tables = tuple(table.to(hidden_states.device) for table in made)
        for number, block in enumerate(self.blocks):
            cached = {} if kv_cache is None else {"kv_cache": kv_cache[number]}
            cross = None if crossattn_cache is None else crossattn_cache[number]
            tokens = block(
                tokens, encoder_hidden_states, tables, cross, current_start=current_start, **cached
            )
        out: Tensor = self.proj_out(tokens)
        return out.view_as(hidden_states)


class FastVideoHost(CountingHost):
    """A stand-in with FastVideo's interface: nine frames and a sink."""

    unconcerned = frozenset({"wrapped_layers_are_called"})
    policy = "absolute"
    memory: HeadRole = SlidingWindow(WINDOW, SINK, positions="absolute")

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """See `Host.model`."""
        return FastVideoModel(self.policy).eval().requires_grad_(False).to(dtype)

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """See `Host.call`."""
        batch = len(entry(caches["kv"][0], "k"))
        out: Tensor = model(
            noise_of((batch, frames, TOKENS, CHANNELS), start, draw, dtype_of(model)),
            noise_of((batch, 3, DIM), 0, 999 + caches["prompt"][0], dtype_of(model)),
            torch.full((batch, 1), 100 * (draw % 10)),
            kv_cache=caches["kv"],
            crossattn_cache=caches["cross"],
            current_start=start * TOKENS,
            start_frame=start,
        )
        return out

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """FastVideo also sets the counters of old dicts to zero, which is harder than new dicts."""
        for cache, cross in zip(caches["kv"], caches["cross"], strict=True):
            cross["is_init"] = False
            for name in ("global_end_index", "local_end_index"):
                cache[name].fill_(0)

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """Keys as they are rotated when they are read."""
        k, v = super().cached(model, caches, layer)
        return (turned(k, tables_of(0, WINDOW)) if self.policy == "relativistic" else k), v

    def uncached(self, model: nn.Module) -> Tensor:
        """See `Host.uncached`."""
        noise = noise_of((1, 3, TOKENS, CHANNELS), 0, 0, dtype_of(model))
        out: Tensor = model(noise, noise_of((1, 3, DIM), 0, 999, dtype_of(model)), torch.zeros(1, 1))
        return out


class RelativisticHost(FastVideoHost):
    """The same, where the cache keeps keys before RoPE."""

    policy = "relativistic"
    memory: HeadRole = SlidingWindow(WINDOW, SINK, positions="compact")


@functools.lru_cache(maxsize=16)
def tables_of(first: int, frames: int) -> Tables:
    """Cosines and sines of frames, `[tokens, D]`, computed once; both channels of a pair have a column."""
    half = HEAD_DIM // 2
    sizes = (half - 2 * (half // 3), half // 3, half // 3)
    places = torch.cartesian_prod(torch.arange(first, first + frames), *(torch.arange(side) for side in GRID))
    angles = [
        place[:, None] / 10000 ** (torch.arange(size, dtype=torch.float64) / size)
        for place, size in zip(places.double().unbind(1), sizes, strict=True)
    ]
    turns = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return turns.cos(), turns.sin()


def turned(x: Tensor, tables: Tables, start: int = 0) -> Tensor:
    """`x [B, L, H, D]`, rotated by the tables from row `start` on: neighbouring channels are the pairs."""
    cos, sin = (table[start : start + x.shape[1], None] for table in tables)
    across = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x.float() * cos + across.float() * sin).to(x.dtype)
