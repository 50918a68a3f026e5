"""What the stand-ins share: base models that cannot be installed, as tiny models written from words.

A stand-in has the interface of its original and no line of its code. In all of them cross-attention keeps
the projected prompt. Patches lie 2 x 4, so that height and width cannot be exchanged unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from headforcing.adapters.host_cache import entry
from headforcing.demo.model.attention import (
    DemoConfig,
    DemoCrossAttention,
    RMSNorm,
    grid_phases,
    rope_table,
    rotate,
)
from headforcing.testing.host import Host

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


class StandInBlock(nn.Module):
    """Self-attention, cross-attention, MLP."""

    def __init__(self, attention: Callable[[], StandInAttention]) -> None:
        super().__init__()
        self.self_attn = attention()
        self.cross_attn = DemoCrossAttention(DemoConfig(dim=DIM, layers=LAYERS, heads=HEADS))
        self.norm = nn.LayerNorm(DIM)
        self.ffn = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU())

    def forward(
        self, x: Tensor, layout: tuple[Any, ...], context: Tensor, crossattn_cache: Any, **cached: Any
    ) -> tuple[Tensor, Any]:
        """One block on `[B, L, C]`, and what its attention wants to be written."""
        y, written = self.self_attn(self.norm(x), *layout, **cached), None
        if self.self_attn.tells and cached["kv_cache"] is not None:
            y, written = y
        x = x + y
        x = x + self.cross_attn(self.norm(x), context, crossattn_cache)
        return x + self.ffn(self.norm(x)), written


class StandInModel(nn.Module):
    """A tiny causal video model that is called as the original is.

    Args:
        attention: makes the attention of a block.
        block: makes a block of it.

    Attributes:
        block_mask: passed on to the attention.
    """

    block_mask: Any = None

    def __init__(
        self, attention: Callable[[], StandInAttention], block: type[StandInBlock] = StandInBlock
    ) -> None:
        super().__init__()
        self.num_frame_per_block = 3
        self.patch_embedding = nn.Linear(CHANNELS, DIM)
        self.time_embedding = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(block(attention) for _ in range(LAYERS))
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
        **told: int,
    ) -> Tensor:
        """One pass.

        Args:
            x: noisy patches `[B, F, P, CHANNELS]`.
            t: timestep `[B]`.
            context: prompt `[B, words, C]`.
            kv_cache: a dict per layer.
            crossattn_cache: a dict per layer.
            told: `current_start` in tokens, and what else the attention is told.

        Returns:
            As `x`.
        """
        times = self.time_embedding(t[:, None, None].to(x.dtype) / 1000)
        tokens = self.patch_embedding(x).flatten(1, 2) + times
        grids = torch.tensor([[x.shape[1], *GRID]]).expand(len(x), -1)
        layout = (torch.full((len(x),), tokens.shape[1]), grids, self.freqs, self.block_mask)
        writes = []
        for number, block in enumerate(self.blocks):
            cache = None if kv_cache is None else kv_cache[number]
            cross = None if crossattn_cache is None else crossattn_cache[number]
            tokens, written = block(tokens, layout, context, cross, kv_cache=cache, **told)
            writes.append(written)
        for cache, written in zip(kv_cache or (), writes, strict=False):
            if written is not None:
                write(cache, *written)
        out: Tensor = self.head(tokens)
        return out.view_as(x)


class StandInHost(Host):
    """What the stand-ins share.

    Attributes:
        attention: their attention.
        slots: frames that a cache has room for.
    """

    chunk, single = 3, True
    attention: type[StandInAttention]
    slots: int

    def model(self, dtype: torch.dtype = torch.float32) -> StandInModel:
        """See `Host.model`."""
        return StandInModel(self.attention).eval().requires_grad_(False).to(dtype)

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """See `Host.caches`."""
        shape, dtype = (batch, self.slots * TOKENS, HEADS, HEAD_DIM), dtype_of(model)
        kv = [{name: torch.zeros(shape, dtype=dtype) for name in ("k", "v")} for _ in range(LAYERS)]
        return {"kv": kv, "cross": [{"is_init": False} for _ in kv], "prompt": [0]}

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """See `Host.call`."""
        batch = len(entry(caches["kv"][0], "k"))
        out: Tensor = model(
            noise_of((batch, frames, TOKENS, CHANNELS), start, draw, dtype_of(model)),
            torch.full((batch,), 100 * (draw % 10)),
            noise_of((batch, 3, DIM), 0, 999 + caches["prompt"][0], dtype_of(model)),
            caches["kv"],
            caches["cross"],
            **self.told(start * TOKENS, (start + frames) * TOKENS, draw % 10 == 0),
        )
        return out

    def told(self, start: int, end: int, clean: bool) -> dict[str, int]:
        """What a call says of its tokens, and of its pass."""
        return {"current_start": start}

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """See `Host.new_video`."""
        for cross in caches["cross"]:
            cross["is_init"] = False

    def uncached(self, model: nn.Module) -> Tensor:
        """See `Host.uncached`."""
        noise = noise_of((1, 3, TOKENS, CHANNELS), 0, 0, dtype_of(model))
        out: Tensor = model(noise, torch.zeros(1), noise_of((1, 3, DIM), 0, 999, dtype_of(model)))
        return out

    def switch_prompt(self, model: nn.Module, caches: Any) -> bool:
        """See `Host.switch_prompt`."""
        caches["prompt"][0] += 1
        return True


class CountingHost(StandInHost):
    """Caches of nine frames that say how far they are written; a video begins with new cache dicts."""

    frames, dense, window, slots = 18, 9, 9, 9

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """See `Host.caches`."""
        caches = super().caches(model, batch)
        for cache in caches["kv"]:
            for name in ("global_end_index", "local_end_index"):
                cache[name] = torch.zeros(1, dtype=torch.long)
        return caches

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """See `Host.new_video`."""
        super().new_video(model, caches)
        caches["kv"][:] = self.caches(model, len(entry(caches["kv"][0], "k")))["kv"]

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """See `Host.cached`."""
        cache = caches["kv"][layer]
        end = int(cache["local_end_index"])
        return cache["k"][:, :end], cache["v"][:, :end]


def turned(x: Tensor, freqs: Tensor, start: int) -> Tensor:
    """Whole frames `[B, L, H, D]`, rotated from token `start` on."""
    return rotate(x, grid_phases(freqs, (x.shape[1] // TOKENS, *GRID), start // TOKENS))


def write(cache: Cache, global_end: int, local_end: int, rows: dict[str, Tensor] | None) -> None:
    """Counts, and writes where there is something to write."""
    for name, new in (rows or {}).items():
        cache[name][:, : new.shape[1]] = new
    cache["global_end_index"].fill_(global_end)
    cache["local_end_index"].fill_(local_end)


def noise_of(shape: tuple[int, ...], start: int, draw: int, dtype: torch.dtype) -> Tensor:
    """The input of a draw for the chunk that begins at frame `start`, always the same."""
    generator = torch.Generator().manual_seed(1000 * draw + start)
    return torch.randn(shape, generator=generator).to(dtype)


def randomised_norms(model: nn.Module) -> nn.Module:
    """Weights that are ones at first get random numbers: else one norm could stand for another."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if bool((weight == 1).all()):
                weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
    return model


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type of the parameters."""
    return next(model.parameters()).dtype
