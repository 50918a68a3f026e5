"""Profiles of the demo model, inside the trained range and far beyond it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headforcing.demo.contest.compare import GIVEN_CHUNKS, make_scene
from headforcing.demo.model.model import DemoModel, demo_model
from headforcing.demo.model.pipeline import DemoPipeline
from headforcing.demo.model.threads import one_thread
from headforcing.demo.world.camera import CHUNK
from headforcing.demo.world.scene import Scene, render, sample_scene
from headforcing.demo.world.words import format_prompt
from headforcing.measure.meter import Progress
from headforcing.measure.metrics import Metric
from headforcing.measure.profile import HeadProfile
from headforcing.measure.profiler import METRICS, Protocol, profile_heads

VIDEOS = 32
SEED = 4000
GIVEN = 2
LONG_CHUNKS = 30


@one_thread()
def profile_demo(
    model: DemoModel | None = None,
    *,
    videos: int = VIDEOS,
    seed: int = SEED,
    long: bool = False,
    metrics: Sequence[str | Metric] = METRICS,
    progress: Progress | None = None,
) -> HeadProfile:
    """Profiles the demo model while it generates; every video has its own scene and prompt.

    Args:
        model: the demo model; default: with the weights of the package.
        videos: number of videos.
        seed: of scenes and noise.
        long: false: inside the trained range; scenes are drawn as in training, two chunks are given, and the
            last two, which attend to most of the window, are measured. True: beyond it; the camera pans away
            and back, 30 chunks are generated, and every third one after the given ones is measured. (Head
            Forcing measures 30 s videos, third party.) The camera has to move there: if it stands still, the
            first frame looks like every other frame, and a head that attends to content looks like an anchor.
        metrics: see `profile_heads`.
        progress: see `profile_heads`.
    """
    model = model or demo_model()
    run, texts, starts = demo_rollouts(model, videos=videos, seed=seed, long=long)
    return profile_heads(
        model,
        run,
        metrics,
        prompts=texts,
        protocol=Protocol(starts=starts, seed=seed),
        base_model="headforcing demo",
        progress=progress,
    )


def demo_rollouts(
    model: DemoModel, *, videos: int, seed: int, long: bool
) -> tuple[Callable[[str], Tensor], list[str], range]:
    """The rollouts: a function of a prompt, its prompts, and the first frames of the chunks to measure."""
    chunks = LONG_CHUNKS if long else model.config.window // CHUNK
    given = GIVEN_CHUNKS["pan"] if long else GIVEN
    scene = _scenes(videos, seed, chunks, long)
    starts = range((given + 1 if long else chunks - 2) * CHUNK, chunks * CHUNK, (3 if long else 1) * CHUNK)
    first = render(scene, torch.arange(given * CHUNK)).video
    words = scene.prompts(torch.arange(chunks))
    texts = [f"scene {seed + number}: {format_prompt(row[0])}" for number, row in enumerate(words)]
    numbers = {text: number for number, text in enumerate(texts)}

    def run(text: str) -> Tensor:
        one = slice(numbers[text], numbers[text] + 1)
        noise = torch.Generator().manual_seed(seed + numbers[text])
        return DemoPipeline(model).generate(words[one], generator=noise, first_chunk=first[one])

    return run, texts, starts


def _scenes(videos: int, seed: int, chunks: int, long: bool) -> Scene:
    if long:
        return make_scene(range(seed, seed + videos), chunks, camera="pan")
    return sample_scene(videos, torch.Generator().manual_seed(seed), num_chunks=chunks)
