"""The demo world is closed-form: any frame can be drawn alone, and prompts say what is in it."""

from __future__ import annotations

import pytest
import torch

from headforcing.demo.world import metrics
from headforcing.demo.world.camera import CHUNK, MAX_POSE, VIEW, CameraSchedule
from headforcing.demo.world.scene import render, sample_scene, strip
from headforcing.demo.world.words import POSES, PROMPT_WORDS, WORDS, format_prompt, parse_prompt


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_frame_alone_equals_the_same_frame_among_others():
    scene = sample_scene(16, seeded(), curtain_share=0.7)
    together = render(scene, torch.arange(30)).video
    for frame in (0, 13, 29):
        alone = render(scene, torch.tensor([frame])).video
        assert torch.equal(alone[:, :, 0], together[:, :, frame])


def test_the_same_generator_draws_the_same_scene():
    frames = torch.tensor([0, 5000])
    videos = [render(sample_scene(4, seeded(3)), frames).video for _ in range(2)]
    assert torch.equal(*videos)
    assert videos[0].shape == (4, 3, 2, VIEW, VIEW)
    assert videos[0].abs().max() <= 1


def test_the_background_is_the_strip_where_the_camera_looks():
    scene = sample_scene(8, seeded(1), pan_share=1.0)
    frames = torch.arange(21)
    background, offset = render(scene, frames).background, scene.camera.offset(frames)
    for video in range(8):
        for frame in (0, 7, 20):
            left = int(offset[video, frame])
            expected = strip(scene)[video, :, :, left : left + VIEW] * 2 - 1
            assert torch.equal(background[video, :, frame], expected)


def test_only_curtain_scenes_have_a_curtain():
    frames = torch.arange(12)
    assert render(sample_scene(4, seeded(), curtain_share=0.0), frames).curtain.max() == 0
    covered = render(sample_scene(4, seeded(), curtain_share=1.0), frames).curtain
    assert (covered.amax((2, 3)) == 1).all()


def test_a_switch_changes_the_prompt_and_the_picture_at_its_chunk():
    scene = sample_scene(64, seeded(2), switch_share=1.0, two_share=0.0, pan_share=0.0)
    prompts = scene.prompts(torch.arange(7))
    changed = (prompts[:, 1:] != prompts[:, :-1]).any(-1)
    assert (changed.sum(1) == 1).all()
    assert torch.equal(changed.float().argmax(1) + 1, scene.switch)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_drawn_cameras_stay_on_the_strip_and_the_share_pans(share):
    camera = CameraSchedule.sample(2000, 7, seeded(), pan_share=share)
    offset = camera.offset(torch.arange(7 * CHUNK))
    assert offset.min() >= 0
    assert offset.max() <= MAX_POSE * 6
    assert (offset.diff(dim=1).abs() <= 2).all()
    assert abs(float((camera.motion != 0).any(1).float().mean()) - share) < 0.05


def test_a_periodic_camera_comes_back_after_its_dwell():
    camera = CameraSchedule.periodic(1, 200, dwell_low=2, dwell_high=14)
    pose = camera.pose[0]
    away = (pose == MAX_POSE).int()
    assert set(pose.tolist()) == set(range(MAX_POSE + 1))
    assert away.sum() > 7 * 14
    assert torch.equal(pose[:24], pose[24:48])


def test_after_its_last_chunk_the_camera_stands_still():
    camera = CameraSchedule.of(torch.tensor([1]), torch.tensor([[1, 1]]))
    assert camera.offset(torch.arange(12)).tolist() == [[6, 8, 10, 12, 14, 16, *[18] * 6]]


def test_a_camera_may_not_leave_the_strip():
    with pytest.raises(ValueError, match=r"poses 0\.\.4"):
        CameraSchedule.of(torch.tensor([3]), torch.tensor([[1, 1]]))


def test_seen_columns_are_those_of_earlier_chunks():
    camera = CameraSchedule.sample(40, 7, seeded(4), pan_share=1.0)
    seen, offset = camera.seen(7), camera.offset(torch.arange(21))
    for video in range(40):
        known: set[int] = set()
        for frame in range(21):
            if frame % CHUNK == 0:
                past = offset[video, :frame].tolist()
                known = {column for left in past for column in range(left, left + VIEW)}
            left = int(offset[video, frame])
            expected = [column in known for column in range(left, left + VIEW)]
            assert seen[video, frame].tolist() == expected


@pytest.mark.parametrize(
    "text",
    [
        "sea clear fast disc red",
        "dusk curtain slow cross blue square cyan",
        "sand clear slow disc red at0 left",
    ],
)
def test_prompts_survive_the_round_trip(text):
    ids = parse_prompt(text)
    assert ids.shape == (PROMPT_WORDS,)
    assert format_prompt(ids).startswith(text)
    assert torch.equal(parse_prompt(format_prompt(ids)), ids)


def test_every_scene_prompt_can_be_parsed():
    for ids in sample_scene(50, seeded()).prompts(torch.arange(7)).flatten(0, 1):
        assert torch.equal(parse_prompt(format_prompt(ids)), ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lake clear fast disc red", "'lake', expected the texture: one of sand, sea"),
        ("sea clear fast disc", "word 5 of the prompt: got 'nothing', expected the colour"),
        ("sea clear fast disc red at9 still", "'at9', expected the second shape or camera"),
        ("sea clear fast disc red at1 up", "expected the camera motion: one of left, still"),
        ("sea clear fast disc red at1 left now", "remove 'now'"),
    ],
)
def test_a_bad_prompt_names_the_allowed_words(text, expected):
    with pytest.raises(ValueError, match=expected):
        parse_prompt(text)


def test_the_camera_has_a_word_for_every_position():
    assert len(POSES) == MAX_POSE + 1


def test_words_are_unique():
    assert len(set(WORDS)) == len(WORDS)


def test_metrics_are_perfect_on_the_truth_and_notice_what_is_wrong():
    scene = sample_scene(24, seeded(5), curtain_share=0.0, switch_share=0.0, pan_share=1.0)
    truth = render(scene, torch.arange(40, 60))
    frozen = truth.video[:, :, :1].expand_as(truth.video)
    flat = truth.video.mean((2, 3, 4), keepdim=True).expand_as(truth.video)
    assert metrics.background_psnr(truth.video, scene, 40).shape == (24, 20)
    assert metrics.background_psnr(truth.video, scene, 40).median() > 60
    assert metrics.background_psnr(flat, scene, 40).mean() < 27
    assert metrics.sprite_identity(truth.video, scene, 40).nanmean() > 0.98
    assert metrics.sprite_identity(truth.background, scene, 40).nanmean() == 0
    assert abs(metrics.speed_ratio(truth.video, scene, 40).nanmean() - 1) < 0.05
    assert metrics.speed_ratio(frozen, scene, 40).nanmean() == 0


def test_unseen_columns_are_not_judged():
    camera = CameraSchedule.periodic(4, 7, dwell_low=1)
    scene = sample_scene(4, seeded(6), camera=camera, curtain_share=0.0, two_share=0.0)
    video, seen = render(scene, torch.arange(21)).video, camera.seen(7)
    spoiled = torch.where(seen[:, None, :, None], video, -video)
    judged = metrics.background_psnr(spoiled, scene, columns=seen)
    clean = metrics.background_psnr(video, scene, columns=seen)
    assert judged[:, :CHUNK].isnan().all()
    assert torch.equal(judged[:, CHUNK:], clean[:, CHUNK:])
