"""A stand-in for CausVid (arXiv:2412.07772): its interface on a tiny model, written from its description.

Cache dicts hold `k` and `v` and nothing else; tokens are written from `current_start` to `current_end` and
everything up to there is attended; cross-attention keeps the projected prompt. Patches lie 2 x 4, so that
height and width cannot be exchanged unseen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from headforcing.demo.attention import (
    DemoConfig,
    DemoCrossAttention,
    RMSNorm,
    grid_phases,
    rope_table,
    rotate,
)

GRID = (2, 4)
CHANNELS = 5
PROMPT = 3
"""Vectors of a prompt."""
TOKENS = GRID[0] * GRID[1]
LAYERS, HEADS, HEAD_DIM = 2, 3, 16


class StandInSelfAttention(nn.Module):
    """Self-attention with absolute slots."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, 1e-6), RMSNorm(dim, 1e-6)

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: Any,
        kv_cache: dict[str, Tensor] | None = None,
        current_start: int = 0,
        current_end: int = 0,
    ) -> Tensor:
        """Attends from `x [B, L, C]` to all tokens up to `current_end`; to itself where there is no cache."""
        frames, height, width = (int(size) for size in grid_sizes[0])
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        q, k = self.norm_q(self.q(x)).view(shape), self.norm_k(self.k(x)).view(shape)
        v = self.v(x).view(shape)
        phases = grid_phases(freqs, (frames, height, width), current_start // (height * width))
        q, k = rotate(q, phases), rotate(k, phases)
        if kv_cache is not None:
            if current_end > kv_cache["k"].shape[1]:
                raise ValueError(f"tokens up to {current_end} do not fit {kv_cache['k'].shape[1]} slots")
            for name, new in (("k", k), ("v", v)):
                kv_cache[name][:, current_start:current_end] = new
            k, v = (kv_cache[name][:, :current_end] for name in ("k", "v"))
        out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected


class StandInBlock(nn.Module):
    """Self-attention, cross-attention, MLP."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.self_attn = StandInSelfAttention(config.dim, config.heads)
        self.cross_attn = DemoCrossAttention(config)
        self.norm = nn.LayerNorm(config.dim)
        self.ffn = nn.Sequential(nn.Linear(config.dim, config.dim), nn.GELU())

    def forward(
        self, x: Tensor, layout: tuple[Any, ...], context: Tensor, crossattn_cache: Any, **cached: Any
    ) -> Tensor:
        """One block on `[B, L, C]`."""
        x = x + self.self_attn(self.norm(x), *layout, None, **cached)
        x = x + self.cross_attn(self.norm(x), context, crossattn_cache)
        out: Tensor = x + self.ffn(self.norm(x))
        return out


class StandInModel(nn.Module):
    """A tiny causal video model that is called as CausVid is."""

    def __init__(self) -> None:
        super().__init__()
        self.config = config = DemoConfig(dim=HEAD_DIM * HEADS, layers=LAYERS, heads=HEADS)
        self.num_frame_per_block = config.chunk
        self.patch_embedding = nn.Linear(CHANNELS, config.dim)
        self.time_embedding = nn.Linear(1, config.dim)
        self.blocks = nn.ModuleList(StandInBlock(config) for _ in range(LAYERS))
        self.head = nn.Linear(config.dim, CHANNELS)
        self.freqs = rope_table(config)
        generator = torch.Generator().manual_seed(7)
        for name, parameter in self.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(
                noise * parameter.shape[-1] ** -0.5
                if parameter.dim() == 2
                else 1.0 * ("norm" in name) + 0.3 * noise
            )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        kv_cache: list[dict[str, Tensor]] | None = None,
        crossattn_cache: list[dict[str, Any]] | None = None,
        current_start: int = 0,
        current_end: int = 0,
    ) -> Tensor:
        """One pass.

        Args:
            x: noisy patches `[B, F, P, CHANNELS]`.
            t: timestep `[B]`.
            context: prompt `[B, PROMPT, C]`.
            kv_cache: a dict per layer.
            crossattn_cache: a dict per layer.
            current_start: first token.
            current_end: behind the last token.

        Returns:
            As `x`.
        """
        frames = x.shape[1]
        times = self.time_embedding(t[:, None, None].to(x.dtype) / 1000)
        tokens = self.patch_embedding(x).flatten(1, 2) + times
        grids = torch.tensor([[frames, *GRID]]).expand(len(x), -1)
        layout = (torch.full((len(x),), tokens.shape[1]), grids, self.freqs)
        for number, block in enumerate(self.blocks):
            cross = None if crossattn_cache is None else crossattn_cache[number]
            tokens = block(
                tokens,
                layout,
                context,
                cross,
                kv_cache=None if kv_cache is None else kv_cache[number],
                current_start=current_start,
                current_end=current_end,
            )
        out: Tensor = self.head(tokens)
        return out.view_as(x)
