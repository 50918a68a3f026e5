r"""Trains the video transformer of the demo on the latents of its autoencoder.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.demo_training.transformer \\
        --autoencoder runs/autoencoder/weights.safetensors --out runs/transformer

Flow matching with teacher forcing: some chunks of a video are predicted, each from its noisy self and the
clean chunks before it, and those are corrupted the way a long rollout drifts. With `--own` a part of the
videos gets a context that the model made itself.
"""

from __future__ import annotations

import argparse
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from headforcing.demo.model.autoencoder import Autoencoder
from headforcing.demo.model.model import DemoModel
from headforcing.demo.world.camera import CELL, CHUNK
from headforcing.demo.world.scene import render, sample_scene

from . import model as parts
from .model import init_weights, predict_chunks
from .training import Training

VIDEOS = 5
"""Of a step and a process."""
LOT, REUSED, LOTS = 8, 4, 32
"""Videos that are rendered at once; steps until the next ones; how many lots a step picks from."""
PREDICTED = 4
"""Chunks of a video that are predicted in one step."""
LIKELY = (0.6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.5)
"""How often each chunk is predicted."""
PURE_NOISE, SPREAD, CENTRE, LEAST = 0.25, 1.2, 0.4, 0.02
"""Share of chunks at t = 1, deviation and mean of the logit of the other noise levels, and the smallest."""
NEW, MOVING = 0.5, 2.0
"""Weights of tokens that show what was not seen before, and of those that show something that moves."""
DRIFTED = 0.85
"""Share of videos whose context is corrupted."""


@dataclass(frozen=True)
class Lot:
    """Encoded videos.

    Attributes:
        latents: `[B, 48, F, 4, 6]`.
        prompts: `[B, chunks, W]`.
        seen: `[B, F, 4, 6]` bool, tokens that an earlier chunk showed.
        moving: `[B, F, 4, 6]` bool, tokens with a part of what flies or drives.
    """

    latents: Tensor
    prompts: Tensor
    seen: Tensor
    moving: Tensor

    def pick(self, index: Tensor) -> Lot:
        """Some of its videos."""
        return Lot(*(part[index] for part in (self.latents, self.prompts, self.seen, self.moving)))


class Videos:
    """Encoded videos by step, the same whenever a step is repeated."""

    def __init__(self, training: Training, autoencoder: Autoencoder, chunks: int) -> None:
        self._training, self._autoencoder, self._chunks = training, autoencoder, chunks
        self._lot = functools.lru_cache(maxsize=LOTS + 1)(self._rendered)

    @torch.no_grad()
    def _rendered(self, number: int) -> Lot:
        scene = sample_scene(LOT, self._training.draws(-1 - number), num_chunks=self._chunks)
        rendering = render(scene, torch.arange(CHUNK * self._chunks))
        seen = scene.camera.returning(self._chunks).unflatten(-1, (-1, CELL)).all(-1)
        moving = functional.max_pool2d(rendering.moving.any(2).float(), CELL) > 0
        return Lot(
            self._autoencoder.encode(rendering.video),
            scene.prompts(torch.arange(self._chunks)),
            seen[:, :, None].expand_as(moving),
            moving,
        )

    def batch(self, step: int, draws: torch.Generator) -> Lot:
        """`VIDEOS` videos."""
        newest = LOTS + step // REUSED
        numbers = torch.randint(newest - LOTS + 1, newest + 1, (VIDEOS,), generator=draws)
        places = torch.randint(LOT, (VIDEOS,), generator=draws)
        picked = [self._lot(int(n)).pick(p[None]) for n, p in zip(numbers, places, strict=True)]
        names = ("latents", "prompts", "seen", "moving")
        return Lot(*(torch.cat([getattr(one, name) for one in picked]) for name in names))


