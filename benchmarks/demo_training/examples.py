"""What the demo model is trained on: noise schedules, corrupted context, self-generated context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as functional
from torch import Tensor

from headforcing.demo.model.attention import DemoConfig
from headforcing.demo.world.camera import VIEW
from headforcing.demo.world.scene import render, sample_scene


@dataclass(frozen=True)
class Stage:
    """What differs between base training and finetuning.

    Attributes:
        lr: peak rate of Muon; AdamW gets 0.7 of it.
        hold: share of the steps before the cosine decay.
        ema: decay of the weight average.
        noise_shift: mean of the logit of the noise level.
        pure_noise: share of chunks at t = 1.
    """

    name: str
    lr: float
    warmup: int
    hold: float
    ema: float
    noise_shift: float
    pure_noise: float

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at a step: warm up, hold, cosine."""
        done = max(step / steps - self.hold, 0.0) / (1 - self.hold)
        return self.lr * min(1.0, (step + 1) / self.warmup) * max(0.5 * (1 + math.cos(math.pi * done)), 0.02)


BASE = Stage("base", 3e-3, 60, 0.3, 0.998, 0.4, 0.2)
FINETUNE = Stage("finetune", 1e-3, 20, 0.0, 0.99, 0.6, 0.3)


@dataclass(frozen=True)
class Example:
    """One batch.

    Attributes:
        video: `[B, 3, F, 24, 24]`.
        prompts: word ids `[B, chunks, W]`.
        context: the past that the model is given, shaped like `video`.
        seen: `[B, 1, F, 1, 24]` bool, columns that an earlier chunk showed.
    """

    video: Tensor
    prompts: Tensor
    context: Tensor
    seen: Tensor


class Sampler:
    """Videos, corruption and noise, all from one seed.

    Scenes are drawn on the CPU and everything per pixel on the device.
    """

    def __init__(self, batch: int, seed: int, device: torch.device, config: DemoConfig) -> None:
        self.batch, self.device, self.config = batch, device, config
        self.chunks = config.window // config.chunk
        self.scenes = torch.Generator().manual_seed(seed)
        self.pixels = torch.Generator(device).manual_seed(seed + 1)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) on the device."""
        return torch.rand(*shape, generator=self.pixels, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers on the device."""
        return torch.randn(*shape, generator=self.pixels, device=self.device)

    def videos(self) -> Example:
        """Fresh videos whose context is still the videos themselves."""
        scene = sample_scene(self.batch, self.scenes, num_chunks=self.chunks).to(self.device)
        frames = torch.arange(self.config.window, device=self.device)
        video, prompts = render(scene, frames).video, scene.prompts(frames[: self.chunks])
        seen = scene.camera.seen(self.chunks)[:, None, :, None]
        return Example(video, prompts, video, seen)

    def levels(self, stage: Stage) -> Tensor:
        """Noise levels per chunk, `[B, chunks]` in [0.02, 1]."""
        size = (self.batch, self.chunks)
        level = torch.sigmoid(self.normal(*size) * 1.2 + stage.noise_shift)
        return torch.where(self.uniform(*size) < stage.pure_noise, 1.0, level).clamp(0.02, 1)

    def corrupt(self, video: Tensor) -> Tensor:
        """Drift as long rollouts do: gain, bias, a smooth field, blur and noise.

        The strength grows with the chunk index and the first chunk is mostly left alone, so that
        looking back at it pays off. The model is not told the strength.
        """
        batch, chunks = self.batch, self.chunks
        slope = torch.linspace(0.3, 1, chunks, device=self.device)
        drifts = (self.uniform(batch, 1) < 0.8) * self.uniform(batch, 1)
        strength = slope * drifts + 0.25 * self.uniform(batch, chunks)
        strength[:, 0] *= self.uniform(batch) < 0.25
        strength *= self.uniform(batch, 1) < 0.95
        scale = strength.repeat_interleave(self.config.chunk, 1)[:, None, :, None, None]
        gain = 1 + 0.25 * self.normal(batch, 3, 1, 1, 1) * scale
        bias = 0.2 * self.normal(batch, 3, 1, 1, 1) * scale
        field = functional.interpolate(
            self.normal(batch, 3, 5, 5), size=(VIEW, VIEW), mode="bilinear", align_corners=True
        )
        noise = self.normal(*video.shape) * self.uniform(batch, 1, 1, 1, 1)
        frames = video.transpose(1, 2).flatten(0, 1)
        padded = functional.pad(frames, (1, 1, 1, 1), mode="replicate")
        blurred = functional.avg_pool2d(padded, 3, 1).view(batch, -1, *video[0, :, 0].shape)
        blurred = blurred.transpose(1, 2)
        mix = scale * self.uniform(batch, 1, 1, 1, 1)
        drifted = (video + mix * (blurred - video)) * gain + bias
        drifted = drifted + 0.25 * scale * field[:, :, None] + 0.12 * scale * noise
        return drifted.clamp(-1.3, 1.3)


Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def regenerate(predict: Predict, example: Example, sampler: Sampler) -> Tensor:
    """The video as the model itself would continue it, `[B, 3, F, 24, 24]`; chunk 0 stays real.

    All chunks are regenerated at once (two Euler steps) from the previous round's context, one to
    three times: errors add up over as many chunks while sprites stay on their true paths. Columns
    that the camera shows for the first time stay real too, else later chunks would be asked for a
    texture that their context contradicts.
    """
    video, chunk = example.video, sampler.config.chunk
    context = sampler.corrupt(video) if float(sampler.uniform(1)) < 0.3 else video
    levels = torch.ones(video.shape[0], video.shape[2], device=video.device)
    for _ in range(1 + int(3 * float(sampler.uniform(1)))):
        sample = sampler.normal(*video.shape)
        for level, target in ((1.0, 0.6), (0.6, 0.0)):
            made = predict(context, sample, levels * level, example.prompts)
            clean = made.float().clamp(-1.2, 1.2)
            sample = clean + target / level * (sample - clean)
        sample = torch.where(example.seen, sample, video)
        context = torch.cat([video[:, :, :chunk], sample[:, :, chunk:]], 2)
    return context


def base_examples(sampler: Sampler) -> Iterator[Example]:
    """Fresh videos with corrupted context, without end."""
    while True:
        example = sampler.videos()
        yield replace(example, context=sampler.corrupt(example.video))


def finetune_examples(sampler: Sampler, predict: Predict) -> Iterator[Example]:
    """Self-generated context for 70 % of the videos; each regeneration is used about four times."""
    pool: list[Example] = []
    step = 0
    while True:
        if len(pool) < 4 or step % 4 == 0:
            fresh = sampler.videos()
            pool = [*pool[-3:], replace(fresh, context=regenerate(predict, fresh, sampler))]
        pick = pool[int(len(pool) * float(sampler.uniform(1)))]
        own = sampler.uniform(sampler.batch, 1, 1, 1, 1) < 0.7
        yield replace(pick, context=torch.where(own, pick.context, sampler.corrupt(pick.video)))
        step += 1
