"""The demo model: a small causal video DiT with Self Forcing's calling convention.

It works on the latents of `autoencoder.py`. The pipeline owns the per-layer cache dicts and calls the model
chunk by chunk. The model predicts the clean latents. Every token is told which part of the town it shows:
that follows from the camera's words in the prompt, as a ray does from a camera's pose.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from headforcing.demo.model.attention import (
    Cache,
    CrossCache,
    DemoCausalSelfAttention,
    DemoConfig,
    DemoCrossAttention,
    rope_table,
)
from headforcing.demo.world.camera import CELL, PAN
from headforcing.demo.world.words import MOTIONS, POSES, PROMPT_WORDS, WORD_ID, WORDS

TIME_FEATURES = 64
PLACE_RATES = 20
PLACE_PERIOD = 256
"""Pixels after which the features of a place repeat; more than the town is wide."""


class Layout(NamedTuple):
    """The layout of the tokens of a call, as Wan's attention expects it."""

    seq_lens: Tensor  # [B], on the CPU
    grid_sizes: Tensor  # [B, 3], on the CPU
    freqs: Tensor  # [rows, D / 2]


class DemoBlock(nn.Module):
    """Self-attention, cross-attention and MLP; AdaLN-single modulation per frame."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.dim * config.mlp_ratio
        self.self_attn = DemoCausalSelfAttention(config)
        self.cross_attn = DemoCrossAttention(config)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Parameter(torch.zeros(6, dim))

    def forward(
        self,
        x: Tensor,
        shifts: Tensor,
        layout: Layout,
        context: Tensor,
        kv_cache: Cache | None,
        crossattn_cache: CrossCache | None,
        current_start: int,
    ) -> Tensor:
        """One block on `[B, L, C]`; `shifts` is `[B, F, 6, C]`."""
        by_frame = (*shifts.shape[:2], -1, x.shape[2])
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            (shifts + self.modulation).to(x.dtype)[:, :, :, None].unbind(2)
        )  # 6 x [B, F, 1, C]
        h = (_norm(x).view(by_frame) * (1 + scale) + shift).view_as(x)
        h = self.self_attn(h, *layout, None, kv_cache, current_start, None)
        x = x + (h.view(by_frame) * gate).view_as(x)
        x = x + self.cross_attn(_norm(x), context, crossattn_cache)
        h = (_norm(x).view(by_frame) * (1 + scale_mlp) + shift_mlp).view_as(x)
        out: Tensor = x + (self.ffn(h).view(by_frame) * gate_mlp).view_as(x)
        return out


def _norm(x: Tensor) -> Tensor:
    """Layer norm of `[..., C]` without parameters."""
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class DemoModel(nn.Module):
    """Causal video DiT; `local_attn_size` is the number of attended frames (-1: all)."""

    def __init__(self, config: DemoConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DemoConfig()
        self.num_frame_per_block = config.chunk
        dim = config.dim
        self.patch_embedding = nn.Linear(config.channels, dim)
        self.position_embedding = nn.Parameter(torch.zeros(config.tokens_per_frame, dim))
        self.place_embedding = nn.Linear(2 * PLACE_RATES, dim)
        self.text_embedding = nn.Embedding(len(WORDS), dim)
        self.text_position = nn.Parameter(torch.zeros(PROMPT_WORDS, dim))
        self.text_summary = nn.Linear(dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(TIME_FEATURES, dim), nn.SiLU())
        self.time_projection = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(DemoBlock(config) for _ in range(config.layers))
        self.head = nn.Linear(dim, config.channels)
        self.freqs = rope_table(config)

    def randomize(self, generator: torch.Generator) -> DemoModel:
        """Redraw every weight, so that an untrained model depends on all of its inputs."""
        for parameter in self.parameters():
            std = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            noise = torch.randn(parameter.shape, generator=generator) * std
            gain = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.data.copy_(noise + gain)
        return self

    def _blocks(self) -> list[DemoBlock]:
        return [block for block in self.blocks if isinstance(block, DemoBlock)]

    @property
    def local_attn_size(self) -> int:
        """Attended frames, current chunk included; -1: all. Setting it sets every attention module."""
        return self._blocks()[0].self_attn.local_attn_size

    @local_attn_size.setter
    def local_attn_size(self, frames: int) -> None:
        for block in self._blocks():
            block.self_attn.set_window(frames, self.config)

    @property
    def sink_size(self) -> int:
        """First frames that are never evicted. Setting it sets every attention module."""
        return self._blocks()[0].self_attn.sink_size

    @sink_size.setter
    def sink_size(self, frames: int) -> None:
        for block in self._blocks():
            block.self_attn.sink_size = frames

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        kv_cache: Sequence[Cache] | None = None,
        crossattn_cache: Sequence[CrossCache] | None = None,
        current_start: int = 0,
    ) -> Tensor:
        """Predict the clean latents.

        Args:
            x: noisy latents `[B, 48, F, 4, 6]`.
            t: noise levels in [0, 1], `[B]` or `[B, F]`; 0 is clean, 1 is noise.
            context: word ids `[B, W]`, or `[B, chunks, W]` with one prompt per chunk of `x`.
            kv_cache: one dict per layer, changed in place (`DemoCausalSelfAttention.forward`).
                None: chunk-causal attention within `x`.
            crossattn_cache: one dict per layer; set `is_init` to False when the prompt changes.
            current_start: absolute index of the first token of `x`.

        Returns:
            `[B, 48, F, 4, 6]`.
        """
        frames = x.shape[2]
        levels = t[:, None].expand(-1, frames) if t.ndim == 1 else t
        prompts = context if context.ndim == 3 else context[:, None]
        tokens = self._embed(x, prompts)
        shifts, words = self._condition(levels, prompts)
        grid_sizes = torch.tensor([[frames, *self.config.grid]]).expand(tokens.shape[0], -1)
        seq_lens = torch.full((tokens.shape[0],), tokens.shape[1])
        if self.freqs.device != tokens.device:
            self.freqs = self.freqs.to(tokens.device)
        layout = Layout(seq_lens, grid_sizes, self.freqs)
        for index, block in enumerate(self.blocks):
            tokens = block(
                tokens,
                shifts,
                layout,
                words,
                None if kv_cache is None else kv_cache[index],
                None if crossattn_cache is None else crossattn_cache[index],
                current_start,
            )
        return self._latents(tokens)

    def _embed(self, x: Tensor, prompts: Tensor) -> Tensor:
        """Tokens `[B, F·P, C]` of latents `[B, 48, F, 4, 6]` and prompts `[B, n, W]`."""
        tokens: Tensor = self.patch_embedding(rearrange(x, "b c f h w -> b f h w c"))
        height, width = self.config.grid
        places = _places(prompts, x.shape[2] // prompts.shape[1], width).to(tokens.dtype)
        tokens = tokens + self.place_embedding(places)[:, :, None]
        position = self.position_embedding.to(tokens.dtype).view(height, width, -1)
        return (tokens + position).flatten(1, 3)

    def _latents(self, tokens: Tensor) -> Tensor:
        """Latents `[B, 48, F, 4, 6]` of tokens `[B, F·P, C]`."""
        height, width = self.config.grid
        latents: Tensor = rearrange(
            self.head(_norm(tokens)), "b (f h w) c -> b c f h w", **{"h": height, "w": width}
        )
        return latents

    def _condition(self, levels: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Modulation `[B, F, 6, C]` and words `[B·n, W, C]` of levels `[B, F]` and prompts `[B, n, W]`."""
        words = self.text_embedding(prompts) + self.text_position
        summary = self.text_summary(words.sum(2))
        summary = summary.repeat_interleave(levels.shape[1] // summary.shape[1], 1)
        hidden = self.time_embedding(_time_features(levels).to(summary.dtype)) + summary
        shifts = rearrange(self.time_projection(hidden), "b f (six c) -> b f six c", six=6)
        return shifts, words.flatten(0, 1)

    def save_weights(self, path: str | Path) -> None:
        """Write the weights as fp16 safetensors, with the configuration in the metadata."""
        state = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(state, path, metadata={"config": json.dumps(asdict(self.config))})

    def load_weights(self, path: str | Path) -> DemoModel:
        """Read what `save_weights` wrote; the configurations must be equal."""
        with safe_open(path, framework="pt") as file:
            config = DemoConfig(**json.loads(file.metadata()["config"]))
            config = replace(config, grid=(config.grid[0], config.grid[1]))
            if config != self.config:
                raise ValueError(f"{path} has {config}, this model is {self.config}")
            names = list(file.keys())
            self.load_state_dict({name: file.get_tensor(name) for name in names})
        return self


def _time_features(levels: Tensor) -> Tensor:
    """Sines and cosines `[..., TIME_FEATURES]` of noise levels in [0, 1]."""
    half = TIME_FEATURES // 2
    rates = 100 * torch.exp(-math.log(1000.0) * torch.arange(half, device=levels.device) / half)
    angles = levels.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def _places(prompts: Tensor, frames: int, width: int) -> Tensor:
    """Features `[B, n · frames, width, 2 · PLACE_RATES]` of the town's columns that tokens show."""
    pose, motion = prompts[..., -2] - WORD_ID[POSES[0]], prompts[..., -1] - WORD_ID[MOTIONS[1]]
    time, across = (torch.arange(size, device=prompts.device) for size in (frames, width))
    column = (CELL * pose[..., None] + PAN * motion[..., None] * time).flatten(1)[..., None] + CELL * across
    rates = torch.arange(1, PLACE_RATES + 1, device=prompts.device) * (2 * math.pi / PLACE_PERIOD)
    angles = column[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def demo_model(device: torch.device | str = "cpu") -> DemoModel:
    """The trained demo model, from the weights inside the package."""
    weights = resources.files("headforcing.demo") / "weights.safetensors"
    with resources.as_file(weights) as path:
        return DemoModel().load_weights(path).to(device).eval().requires_grad_(False)