def corrupt(latents: Tensor, draws: torch.Generator) -> Tensor:
    """Drift as long rollouts do: gain, bias and noise per channel, `[B, 48, F, 4, 6]`.

    The strength grows with the chunk index and the first chunk is mostly left alone. The model is not told.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draws)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws)

    batch, channels, frames = latents.shape[:3]
    chunks = frames // CHUNK
    strength = torch.linspace(0.2, 1, chunks) * uniform(batch, 1) * (uniform(batch, 1) < 0.7)
    strength = strength + 0.2 * uniform(batch, chunks)
    strength[:, 0] *= uniform(batch) < 0.3
    strength *= uniform(batch, 1) < DRIFTED
    scale = strength.repeat_interleave(CHUNK, 1)[:, None, :, None, None]
    noise = 0.4 * uniform(batch, 1, 1, 1, 1) * normal(*latents.shape)
    bias = 0.25 * normal(batch, channels, 1, 1, 1)
    return latents * (1 + 0.2 * scale * normal(batch, channels, 1, 1, 1)) + scale * (noise + bias)


def levels(count: int, draws: torch.Generator) -> Tensor:
    """Noise levels `[VIDEOS, count]` in [0.02, 1]."""
    size = (VIDEOS, count)
    drawn = torch.sigmoid(torch.randn(size, generator=draws) * SPREAD + CENTRE)
    pure = torch.rand(size, generator=draws) < PURE_NOISE
    return torch.where(pure, 1.0, drawn).clamp(LEAST, 1)


@torch.no_grad()
def regenerate(model: DemoModel, lot: Lot, context: Tensor, draws: torch.Generator) -> Tensor:
    """The video as the model itself would continue it, `[B, 48, F, 4, 6]`; chunk 0 stays real.

    All chunks are regenerated at once in two Euler steps from the context of the round before, one to three
    times. So errors add up over as many chunks, while what moves stays on its true path. Tokens that show
    something new stay real too, or later chunks would be asked for a town that their context contradicts.
    """
    video, chunks = lot.latents, lot.prompts.shape[1]
    later = list(range(1, chunks))
    ones = torch.ones(len(video), len(later))
    for _ in range(1 + int(torch.randint(3, (), generator=draws))):
        sample = torch.randn(video[:, :, CHUNK:].shape, generator=draws)
        for level, target in ((1.0, 0.6), (0.6, 0.0)):
            made = predict_chunks(model, context, sample, later, ones * level, lot.prompts)
            sample = made + target / level * (sample - made)
        known = torch.where(lot.seen[:, None, CHUNK:], sample, video[:, :, CHUNK:])
        context = torch.cat([video[:, :, :CHUNK], known], 2)
    return context


def loss(model: DemoModel, lot: Lot, draws: torch.Generator, own: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted squared error of predicted latents."""
    likely = torch.tensor(LIKELY)
    which = torch.multinomial(likely, PREDICTED, generator=draws).sort().values.tolist()
    context = corrupt(lot.latents, draws)
    if float(torch.rand((), generator=draws)) < own:
        context = regenerate(model, lot, context, draws)

    def chosen(x: Tensor, dim: int) -> Tensor:
        return torch.cat([x.narrow(dim, CHUNK * chunk, CHUNK) for chunk in which], dim)

    clean, t = chosen(lot.latents, 2), levels(PREDICTED, draws)
    mix = t.repeat_interleave(CHUNK, 1)[:, None, :, None, None]
    noisy = (1 - mix) * clean + mix * torch.randn(clean.shape, generator=draws)
    made = predict_chunks(model, context, noisy, which, t, lot.prompts)
    error = (made - clean).square().mean(1)  # [B, F, 4, 6]
    seen, moving, level = chosen(lot.seen, 1), chosen(lot.moving, 1), mix[:, 0]
    weight = torch.where(seen, 1.0, NEW) * torch.where(moving, MOVING, 1.0)
    total = (error * weight / level.clamp(min=0.25)).sum() / weight.sum()
    with torch.no_grad():
        high, middle = (level > 0.9).expand_as(error), ((level > 0.3) & (level < 0.6)).expand_as(error)
        report = {
            "seen_high": error[seen & high].mean(),
            "seen_middle": error[seen & middle].mean(),
            "new_high": error[~seen & high].mean(),
            "new_middle": error[~seen & middle].mean(),
            "moving_high": error[seen & moving & high].mean(),
        }
    return total, report


def main() -> None:
    """Trains and writes `OUT/weights.safetensors`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--autoencoder", type=Path, required=True, help="its trained weights")
    parser.add_argument("--out", type=Path, default=Path("runs/transformer"))
    parser.add_argument("--init", type=Path, help="start from these weights")
    parser.add_argument("--steps", type=int, default=3300)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--hold", type=float, default=0.4, help="share of the steps before the rate falls")
    parser.add_argument("--own", type=float, default=0.0, help="share of steps on self-made context")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="a quarter faster, after some minutes")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if given.compile:
        for name in ("_project", "_rest"):
            setattr(parts, name, torch.compile(getattr(parts, name), dynamic=False))
    model = DemoModel()
    init_weights(model, torch.Generator().manual_seed(given.seed))
    if given.init:
        model.load_weights(given.init)
    matrices = [
        name
        for name, part in model.named_parameters()
        if name.startswith("blocks.") and name.endswith(".weight") and part.ndim == 2
    ]
    training = Training(
        model,
        matrices,
        given.out,
        steps=given.steps,
        rate=given.rate,
        hold=given.hold,
        average=0.998,
        seed=given.seed,
    )
    autoencoder = Autoencoder().load_weights(given.autoencoder).eval()
    videos = Videos(training, autoencoder, model.config.window // model.config.chunk)
    training.run(lambda step, draws: loss(model, videos.batch(step, draws), draws, given.own))


if __name__ == "__main__":
    main()
