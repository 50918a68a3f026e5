"""A model small enough for a CPU, with weights that let every part of it show in the output."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .scenarios import HEADS, LAYERS

HEAD_DIM = 32
CHANNELS = 16
LATENT = (8, 12)
TOKENS_PER_FRAME = 24
GLOBAL_FRAMES = 21
INDICES = ("global_end_index", "local_end_index")
TEXT_LENGTH = 16
TEXT_DIM = 24
WEIGHT_SEED = 1234
NOISE_SEED = 7


def build_model(model_class: Callable[..., nn.Module], window: int, **memory: Any) -> nn.Module:
    """Build the repository's own causal model in the tiny size, with what it is told of its memory."""
    model = model_class(
        dim=HEADS * HEAD_DIM,
        ffn_dim=192,
        freq_dim=64,
        num_heads=HEADS,
        num_layers=LAYERS,
        in_dim=CHANNELS,
        out_dim=CHANNELS,
        text_len=TEXT_LENGTH,
        text_dim=TEXT_DIM,
        **memory,
    )
    module: Any
    for module in model.modules():
        if hasattr(module, "max_attention_size"):
            module.max_attention_size = capacity(window) * TOKENS_PER_FRAME
        if hasattr(module, "block_length"):
            module.frame_length, module.block_length = TOKENS_PER_FRAME, 3 * TOKENS_PER_FRAME
    return model


def capacity(window: int) -> int:
    """Return the frames that the cache of a window holds."""
    return GLOBAL_FRAMES if window == -1 else window


def seeded_weights(model: nn.Module) -> dict[str, Tensor]:
    """Draw every weight anew; as initialised, the model would output only a bias."""
    generator = torch.Generator().manual_seed(WEIGHT_SEED)
    return {name: _draw(name, tensor.shape, generator) for name, tensor in model.state_dict().items()}


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith(("modulation", "scale_shift_table")):
        return 0.5 * values
    if len(shape) > 1:
        return values / math.sqrt(shape[1:].numel())
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * values
    return 0.02 * values


def noise(batch: int, frames: int, dtype: torch.dtype, seed: int = NOISE_SEED) -> Tensor:
    """Draw the latents that a video starts from, `[B, F, C, h, w]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, CHANNELS, *LATENT, generator=generator).to(dtype)


def kv_caches(window: int, batch: int, dtype: torch.dtype, counted: bool = True) -> list[dict[str, Any]]:
    """Allocate one self-attention cache per layer, as the pipelines do; CausVid does not count."""
    shape = (batch, capacity(window) * TOKENS_PER_FRAME, HEADS, HEAD_DIM)
    return [
        {
            "k": torch.zeros(shape, dtype=dtype),
            "v": torch.zeros(shape, dtype=dtype),
            **{name: torch.tensor([0], dtype=torch.long) for name in INDICES if counted},
        }
        for _ in range(LAYERS)
    ]


def text_caches(batch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Allocate one cross-attention cache per layer, as the pipelines do."""
    shape = (batch, TEXT_LENGTH, HEADS, HEAD_DIM)
    return [
        {
            "k": torch.zeros(shape, dtype=dtype),
            "v": torch.zeros(shape, dtype=dtype),
            "is_init": False,
        }
        for _ in range(LAYERS)
    ]


class TextEncoder(nn.Module):
    """Gives every prompt an embedding of its own, the same in every process."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, text_prompts: list[str]) -> dict[str, Tensor]:
        """Embed the prompts, `[B, tokens, features]`."""
        return {"prompt_embeds": torch.stack([self._embed(prompt) for prompt in text_prompts])}

    def _embed(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        return torch.randn(TEXT_LENGTH, TEXT_DIM, generator=generator).to(self.scale.dtype)


class Decoder(nn.Module):
    """Stands in for the VAE; the tests compare latents."""

    def decode_to_pixel(self, latent: Tensor, use_cache: bool = False) -> Tensor:
        """Return the latents as they are."""
        del use_cache
        return latent

    decode_to_pixel_chunk = decode_to_pixel
