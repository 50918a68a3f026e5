"""A profile of the demo model, on scenes with a moving camera."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from headforcing.demo.camera import CHUNK
from headforcing.demo.compare import GIVEN_CHUNKS, make_scene
from headforcing.demo.model import DemoModel, demo_model
from headforcing.demo.pipeline import DemoPipeline
from headforcing.demo.world import render
from headforcing.metrics import Metric
from headforcing.profile import HeadProfile
from headforcing.profiler import METRICS, Progress, Protocol, profile_heads

SEEDS = range(4000, 4020)
CHUNKS = 14
STARTS = range(9, 3 * CHUNKS, 6)


def profile_demo(
    model: DemoModel | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
    chunks: int = CHUNKS,
    starts: Collection[int] | None = STARTS,
    metrics: Sequence[str | Metric] = METRICS,
    progress: Progress | None = None,
) -> HeadProfile:
    """Profiles the demo model while it continues panning scenes; each scene is a prompt.

    The camera must move: while it stands still, the first frame shows what every other frame shows, and
    a head that looks for content looks like an anchor.

    Args:
        model: the demo model; default: with the weights of the package.
        seeds: one scene each, and its noise.
        chunks: length of the videos; the first of them are given.
        starts: first frames of the chunks that are measured.
        metrics: see `profile_heads`.
        progress: see `profile_heads`.
    """
    model = model or demo_model()
    scene = make_scene(seeds, chunks, camera="pan")
    given = render(scene, torch.arange(GIVEN_CHUNKS["pan"] * CHUNK)).video
    words = scene.prompts(torch.arange(chunks))

    def run(number: str) -> None:
        one = slice(int(number), int(number) + 1)
        noise = torch.Generator().manual_seed(seeds[int(number)])
        DemoPipeline(model).generate(words[one], generator=noise, first_chunk=given[one])

    names = [str(number) for number in range(len(seeds))]
    protocol = Protocol(starts=starts, seed=seeds[0])
    return profile_heads(
        model, run, metrics, prompts=names, protocol=protocol, base_model="headforcing demo", progress=progress
    )
