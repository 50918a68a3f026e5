"""Stand-ins for base models that cannot be installed: their interfaces on a tiny model, written from words.

CausVid (arXiv:2412.07772): cache dicts hold `k` and `v` and nothing else; tokens are written from
`current_start` to `current_end`, and everything up to there is attended. LongLive (arXiv:2509.22622): a
rolled cache with a sink; attention returns where the cache ends and what is to be written, and the model
writes once all layers ran. Infinity-RoPE (arXiv:2511.20649): a rolled cache of keys before RoPE, which are
rotated to their place in it; its prompt flush and its hard cut are left out. In all of them cross-attention
keeps the projected prompt. Patches lie 2 x 4, so that height and width cannot be exchanged unseen.
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
TOKENS = GRID[0] * GRID[1]
CHANNELS = 5
LAYERS, HEADS, HEAD_DIM = 2, 3, 16
DIM = HEADS * HEAD_DIM

Cache = dict[str, Tensor]


class StandInAttention(nn.Module):
    """What the stand-ins share: projections, norms over all channels, RoPE.

    Attributes:
        tells: whether a call with a cache also returns what is to be written.
    """

    tells = False

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, HEAD_DIM
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(DIM, 1e-6), RMSNorm(DIM, 1e-6)

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, L, H, D]` before RoPE."""
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        return self.norm_q(self.q(x)).view(shape), self.norm_k(self.k(x)).view(shape), self.v(x).view(shape)

    def projected(self, x: Tensor, freqs: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated from token `start` on, and values, `[B, L, H, D]`."""
        q, k, v = self.plain(x)
        return turned(q, freqs, start), turned(k, freqs, start), v

    def rolled(self, cache: Cache, k: Tensor, v: Tensor, start: int, sink: int) -> tuple[Cache, int]:
        """What the cache holds with new tokens behind, the oldest after the sink evicted, and its end."""
        new, sink = k.shape[1], sink * TOKENS
        local_end, grown = int(cache["local_end_index"]), start + new - int(cache["global_end_index"])
        evicted = max(0, local_end + grown - cache["k"].shape[1]) if grown > 0 else 0
        local_end += grown - evicted
        rows = {}
        for name, own in (("k", k), ("v", v)):
            old = cache[name]
            kept = torch.cat([old[:, :sink], old[:, sink + evicted :]], 1) if evicted else old
            rows[name] = torch.cat([kept[:, : local_end - new], own], 1)
        return rows, local_end

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of `[B, L, H, D]`, projected."""
        out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected


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


class InfinityRopeAttention(StandInAttention):
    """A rolled cache of keys before RoPE: frames sit at their place in it.

    Attributes:
        local_attn_size: frames that are cached.
        sink_size: first frames that are never evicted.
    """

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
        timestep: Tensor | None = None,
    ) -> Tensor:
        """Attends from `x [B, L, C]` to the cache, which it writes; to itself where there is none."""
        if kv_cache is None:
            return self.attended(*self.projected(x, freqs, current_start))
        q, k, v = self.plain(x)
        rows, end = self.rolled(kv_cache, k, v, current_start, self.sink_size)
        _write(kv_cache, current_start + x.shape[1], end, rows)
        return self.attended(turned(q, freqs, end - x.shape[1]), turned(rows["k"], freqs, 0), rows["v"])


class StandInBlock(nn.Module):
    """Self-attention, cross-attention, MLP."""

    def __init__(self, attention: type[StandInAttention]) -> None:
        super().__init__()
        self.self_attn = attention()
        self.cross_attn = DemoCrossAttention(DemoConfig(dim=DIM, layers=LAYERS, heads=HEADS))
        self.norm = nn.LayerNorm(DIM)
        self.ffn = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU())

    def forward(
        self, x: Tensor, layout: tuple[Any, ...], context: Tensor, crossattn_cache: Any, **cached: Any
    ) -> tuple[Tensor, Any]:
        """One block on `[B, L, C]`, and what its attention wants to be written."""
        y, written = self.self_attn(self.norm(x), *layout, None, **cached), None
        if self.self_attn.tells and cached["kv_cache"] is not None:
            y, written = y
        x = x + y
        x = x + self.cross_attn(self.norm(x), context, crossattn_cache)
        return x + self.ffn(self.norm(x)), written


class StandInModel(nn.Module):
    """A tiny causal video model that is called as the original is."""

    def __init__(self, attention: type[StandInAttention]) -> None:
        super().__init__()
        self.num_frame_per_block = 3
        self.patch_embedding = nn.Linear(CHANNELS, DIM)
        self.time_embedding = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(StandInBlock(attention) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, CHANNELS)
        self.freqs = rope_table(DemoConfig(dim=DIM, layers=LAYERS, heads=HEADS))
        generator = torch.Generator().manual_seed(7)
        for name, parameter in self.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            matrix = noise * parameter.shape[-1] ** -0.5
            parameter.data.copy_(matrix if parameter.dim() == 2 else 1.0 * ("norm" in name) + 0.3 * noise)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        kv_cache: list[Cache] | None = None,
        crossattn_cache: list[dict[str, Any]] | None = None,
        **where: int,
    ) -> Tensor:
        """One pass.

        Args:
            x: noisy patches `[B, F, P, CHANNELS]`.
            t: timestep `[B]`.
            context: prompt `[B, words, C]`.
            kv_cache: a dict per layer.
            crossattn_cache: a dict per layer.
            where: `current_start` in tokens, and for CausVid `current_end`.

        Returns:
            As `x`.
        """
        times = self.time_embedding(t[:, None, None].to(x.dtype) / 1000)
        tokens = self.patch_embedding(x).flatten(1, 2) + times
        grids = torch.tensor([[x.shape[1], *GRID]]).expand(len(x), -1)
        layout = (torch.full((len(x),), tokens.shape[1]), grids, self.freqs)
        writes = []
        for number, block in enumerate(self.blocks):
            cache = None if kv_cache is None else kv_cache[number]
            cross = None if crossattn_cache is None else crossattn_cache[number]
            tokens, written = block(tokens, layout, context, cross, kv_cache=cache, **where)
            writes.append(written)
        for cache, written in zip(kv_cache or (), writes, strict=False):
            if written is not None:
                _write(cache, *written)
        out: Tensor = self.head(tokens)
        return out.view_as(x)


def turned(x: Tensor, freqs: Tensor, start: int) -> Tensor:
    """Whole frames `[B, L, H, D]`, rotated from token `start` on."""
    return rotate(x, grid_phases(freqs, (x.shape[1] // TOKENS, *GRID), start // TOKENS))


def _write(cache: Cache, global_end: int, local_end: int, rows: dict[str, Tensor] | None) -> None:
    """Counts, and writes where there is something to write."""
    for name, new in (rows or {}).items():
        cache[name][:, : new.shape[1]] = new
    cache["global_end_index"].fill_(global_end)
    cache["local_end_index"].fill_(local_end)
