"""Videos on which cutting a head of the demo model shows: drifted context, and slots that come back."""

from __future__ import annotations

import torch
from torch import Tensor

from headforcing.demo.model.model import DemoModel, demo_model
from headforcing.demo.model.pipeline import DemoPipeline
from headforcing.demo.model.threads import one_thread
from headforcing.demo.world.camera import CELL, CHUNK
from headforcing.demo.world.scene import render, sample_scene
from headforcing.measure.ablation import ablate_heads
from headforcing.measure.meter import Progress
from headforcing.measure.profile import HeadProfile
from headforcing.measure.profiler import Protocol
from headforcing.roles import Anchor, Local

from .transformer import corrupt

VIDEOS = 64
SEED = 3000
LEVELS = (1.0, 0.9, 0.75)
CUTS = (Local(CHUNK), Anchor(CHUNK, CHUNK))


@one_thread()
def ablate_demo(
    model: DemoModel | None = None,
    *,
    videos: int = VIDEOS,
    seed: int = SEED,
    progress: Progress | None = None,
) -> HeadProfile:
    """Ablates the demo model: one head at a time keeps the last chunk only, or the first and the last.

    The error is that of latents that were seen before but not in the last chunk: only they need a past.

    Args:
        model: the demo model; default: with the weights of the package.
        videos: how many; those where nothing returns say nothing.
        seed: of scenes, drift and noise.
        progress: see `ablate_heads`.
    """
    model = model or demo_model()
    held_out = HeldOut(model, videos, seed)
    return ablate_heads(
        model,
        lambda: held_out.errors()["returning"],
        CUTS,
        protocol=Protocol(seed=seed),
        base_model="headforcing demo",
        progress=progress,
    )


class HeldOut:
    """Videos as in training, camera moving: the drifted truth is the context, chunks are made from noise.

    Args:
        model: the demo model; may be head-forced while errors are taken.
        videos: how many.
        seed: of scenes, drift and noise.
    """

    def __init__(self, model: DemoModel, videos: int, seed: int) -> None:
        self.model, self.pipeline = model, _OnePass(model)
        draws = torch.Generator().manual_seed(seed)
        chunks = model.config.window // CHUNK
        scene = sample_scene(videos, draws, num_chunks=chunks, pan_share=1.0)
        frames = torch.arange(model.config.window)
        self.prompts = scene.prompts(frames[:chunks])
        with torch.no_grad():
            self.latents = self.pipeline.decoder.encode(render(scene, frames).video)
        self.context = corrupt(self.latents, draws)
        self.noise = torch.randn(self.latents.shape, generator=draws)
        self.judged = {
            name: scene.camera.returning(chunks, away).unflatten(-1, (-1, CELL)).all(-1)[:, None, :, None]
            for name, away in (("seen", 0), ("returning", CHUNK))
        }

    @torch.no_grad()
    def errors(self) -> dict[str, Tensor]:
        """Mean squared error per video, `[B]`, of latents `seen` before, and of `returning` ones.

        Returning latents were seen before, but not in the last chunk. NaN: the video has none.
        """
        made = [self._predict(level) for level in LEVELS]
        error = torch.stack([(one - self.latents).square() for one in made]).mean(0)
        return {
            name: error.where(judged, torch.nan).flatten(1).nanmean(1) for name, judged in self.judged.items()
        }

    def _predict(self, level: float) -> Tensor:
        """Every chunk from its noisy self and the drifted context before it, `[B, 48, F, 4, 6]`."""
        pipeline, made = self.pipeline, []
        pipeline.begin(len(self.latents))
        noisy = (1 - level) * self.latents + level * self.noise
        parts = zip(noisy.split(CHUNK, 2), self.context.split(CHUNK, 2), strict=True)
        for index, (sample, past) in enumerate(parts):
            made.append(pipeline.chunk(index, sample, level, self.prompts[:, index]))
            pipeline.chunk(index, past, 0.0, self.prompts[:, index])
        return torch.cat(made, 2)


class _OnePass(DemoPipeline):
    """One pass of the model at a time, on context that is given."""

    def begin(self, batch: int) -> None:
        """Begins a video."""
        self._prepare(batch, self.model.config.window // CHUNK)

    def chunk(self, index: int, sample: Tensor, level: float, prompt: Tensor) -> Tensor:
        """The prediction for one chunk; its keys and values are what the next chunk sees."""
        for cross in self.crossattn_cache:
            cross["is_init"] = False
        return self._predict(sample, level, prompt, index)
