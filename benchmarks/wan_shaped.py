"""A transformer of the shapes of Wan2.1 with random weights, to measure: what it computes means nothing.

Written from its description (arXiv:2503.20314, arXiv:2506.08009): a causal video DiT with adaLN modulation
from the timestep, self-attention with norms over all channels and 3-D RoPE, cross-attention to 512 text
tokens whose keys and values are kept per video, and a tanh-GELU MLP. Self-attention, its RoPE and its rolled
cache are those of the demo model, which has Self Forcing's calling convention.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from headforcing.demo.model.attention import Cache, DemoCausalSelfAttention, DemoConfig, RMSNorm, rope_table

FREQUENCIES = 256
TEXT_TOKENS, TEXT_CHANNELS = 512, 4096
CHANNELS, PATCH = 16, 2


@dataclass(frozen=True)
class WanShape:
    """Sizes of the transformer.

    Attributes:
        dim: channels.
        layers: blocks of the whole model.
        heads: of a layer.
        hidden: channels inside of the MLP.
    """

    dim: int
    layers: int
    heads: int
    hidden: int


SHAPES = {
    "wan-1.3b": WanShape(1536, 30, 12, 8960),
    "wan-14b": WanShape(5120, 40, 40, 13824),
    "tiny": WanShape(96, 2, 12, 128),
}
"""Two that exist, and one to see that a benchmark runs."""


class CrossAttention(nn.Module):
    """Attention to text whose keys and values are known."""

    def __init__(self, shape: WanShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q, self.k, self.v, self.o = (nn.Linear(shape.dim, shape.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(shape.dim, 1e-6), RMSNorm(shape.dim, 1e-6)

    def project(self, text: Tensor) -> dict[str, Tensor]:
        """Keys and values `[B, H, W, D]` of text `[B, W, C]`, once per video."""
        k, v = self.norm_k(self.k(text)), self.v(text)
        return {name: rearrange(x, "b w (h d) -> b h w d", h=self.heads) for name, x in (("k", k), ("v", v))}

    def forward(self, x: Tensor, text: dict[str, Tensor]) -> Tensor:
        """`[B, L, C]`."""
        q = rearrange(self.norm_q(self.q(x)), "b l (h d) -> b h l d", h=self.heads)
        out = scaled_dot_product_attention(q, text["k"], text["v"])
        projected: Tensor = self.o(rearrange(out, "b h l d -> b l (h d)"))
        return projected


class Block(nn.Module):
    """Self-attention, cross-attention and MLP; shift, scale and gate by the timestep of every frame."""

    def __init__(self, shape: WanShape, config: DemoConfig) -> None:
        super().__init__()
        self.self_attn = DemoCausalSelfAttention(config)
        self.cross_attn = CrossAttention(shape)
        self.norm3 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.ffn = nn.Sequential(
            nn.Linear(shape.dim, shape.hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(shape.hidden, shape.dim),
        )
        self.modulation = nn.Parameter(torch.zeros(6, shape.dim))

    def forward(
        self,
        x: Tensor,
        times: Tensor,
        layout: Sequence[Tensor],
        text: dict[str, Tensor],
        kv_cache: Cache,
        current_start: int,
    ) -> Tensor:
        """One block on `[B, L, C]`; `times` is `[B, F, 6, C]`."""
        frames = (*times.shape[:2], -1, x.shape[2])
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (times + self.modulation)[:, :, :, None].unbind(
            2
        )
        h = (_norm(x).view(frames) * (1 + scale) + shift).view_as(x)
        h = self.self_attn(h, *layout, None, kv_cache, current_start, None)
        x = x + (h.view(frames) * gate).view_as(x)
        x = x + self.cross_attn(self.norm3(x), text)
        h = (_norm(x).view(frames) * (1 + scale_mlp) + shift_mlp).view_as(x)
        out: Tensor = x + (self.ffn(h).view(frames) * gate_mlp).view_as(x)
        return out


class WanShaped(nn.Module):
    """See the module.

    Args:
        shape: its sizes.
        layers: blocks that there are; the whole model has more.
        chunk: frames denoised together.
        window: frames attended by the dense side.
        tokens: of a frame.
    """

    def __init__(self, shape: WanShape, layers: int, chunk: int, window: int, tokens: int) -> None:
        super().__init__()
        config = DemoConfig(dim=shape.dim, layers=layers, heads=shape.heads, chunk=chunk, window=window)
        dim = shape.dim
        self.num_frame_per_block = chunk
        self.patch_embedding = nn.Linear(CHANNELS * PATCH**2, dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(TEXT_CHANNELS, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(shape, config) for _ in range(layers))
        self.head = nn.Linear(dim, CHANNELS * PATCH**2)
        for block in self.blocks:
            block.self_attn.max_attention_size = window * tokens
        self.config, self.freqs = config, torch.empty(0)

    def forward(
        self, x: Tensor, t: Tensor, text: Sequence[dict[str, Tensor]], kv_cache: Sequence[Cache], start: int
    ) -> Tensor:
        """One pass.

        Args:
            x: latent frames `[B, 16, F, 2h, 2w]`.
            t: timesteps, `[B, F]`.
            text: keys and values of the prompt, per block.
            kv_cache: a dict per block, as of Self Forcing.
            start: index of the first token.

        Returns:
            As `x`.
        """
        frames, height, width = x.shape[2], x.shape[3] // PATCH, x.shape[4] // PATCH
        sides = {"p": PATCH, "q": PATCH}
        tokens = self.patch_embedding(rearrange(x, "b c f (h p) (w q) -> b (f h w) (c p q)", **sides))
        times = self.time_projection(self.time_embedding(_waves(t).to(x.dtype))).unflatten(-1, (6, -1))
        layout = (
            torch.full((x.shape[0],), tokens.shape[1]),
            torch.tensor([[frames, height, width]]).expand(x.shape[0], -1),
            self.freqs,
        )
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, times, layout, text[number], kv_cache[number], start)
        sizes = {"f": frames, "h": height, "w": width, **sides}
        out: Tensor = rearrange(self.head(_norm(tokens)), "b (f h w) (c p q) -> b c f (h p) (w q)", **sizes)
        return out

    def project_text(self, text: Tensor) -> list[dict[str, Tensor]]:
        """Keys and values of a prompt `[B, 512, 4096]` in every block."""
        words = self.text_embedding(text)
        return [block.cross_attn.project(words) for block in self.blocks]

    def caches(self, batch: int, tokens: int) -> list[Cache]:
        """Empty caches of the window, as pipelines make them."""
        shape = (batch, tokens, self.config.heads, self.config.dim // self.config.heads)
        like = self.head.weight
        found = []
        for _ in self.blocks:
            cache = {name: torch.zeros(shape, dtype=like.dtype, device=like.device) for name in ("k", "v")}
            for name in ("global_end_index", "local_end_index"):
                cache[name] = torch.zeros(1, dtype=torch.long, device=like.device)
            found.append(cache)
        return found

    def twin(self) -> WanShaped:
        """Another model with the same weights, not copied."""
        return copy.deepcopy(self, {id(parameter): parameter for parameter in self.parameters()})


def random_model(shape: WanShape, layers: int, dtype: torch.dtype, device: str, **sizes: int) -> WanShaped:
    """The model with weights drawn where it is; `sizes` are those of `WanShaped`."""
    with torch.device("meta"):
        model = WanShaped(shape, layers, **sizes)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    model.freqs = rope_table(model.config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        elif name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)
    return model


def _norm(x: Tensor) -> Tensor:
    """Layer norm of `[..., C]` without parameters."""
    return layer_norm(x, x.shape[-1:], eps=1e-6)


def _waves(t: Tensor) -> Tensor:
    """Cosines and sines `[..., FREQUENCIES]` of timesteps."""
    half = FREQUENCIES // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / half)
    angles = t.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)
