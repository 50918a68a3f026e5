"""The autoencoder of the demo: a frame of 48 x 72 pixels is 4 x 6 latents of 48 channels, and back.

Every frame is coded by itself, so a video can be decoded chunk by chunk. All layers are linear maps of a
position and its neighbours, channels last.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as functional
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headforcing.demo.world.camera import CELL

CHANNELS = 48
"""Of a latent."""
PATCH = 4
"""Pixels along one side of what the finer layers see; the camera moves by as many per frame."""
FINE, COARSE = 96, 256
"""Channels per patch, and per latent."""


class Near(nn.Linear):
    """A linear map of a position and its eight neighbours, `[N, h, w, C] -> [N, h, w, D]`."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(9 * channels, out)

    def forward(self, x: Tensor) -> Tensor:
        """Beyond the border everything is 0."""
        height, width = x.shape[1:3]
        padded = functional.pad(x, (0, 0, 1, 1, 1, 1))
        around = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
        return super().forward(torch.cat(around, -1))


class Residual(nn.Module):
    """Adds what a position's neighbours say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.near = Near(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, h, w, C]`, the same shape."""
        normed = functional.rms_norm(x, x.shape[-1:])
        added: Tensor = x + self.out(functional.gelu(self.near(normed)))
        return added


class Autoencoder(nn.Module):
    """Latents have mean 0 and variance 1 over training videos, by the buffers `mean` and `std`."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        ratio = (CELL // PATCH) ** 2
        self.encoder = nn.ModuleList(
            [
                Near(3 * PATCH**2, FINE),
                nn.Linear(ratio * FINE, COARSE),
                Residual(COARSE),
                nn.Linear(COARSE, CHANNELS),
            ]
        )
        self.decoder = nn.ModuleList(
            [
                Near(CHANNELS, COARSE),
                Residual(COARSE),
                nn.Linear(COARSE, ratio * FINE),
                Residual(FINE),
                Residual(FINE),
            ]
        )
        self.pixels = nn.Linear(FINE, 3 * PATCH**2)
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("std", torch.ones(CHANNELS))

    def encode(self, video: Tensor) -> Tensor:
        """Latents `[B, 48, T, 4, 6]` of a video `[B, 3, T, 48, 72]` in [-1, 1]."""
        latents = (self.raw(rearrange(video, "b c t h w -> (b t) h w c")) - self.mean) / self.std
        return rearrange(latents, "(b t) h w c -> b c t h w", b=len(video))

    def decode(self, latents: Tensor) -> Tensor:
        """The video `[B, 3, T, 48, 72]` in [-1, 1] of latents `[B, 48, T, 4, 6]`."""
        video = self.paint(rearrange(latents, "b c t h w -> (b t) h w c")).clamp(-1, 1)
        return rearrange(video, "(b t) h w c -> b c t h w", b=len(latents))

    def raw(self, frames: Tensor) -> Tensor:
        """Latents `[N, 4, 6, 48]` of frames `[N, 48, 72, 3]`, not yet of variance 1."""
        fine, merge, think, out = self.encoder
        ratio = CELL // PATCH
        x = functional.gelu(fine(rearrange(frames, "n (h p) (w q) c -> n h w (p q c)", p=PATCH, q=PATCH)))
        x = think(functional.gelu(merge(rearrange(x, "n (h p) (w q) c -> n h w (p q c)", p=ratio, q=ratio))))
        latents: Tensor = out(functional.rms_norm(x, x.shape[-1:]))
        return latents

    def paint(self, latents: Tensor) -> Tensor:
        """Frames `[N, 48, 72, 3]` of latents `[N, 4, 6, 48]`, not yet in [-1, 1]."""
        near, think, split, *finer = self.decoder
        ratio = CELL // PATCH
        x = split(think(functional.gelu(near(latents))))
        x = rearrange(x, "n h w (p q c) -> n (h p) (w q) c", p=ratio, q=ratio)
        for layer in finer:
            x = layer(x)
        x = self.pixels(functional.rms_norm(x, x.shape[-1:]))
        frames: Tensor = rearrange(x, "n h w (p q c) -> n (h p) (w q) c", p=PATCH, q=PATCH)
        return frames

    def save_weights(self, path: str | Path) -> None:
        """Write the weights as fp16 safetensors."""
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, path)

    def load_weights(self, path: str | Path) -> Autoencoder:
        """Read what `save_weights` wrote."""
        self.load_state_dict({name: value.float() for name, value in load_file(path).items()}, assign=True)
        return self


def autoencoder(device: torch.device | str = "cpu") -> Autoencoder:
    """The trained autoencoder of the demo, from the weights inside the package; draws no random numbers."""
    with torch.device("meta"):
        empty = Autoencoder()
    weights = resources.files("headforcing.demo") / "autoencoder.safetensors"
    with resources.as_file(weights) as path:
        return empty.load_weights(path).to(device).eval().requires_grad_(False)
