"""Attention of the demo model: RoPE, and Self Forcing's rolling KV cache.

From the outside `DemoCausalSelfAttention` looks like `CausalWanSelfAttention` (arXiv:2506.08009):
linear `q, k, v, o`, RMS norms over the full dim, complex-pair 3-D RoPE, keys rotated before they
are cached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from headforcing.demo.model.autoencoder import CHANNELS
from headforcing.demo.world.camera import CHUNK, GRID

Cache = dict[str, Tensor]
CrossCache = dict[str, Tensor | bool]


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo model; `window` is the number of frames it is trained on."""

    dim: int = 192
    layers: int = 6
    heads: int = 6
    mlp_ratio: int = 3
    channels: int = CHANNELS
    grid: tuple[int, int] = GRID
    chunk: int = CHUNK
    window: int = 21
    rope_rows: int = 1024

    @property
    def tokens_per_frame(self) -> int:
        """Latents of one frame."""
        return math.prod(self.grid)


def rope_table(config: DemoConfig) -> Tensor:
    """Unit complex numbers `[rows, head_dim / 2]`, complex128; columns for time, height, width.

    The temporal base is 1e4, the spatial base 100: on a 4x6 grid more frequencies are of use.
    """
    pairs = config.dim // config.heads // 2
    space = pairs // 3
    parts = []
    for count, base in ((pairs - 2 * space, 1e4), (space, 100.0), (space, 100.0)):
        rates = base ** (-torch.arange(count, dtype=torch.float64) / count)
        angles = torch.outer(torch.arange(config.rope_rows, dtype=torch.float64), rates)
        parts.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(parts, 1)


