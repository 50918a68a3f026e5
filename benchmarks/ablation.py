"""What a head's past is worth inside the trained range: the error of the model when it is cut.

Like the pruning table of Head Forcing (arXiv:2605.14487, p. 7), on the demo model: videos as in
training, drifted context, every chunk predicted from noise; the error is measured only on columns that
an earlier chunk showed, and again only on those that the last chunk did not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headforcing.apply import apply_head_forcing
from headforcing.demo.camera import CHUNK
from headforcing.demo.compare import returning_columns
from headforcing.demo.examples import Sampler
from headforcing.demo.model import DemoModel
from headforcing.demo.pipeline import DemoPipeline
from headforcing.demo.world import render, sample_scene
from headforcing.roles import Anchor, HeadRole, Local, SlidingWindow

VIDEOS = 24
SEED = 3000
LEVELS = (1.0, 0.857, 0.667)

CUTS: dict[str, HeadRole] = {
    "all history": Local(0, positions="absolute"),
    "all but the first frame": Anchor(1, positions="absolute"),
    "all but the last chunk": Local(CHUNK, positions="absolute"),
    "all but the first and the last chunk": Anchor(CHUNK, CHUNK, positions="absolute"),
    "the first chunk": Local(15, positions="absolute"),
}
"""What is taken away, and the role that is left."""


def pruning_table(model: DemoModel, labels: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Relative increase of the error when all heads of one label lose a part of their past.

    Returns:
        `{cut: {label: [increase on seen columns, increase on columns the last chunk hid]}}`, in percent.
    """
    videos = _Videos(model)
    whole = videos.errors({})
    table: dict[str, Any] = {}
    for cut, role in CUTS.items():
        table[cut] = {}
        for label in ("anchor", "local", "memory"):
            heads = [
                (layer, head)
                for layer, row in enumerate(labels)
                for head, name in enumerate(row)
                if name == label
            ]
            error = videos.errors(dict.fromkeys(heads, role))
            table[cut][label] = [round(100 * (x / y - 1), 2) for x, y in zip(error, whole, strict=True)]
    return table


def function_labels(model: DemoModel, least: float = 1.0) -> tuple[tuple[str, ...], ...]:
    """Labels by what a head needs, instead of where it looks: each head is cut alone.

    A head is `memory` if the error on columns that the last chunk hid grows by `least` percent when the
    head keeps only the first and the last chunk; of the others `anchor` if it does when the head keeps
    only the last chunk; else `local`. This rule is ours.
    """
    videos = _Videos(model)
    whole = videos.errors({})[1]

    def label(place: tuple[int, int]) -> str:
        for name, cut in (
            ("memory", "all but the first and the last chunk"),
            ("anchor", "all but the last chunk"),
        ):
            if 100 * (videos.errors({place: CUTS[cut]})[1] / whole - 1) > least:
                return name
        return "local"

    layers, heads = range(model.config.layers), range(model.config.heads)
    return tuple(tuple(label((layer, head)) for head in heads) for layer in layers)


class _Videos:
    """Videos with drifted context, and the error of the model on them."""

    def __init__(self, model: DemoModel) -> None:
        self.model, self.config = model, model.config
        sampler = Sampler(VIDEOS, SEED, torch.device("cpu"), model.config)
        chunks = sampler.chunks
        scene = sample_scene(VIDEOS, sampler.scenes, num_chunks=chunks)
        frames = torch.arange(model.config.window)
        self.prompts = scene.prompts(frames[:chunks])
        self.video = render(scene, frames).video
        self.context = sampler.corrupt(self.video)
        self.noise = sampler.normal(*self.video.shape)
        columns = scene.camera.seen(chunks), returning_columns(scene.camera, chunks, CHUNK)
        self.judged = [column[:, None, :, None].expand_as(self.video) for column in columns]

    def errors(self, cuts: Mapping[tuple[int, int], HeadRole]) -> list[float]:
        """Mean squared error on columns seen before, and on those that the last chunk did not show."""
        everything = SlidingWindow(self.config.window, positions="absolute")
        table = [
            [cuts.get((layer, head), everything) for head in range(self.config.heads)]
            for layer in range(self.config.layers)
        ]
        with apply_head_forcing(self.model, table), torch.no_grad():
            made = [self._predict(level) for level in LEVELS]
        errors = torch.stack([(one - self.video).square() for one in made]).mean(0)
        return [float(errors[judged].mean()) for judged in self.judged]

    def _predict(self, level: float) -> Tensor:
        """Every chunk from its noisy self and the drifted context before it, `[B, 3, F, 24, 24]`."""
        pipeline, made = _Forced(self.model), []
        pipeline.prepare(self.video.shape[0])
        noisy = (1 - level) * self.video + level * self.noise
        parts = zip(noisy.split(CHUNK, 2), self.context.split(CHUNK, 2), strict=True)
        for index, (sample, past) in enumerate(parts):
            made.append(pipeline.chunk(index, sample, level, self.prompts[:, index]))
            pipeline.chunk(index, past, 0.0, self.prompts[:, index])
        return torch.cat(made, 2)


class _Forced(DemoPipeline):
    """One pass of the model at a time, on context that is given."""

    def prepare(self, batch: int) -> None:
        """Begins a video."""
        self._prepare(batch, self.model.config.window // CHUNK)

    def chunk(self, index: int, sample: Tensor, level: float, prompt: Tensor) -> Tensor:
        """The prediction for one chunk; its keys and values are what the next chunk sees."""
        for cross in self.crossattn_cache:
            cross["is_init"] = False
        return self._predict(sample, level, prompt, index)
