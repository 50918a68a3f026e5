"""Trains the autoencoder of the demo.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.demo_training.autoencoder --out runs/autoencoder

`--decoder` trains the decoder alone, on frozen latents, from the weights of an earlier run.
"""

from __future__ import annotations

import argparse
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from headforcing.demo.model.autoencoder import Autoencoder
from headforcing.demo.world.camera import CHUNK
from headforcing.demo.world.scene import render, sample_scene

from .training import Training

FRAMES, VIDEOS, CHUNKS = 32, 4, 7
REUSED = 4
"""Steps that share a lot of rendered videos."""
LOTS = 8
"""Lots that a step picks its frames from."""
NOISE = 0.12
"""Most noise in the latents, of deviation 1: what a generator leaves."""
MOVING = 4.0
"""Weight of the pixels of what moves: they are few, small, and can be anywhere."""
SETTLE = 0.05
"""Share of a batch in the running mean and deviation of the latents."""


class Frames:
    """Rendered frames by step, the same whenever a step is repeated."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._lot = functools.lru_cache(maxsize=LOTS + 1)(self._rendered)

    def _rendered(self, number: int) -> tuple[Tensor, Tensor]:
        scene = sample_scene(VIDEOS, self._training.draws(-1 - number), num_chunks=CHUNKS)
        rendering = render(scene, torch.arange(CHUNK * CHUNKS))
        return rendering.video.permute(0, 2, 3, 4, 1).flatten(0, 1), rendering.moving.any(2).flatten(0, 1)

    def batch(self, step: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Frames `[FRAMES, 48, 72, 3]` and the pixels of what moves, `[FRAMES, 48, 72]` bool."""
        newest = step // REUSED
        lots = [self._lot(number) for number in range(max(0, newest - LOTS + 1), newest + 1)]
        frames, moving = (torch.cat(parts) for parts in zip(*lots, strict=True))
        picked = torch.randint(len(frames), (FRAMES,), generator=draws)
        return frames[picked], moving[picked]


def loss(
    model: Autoencoder, frames: Tensor, moving: Tensor, draws: torch.Generator, frozen: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared and absolute error of pixels and of their differences, which are edges."""
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
        raw = model.raw(frames).float()
        if frozen:
            latents = (raw - model.mean) / model.std
        else:
            mean, std = raw.mean((0, 1, 2)), raw.std((0, 1, 2)) + 1e-4
            latents = (raw - mean) / std
            model.mean.lerp_(mean.detach(), SETTLE)
            model.std.lerp_(std.detach(), SETTLE)
        noise = torch.randn(latents.shape, generator=draws)
        strength = NOISE * torch.rand(len(latents), 1, 1, 1, generator=draws)
        painted = model.paint(latents + strength * noise).float()
    error = painted - frames
    across, down = error.diff(dim=2), error.diff(dim=1)
    edges = across.square().mean() + down.square().mean()
    weight = torch.where(moving, MOVING, 1.0)[..., None]
    total = (weight * (error.square() + 0.1 * error.abs())).mean() / weight.mean() + 0.3 * edges
    squared = error.detach().square().mean(-1)
    psnr = {
        name: -10 * torch.log10(squared[of].mean() / 4)
        for name, of in (("still", ~moving), ("moving", moving))
    }
    return total, psnr


def main() -> None:
    """Trains and writes `OUT/weights.safetensors`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoder"))
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--decoder", type=Path, help="weights whose encoder stays as it is")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    model = Autoencoder()
    for name, part in model.named_parameters():
        if name.endswith("out.weight"):
            torch.nn.init.zeros_(part)
    if given.decoder:
        model.load_weights(given.decoder)
        for part in model.encoder.parameters():
            part.requires_grad_(False)
    matrices = [
        name
        for name, part in model.named_parameters()
        if part.ndim == 2 and not name.startswith(("encoder.0", "pixels"))
    ]
    training = Training(
        model,
        matrices,
        given.out,
        steps=given.steps,
        rate=given.rate,
        hold=0.3,
        average=0.998,
        seed=given.seed,
    )
    frames = Frames(training)
    training.run(lambda step, draws: loss(model, *frames.batch(step, draws), draws, bool(given.decoder)))


if __name__ == "__main__":
    main()
