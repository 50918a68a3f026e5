"""Comparisons are paired, leave the model alone and report what the videos are worth."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import headforcing as hf
from headforcing.demo.contest.compare import (
    GIVEN_CHUNKS,
    Policy,
    bootstrap_interval,
    make_scene,
    paired_difference,
    roll,
    summarise,
)
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.world.camera import CHUNK
from headforcing.demo.world.metrics import background_psnr, known_columns, returned_slots
from headforcing.demo.world.scene import render
from headforcing.demo.world.words import format_prompt
from headforcing.errors import AlreadyAppliedError
from headforcing.roles import Anchor, Full, Local, SlidingWindow

CONFIG = DemoConfig(dim=96, layers=2)
CHUNKS = 9
FRAME_BYTES = 2 * CONFIG.layers * CONFIG.tokens_per_frame * CONFIG.dim * 4
"""Keys and values of one frame of one video in all layers."""


@pytest.fixture
def model() -> DemoModel:
    generator = torch.Generator().manual_seed(0)
    return DemoModel(CONFIG).randomize(generator).eval().requires_grad_(False)


def go(model, policy=None, seeds=(3, 4), camera="still", chunks=CHUNKS, given=1, **options):
    scene = make_scene(seeds, chunks, camera=camera)
    return roll(model, policy or Policy("own"), scene, chunks, seeds=seeds, given_chunks=given, **options)


def tensors(scene):
    for field in dataclasses.fields(scene):
        value = getattr(scene, field.name)
        yield from tensors(value) if dataclasses.is_dataclass(value) else [value]


@pytest.mark.parametrize("camera", ["still", "pan"])
def test_a_scene_is_the_same_alone_and_in_a_batch(camera):
    both = make_scene([5, 9], 80, camera=camera)
    for row, seed in enumerate([5, 9]):
        alone = make_scene([seed], 80, camera=camera)
        for one, many in zip(tensors(alone), tensors(both), strict=True):
            assert torch.equal(one[0], many[row])
    assert not torch.equal(both.kind[0], both.kind[1])
    first, *_, last = both.prompts(torch.arange(80))[0, :, :6]
    assert torch.equal(first, last)  # no prompt switch


def test_the_panning_camera_shows_everything_leaves_for_long_and_returns():
    scene = make_scene([1], 80, camera="pan")
    given = GIVEN_CHUNKS["pan"]
    assert known_columns(scene, 80, given).all()
    assert not known_columns(scene, 80, given - 1).all()
    back = returned_slots(scene, 80, 40, given)[0]
    assert back.any(0).sum() >= 2
    assert back[210:].any()
    assert not returned_slots(scene, 80, 240, given).any()


def test_a_prompt_replaces_the_words_and_nothing_else():
    text = "dusk winter plane blue bus red"
    drawn, told = (make_scene([1, 2, 3, 4], 4, camera="still", prompt=p) for p in (None, text))
    prompts = told.prompts(torch.arange(4))
    assert {format_prompt(ids) for ids in prompts.flatten(0, 1)} == {f"{text} at6 still"}
    assert torch.equal(drawn.kind, told.kind)
    assert torch.equal(drawn.speed, told.speed)
    with pytest.raises(ValueError, match="camera"):
        make_scene([1], 4, camera="pan", prompt="day summer calm quiet at1 left")
    with pytest.raises(ValueError, match="time of day"):
        make_scene([1], 4, camera="pan", prompt="moon")


POLICIES = [
    Policy("own"),
    Policy("own sink", window=12, sink=3),
    Policy("dense", window=-1),
    Policy("sink", SlidingWindow(9, sink=3)),
    Policy("mixed", hf.RoleMap(((Anchor(1), *[Local(1)] * 4, hf.Memory(1, 4, 4)),) * 2)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_a_video_depends_on_its_own_seed_only(model, policy):
    both = go(model, policy)
    for row, seed in enumerate((3, 4)):
        alone = go(model, policy, seeds=[seed])
        torch.testing.assert_close(alone.video[0], both.video[row], atol=1e-3, rtol=0)
    assert torch.equal(go(model, policy).video, both.video)
    assert not torch.allclose(both.video[0], both.video[1], atol=0.1)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_the_model_is_left_as_it_was(model, policy):
    model.local_attn_size, model.sink_size = 15, 2
    model.train()
    go(model, policy, chunks=4)
    assert (model.local_attn_size, model.sink_size, model.training) == (15, 2, True)

    def fail(index, clean):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        go(model, policy, chunks=4, callback=fail)
    assert (model.local_attn_size, model.sink_size, model.training) == (15, 2, True)
    assert not any(type(module).__name__.startswith("HeadForced") for module in model.modules())


def test_the_same_memory_gives_the_same_video_patched_or_not(model):
    own = go(model, Policy("own", window=12, sink=3))
    ours = go(model, Policy("ours", SlidingWindow(12, sink=3, positions="absolute")))
    assert torch.equal(own.video, ours.video)
    assert own.attended_frames == ours.attended_frames == 12
    assert torch.equal(own.psnr, ours.psnr) or own.psnr.isnan().any()


@pytest.mark.parametrize(
    ("policy", "frames"),
    [
        (Policy("own"), 21),
        (Policy("dense", window=-1), 27),
        (Policy("full", Full()), 27),
        (Policy("anchor", Anchor(2)), 5),
        (Policy("half", hf.RoleMap(((*[Local(1)] * 3, *[Local(3)] * 3),) * 2)), 5),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_held_is_counted(model, policy, frames):
    made = go(model, policy)
    assert made.attended_frames == frames
    expected = 2 * frames * FRAME_BYTES
    if policy.roles is None:
        assert made.stored_bytes == expected
    else:  # our store holds keys twice, and numbers; without a bound it grows ahead
        assert 1.5 * expected <= made.stored_bytes <= 3.5 * expected


def test_given_frames_are_the_truth_as_decoded_and_are_not_judged(model):
    made = go(model, camera="pan", given=6)
    scene = make_scene([3, 4], CHUNKS, camera="pan")
    truth = render(scene, torch.arange(18)).video
    assert (made.video[:, :, :18] - truth).square().mean() < 0.01
    for values in (made.psnr, made.landmarks, made.actors, made.sharpness):
        assert values.shape == (2, CHUNKS * CHUNK)
        assert values[:, :18].isnan().all()
    expected = background_psnr(made.video, scene, columns=known_columns(scene, CHUNKS, 6))
    assert torch.equal(made.psnr[:, 18:], expected[:, 18:])


def test_without_given_frames_there_is_no_true_background(model):
    assert go(model, given=0, chunks=3).psnr.isnan().all()


def test_the_callback_sees_every_chunk(model):
    seen = []
    made = go(model, callback=lambda index, clean: seen.append((index, clean)))
    assert [index for index, _ in seen] == list(range(CHUNKS))
    assert torch.equal(torch.cat([clean for _, clean in seen], 2), made.video)


def test_mistakes_are_refused(model):
    scene = make_scene([1, 2], 3, camera="still")
    with pytest.raises(ValueError, match="2 videos, but 1 seeds"):
        roll(model, Policy("own"), scene, 3, seeds=[1], given_chunks=1)
    with hf.apply_head_forcing(model, Local(1)), pytest.raises(AlreadyAppliedError):
        roll(model, Policy("own"), scene, 3, seeds=[1, 2], given_chunks=1)


def test_summaries_leave_out_what_was_not_measured():
    values = torch.tensor([[1.0, torch.nan, 3.0, 100.0], [torch.nan] * 4])
    means = summarise(values, 0, 3)
    assert means[0] == 2
    assert means[1].isnan()


def test_intervals_cover_the_mean_and_follow_their_seed():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)) + 3
    found = bootstrap_interval(values, seed=1)
    assert found == bootstrap_interval(values, seed=1)
    assert found.low < found.mean < found.high
    error = float(values.std() / 40**0.5)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found.excludes_zero
    assert not bootstrap_interval(values - values.mean()).excludes_zero


def test_pairs_share_their_noise():
    shared = 100 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    better = paired_difference(shared + 1, shared)
    assert better.low == pytest.approx(1, abs=1e-4)
    assert better.high == pytest.approx(1, abs=1e-4)
    unknown = paired_difference(torch.tensor([1.0, torch.nan]), torch.tensor([0.0, 0.0]))
    assert (unknown.mean, unknown.count) == (1, 1)
    nothing = bootstrap_interval(torch.tensor([torch.nan]))
    assert nothing.count == 0
    assert not nothing.excludes_zero