def grid_phases(freqs: Tensor, grid: tuple[int, int, int], start: int) -> Tensor:
    """Phases `[F·h·w, head_dim / 2]` of the tokens of frames `start .. start + F - 1`."""
    frames, height, width = grid
    if start + frames > freqs.shape[0]:
        raise ValueError(
            f"frame {start + frames - 1} is past the RoPE table of {freqs.shape[0]} frames: "
            "make the model with a larger rope_rows"
        )
    space = freqs.shape[1] // 3
    time, down, across = torch.split(freqs, [freqs.shape[1] - 2 * space, space, space], 1)
    phases = [
        time[start : start + frames, None, None].expand(frames, height, width, -1),
        down[None, :height, None].expand(frames, height, width, -1),
        across[None, None, :width].expand(frames, height, width, -1),
    ]
    return torch.cat(phases, -1).flatten(0, 2)


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    """Rotate interleaved pairs of `[B, L, H, D]` by `[L, D / 2]` in float64; dtype is kept."""
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * phases[:, None]).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over `[B, H, L, D]`."""
    return functional.scaled_dot_product_attention(q, k, v)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, with a gain."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., C]` in float32; dtype is kept."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class DemoCausalSelfAttention(nn.Module):
    """Chunk-causal self-attention with Self Forcing's cache; see `forward`.

    Attributes:
        local_attn_size: frames that are cached and attended, -1 for all.
        sink_size: first frames that are never evicted.
        max_attention_size: the former in tokens.
    """

    def __init__(self, config: DemoConfig, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.num_heads, self.eps = config.dim, config.heads, eps
        self.head_dim = config.dim // config.heads
        self.num_frame_per_block = config.chunk
        self.sink_size = 0
        self.set_window(config.window, config)
        self.q, self.k, self.v, self.o = (nn.Linear(self.dim, self.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(self.dim, eps), RMSNorm(self.dim, eps)

    def set_window(self, frames: int, config: DemoConfig) -> None:
        """Attend the last `frames` frames; -1: as many as the RoPE table has."""
        self.local_attn_size = frames
        reach = config.rope_rows if frames == -1 else frames
        self.max_attention_size = reach * config.tokens_per_frame

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: Tensor | None,
        kv_cache: Cache | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
    ) -> Tensor:
        """Attend from `x` to itself and the past.

        Args:
            x: tokens `[B, L, C]`, frame-major.
            seq_lens: `[B]` long, tokens of each row; unused.
            grid_sizes: `[B, 3]` long on the CPU: frames, height, width.
            freqs: complex128 phases, see `rope_table`.
            block_mask: unused; without a cache attention is chunk-causal by itself.
            kv_cache: `{"k", "v"}` of `[B, tokens, H, D]` and one-element long tensors
                `{"global_end_index", "local_end_index"}`, changed in place. None: `x` is a
                whole video, and every chunk attends to itself and those before it.
            current_start: absolute index of the first token.
            cache_start: unused.

        Returns:
            `[B, L, C]`.
        """
        frames, height, width = (int(size) for size in grid_sizes[0])
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        q = self.norm_q(self.q(x)).view(shape)
        k = self.norm_k(self.k(x)).view(shape)
        v = self.v(x).view(shape)
        start = current_start // (height * width)
        phases = grid_phases(freqs, (frames, height, width), start)
        q, k = rotate(q, phases).type_as(v), rotate(k, phases).type_as(v)
        if kv_cache is None:
            out = self._by_chunk(q, k, v, height * width)
        else:
            sink_tokens = self.sink_size * height * width
            keys, values = self._append(kv_cache, k, v, current_start, sink_tokens)
            out = attend(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
            out = out.transpose(1, 2)
        projected: Tensor = self.o(out.flatten(2))
        return projected

    def _append(
        self, cache: Cache, k: Tensor, v: Tensor, start: int, sink_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens `[B, L, H, D]` to the cache, evicting if needed; returns what is attended to."""
        num_new, size = k.shape[1], cache["k"].shape[1]
        end = start + num_new
        global_end, local_end = int(cache["global_end_index"]), int(cache["local_end_index"])
        evicted = 0
        if self.local_attn_size != -1 and end > global_end and num_new + local_end > size:
            evicted = num_new + local_end - size
            kept = local_end - evicted - sink_tokens
            for name in ("k", "v"):
                rows = cache[name]
                source = rows[:, sink_tokens + evicted : sink_tokens + evicted + kept]
                rows[:, sink_tokens : sink_tokens + kept] = source.clone()
        local_end += end - global_end - evicted
        if local_end > size or local_end < num_new:
            raise ValueError(
                f"tokens {start}..{end - 1} would end at slot {local_end} of a cache of {size}: "
                "use a larger cache, set local_attn_size, or reset the end indices for a new video"
            )
        cache["k"][:, local_end - num_new : local_end] = k
        cache["v"][:, local_end - num_new : local_end] = v
        cache["global_end_index"].fill_(end)
        cache["local_end_index"].fill_(local_end)
        seen = slice(max(0, local_end - self.max_attention_size), local_end)
        return cache["k"][:, seen], cache["v"][:, seen]

    def _by_chunk(self, q: Tensor, k: Tensor, v: Tensor, tokens_per_frame: int) -> Tensor:
        """Chunk-causal attention of a whole video, `[B, L, H, D]`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        size = self.num_frame_per_block * tokens_per_frame
        ends = range(size, q.shape[2] + 1, size)
        outs = [attend(q[:, :, end - size : end], k[:, :, :end], v[:, :, :end]) for end in ends]
        return torch.cat(outs, 2).transpose(1, 2)


class DemoCrossAttention(nn.Module):
    """Attention from video tokens to the words of their chunk's prompt."""

    def __init__(self, config: DemoConfig, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, eps), RMSNorm(config.dim, eps)

    def forward(self, x: Tensor, context: Tensor, cache: CrossCache | None = None) -> Tensor:
        """Attend from tokens to words.

        Args:
            x: `[B, L, C]`.
            context: `[B·n, W, C]`, one prompt for each n-th of the tokens.
            cache: `{"k", "v", "is_init"}`; the words are projected when `is_init` is false.
        """
        prompts = context.shape[0] // x.shape[0]
        split = rearrange(x, "b (n l) c -> (b n) l c", n=prompts)
        q = rearrange(self.norm_q(self.q(split)), "b l (h d) -> b h l d", h=self.num_heads)
        if cache is None or not cache["is_init"]:
            shape = (*context.shape[:2], self.num_heads, -1)
            k, v = self.norm_k(self.k(context)).view(shape), self.v(context).view(shape)
            if cache is not None:
                cache.update(k=k, v=v, is_init=True)
        else:
            k, v = cast(Tensor, cache["k"]), cast(Tensor, cache["v"])
        out = attend(q, k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
        projected: Tensor = self.o(out)
        return projected.view_as(x)
