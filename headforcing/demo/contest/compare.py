"""Paired comparison of policies on long demo videos.

A policy is a role map, or the model's own window. All policies continue the same scenes from the same noise,
so they are compared pair by pair. A video depends only on its own seed, not on its batch (up to rounding).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from headforcing.apply import apply_head_forcing
from headforcing.apply.handles import handles_of
from headforcing.apply.status import Status
from headforcing.attention.backends import Part
from headforcing.attention.backends.sdpa import attend
from headforcing.demo.contest.intervals import Interval as Interval
from headforcing.demo.contest.intervals import bootstrap_interval as bootstrap_interval
from headforcing.demo.contest.intervals import paired_difference as paired_difference
from headforcing.demo.contest.intervals import summarise as summarise
from headforcing.demo.model.model import DemoModel
from headforcing.demo.model.pipeline import ChunkCallback, DemoPipeline
from headforcing.demo.world.camera import CHUNK, CameraSchedule
from headforcing.demo.world.metrics import (
    actors_recognised,
    background_psnr,
    known_columns,
    landmarks_recognised,
    returned_slots,
    sharpness,
)
from headforcing.demo.world.scene import Scene, asked_by, render, sample_scene
from headforcing.demo.world.words import POSES, parse_prompt
from headforcing.errors import AlreadyAppliedError
from headforcing.roles import HeadRole
from headforcing.roles.maps.role_map import RoleMap

DEFAULT_CHUNKS = 84
"""252 frames, twelve times the trained length."""

GIVEN_CHUNKS: dict[str, int] = {"still": 1, "pan": 13}
"""Rendered chunks to start from; where the camera pans, they show the whole town."""


@dataclass(frozen=True)
class Policy:
    """What the heads store.

    Attributes:
        name: caption, for example "sliding window".
        roles: a map, or one role for all heads; `None`: the model's own rolling cache, without head forcing.
        window: frames of the model's own cache, current chunk included; `None`: as trained, -1: every frame.
            Only without roles.
        sink: first frames that the model's own cache never evicts.
    """

    name: str
    roles: RoleMap | HeadRole | None = None
    window: int | None = None
    sink: int = 0


@dataclass(frozen=True)
class Rollout:
    """A batch of videos generated with one policy, and the metrics of every frame.

    Attributes:
        policy: what the heads stored.
        video: `[B, 3, T, 48, 72]` in [-1, 1], given frames included.
        psnr: of the town's columns that the given frames showed, in dB, `[B, T]`; NaN in the given frames,
            and if there is nothing to measure.
        landmarks: share of the landmarks recognised, `[B, T]`, NaN as for `psnr`; where the camera pans, of
            those that are back after a whole window.
        actors: share of what flies and drives recognised, `[B, T]`, NaN as for `psnr`.
        sharpness: relative to the truth, `[B, T]`, NaN as for `psnr`.
        seconds: wall time of the generation.
        stored_bytes: keys and values stored at the end, counted from the tensors.
        attended_frames: mean over all heads at the end, current chunk included.
    """

    policy: Policy
    video: Tensor
    psnr: Tensor
    landmarks: Tensor
    actors: Tensor
    sharpness: Tensor
    seconds: float
    stored_bytes: int
    attended_frames: float


def make_scene(
    seeds: Sequence[int],
    num_chunks: int = DEFAULT_CHUNKS,
    *,
    camera: Literal["still", "pan"],
    prompt: str | None = None,
) -> Scene:
    """One scene per seed, independent of the batch; without prompt switch.

    Args:
        seeds: one per video.
        num_chunks: chunks in which the camera moves.
        camera: `still`, or `pan`: to the far end of the town and back, again and again, with stops.
        prompt: `parse_prompt` text without camera words; towns and paths stay those of the seeds.

    Raises:
        ValueError: the prompt is malformed or names a camera position.
    """
    scenes = []
    for seed in seeds:
        still = camera == "still"
        schedule = CameraSchedule.still(1) if still else CameraSchedule.periodic(1, num_chunks)
        generator = torch.Generator().manual_seed(seed)
        scenes.append(sample_scene(1, generator, num_chunks=1, camera=schedule, switch_share=0.0))
    scene = _batch(scenes)
    return scene if prompt is None else _with_words(scene, prompt)


def roll(
    model: DemoModel,
    policy: Policy,
    scene: Scene,
    num_chunks: int = DEFAULT_CHUNKS,
    *,
    seeds: Sequence[int],
    given_chunks: int,
    callback: ChunkCallback | None = None,
) -> Rollout:
    """Continues the rendered first chunks of a scene with a policy, and measures every frame.

    Args:
        model: the demo model, without head forcing; restored afterwards.
        policy: what the heads store.
        scene: the scenes, one video per seed.
        num_chunks: number of chunks.
        seeds: noise seed of each video; noise is drawn on the CPU.
        given_chunks: rendered chunks to start from.
        callback: see `DemoPipeline.generate`.

    Raises:
        AlreadyAppliedError: head forcing is applied to the model.
        ValueError: the numbers of seeds and videos differ.
    """
    if len(seeds) != len(scene.kind):
        raise ValueError(f"{len(scene.kind)} videos, but {len(seeds)} seeds: expected one seed per video")
    device = model.patch_embedding.weight.device
    chunks = torch.arange(num_chunks, device=device)
    scene, recorder = scene.to(device), _Recorder(model.config.layers)
    given = render(scene, torch.arange(given_chunks * CHUNK)).video if given_chunks else None
    with _as_found(model):
        pipeline = SeededPipeline(model, policy, seeds)
        roles = policy.roles
        with nullcontext() if roles is None else apply_head_forcing(model, roles, backend=recorder) as handle:
            started = time.perf_counter()
            video = pipeline.generate(
                scene.prompts(chunks),
                num_chunks,
                generator=torch.Generator(),
                first_chunk=given,
                callback=callback,
            )
            seconds = time.perf_counter() - started
            status = None if handle is None else handle.status()
            stored, attended = _held(pipeline, status, recorder, num_chunks * CHUNK)
    return Rollout(
        policy, video, *_measure(video, scene, given_chunks, model.config.window), seconds, stored, attended
    )


class SeededPipeline(DemoPipeline):
    """The demo pipeline with one noise generator per video, on the CPU."""

    def __init__(self, model: DemoModel, policy: Policy, seeds: Sequence[int]) -> None:
        super().__init__(model, window=policy.window, sink=policy.sink)
        self._noise = [torch.Generator().manual_seed(seed) for seed in seeds]

    def _denoise(self, sample: Tensor, context: Tensor, index: int) -> Tensor:
        noise = [torch.randn(sample.shape[1:], generator=one) for one in self._noise]
        return super()._denoise(torch.stack(noise).to(sample), context, index)


class _Recorder:
    """A backend that records how many keys a head attends to, for the last call of every layer."""

    def __init__(self, layers: int) -> None:
        self.keys: deque[float] = deque(maxlen=layers)

    def __call__(self, parts: Sequence[Part], num_heads: int) -> Tensor:
        pairs = sum(len(part.heads) * part.q.shape[1] * part.k.shape[1] for part in parts)
        self.keys.append(pairs / sum(len(part.heads) * part.q.shape[1] for part in parts))
        return attend(parts, num_heads)


@contextmanager
def _as_found(model: DemoModel) -> Iterator[None]:
    """Evaluation mode inside; window, sink and mode are restored."""
    if handles_of(model):
        raise AlreadyAppliedError("roll applies the policy itself: remove head forcing first")
    found = model.local_attn_size, model.sink_size, model.training
    model.eval()
    try:
        yield
    finally:
        model.local_attn_size, model.sink_size = found[:2]
        model.train(found[2])


def _held(
    pipeline: DemoPipeline, status: Status | None, recorder: _Recorder, frames: int
) -> tuple[int, float]:
    """Stored bytes and attended frames per head at the end of a video."""
    if status is not None:
        keys = sum(recorder.keys) / len(recorder.keys)
        return status.stored_bytes, keys / pipeline.model.config.tokens_per_frame
    stored = sum(cache[name].nbytes for cache in pipeline.kv_cache for name in ("k", "v"))
    return stored, float(frames if pipeline.window == -1 else min(pipeline.window, frames))


def _measure(
    video: Tensor, scene: Scene, given_chunks: int, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PSNR, landmarks, actors and sharpness, each `[B, T]`; the given frames are not evaluated."""
    chunks = video.shape[2] // CHUNK
    away = window if bool((scene.camera.motion != 0).any()) else 0
    values = (
        background_psnr(video, scene, columns=known_columns(scene, chunks, given_chunks)),
        landmarks_recognised(video, scene, slots=returned_slots(scene, chunks, away, given_chunks)),
        actors_recognised(video, scene),
        sharpness(video, scene),
    )
    for value in values:
        value[:, : given_chunks * CHUNK] = torch.nan
    return values


def _batch(scenes: Sequence[Scene]) -> Scene:
    """Joins scenes into one batch."""

    def join(parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], Tensor):
            return torch.cat(list(parts))
        cls = type(parts[0])
        return cls(*(join([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    joined: Scene = join(scenes)
    return joined


def _with_words(scene: Scene, prompt: str) -> Scene:
    """The scene with the words of a prompt instead of the random ones."""
    if set(prompt.split()) & set(POSES):
        raise ValueError(f"camera=... sets the camera, leave its position out of {prompt!r}")
    asked = asked_by(parse_prompt(prompt))
    return replace(scene, asked=asked.expand(len(scene.kind), 1, -1))
