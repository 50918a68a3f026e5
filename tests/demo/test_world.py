"""The demo world is closed-form: any frame can be drawn alone, and prompts say what is in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as functional

from headforcing.demo.world import metrics, paint
from headforcing.demo.world.camera import (
    CELL,
    CHUNK,
    GROUND,
    HEIGHT,
    KERB,
    MAX_POSE,
    PAN,
    SLOTS,
    TOWN,
    WIDTH,
    CameraSchedule,
)
from headforcing.demo.world.scene import CHOICES, asked_by, render, sample_scene, town
from headforcing.demo.world.sprites import ACTORS, CLOUDS, LANDMARKS, VERGES
from headforcing.demo.world.words import (
    COLOURS,
    POSES,
    PROMPT_WORDS,
    SEASONS,
    TIMES,
    WORDS,
    format_prompt,
    parse_prompt,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("art", [*LANDMARKS.values(), *CLOUDS, *VERGES, *ACTORS.values()])
def test_pixel_art_is_rectangular_and_its_letters_are_paints(art):
    rows = art.split()
    assert len({len(row) for row in rows}) <= 1
    assert set("".join(rows)) <= set(paint.LETTERS)


def test_landmarks_fill_a_slot_and_stand_on_the_ground():
    atlas = paint.landmarks()
    assert atlas.shape == (len(TIMES), len(SEASONS), len(LANDMARKS) + 1, len(COLOURS), HEIGHT, CELL, 4)
    assert (atlas[:, :, :-1, :, GROUND - 1, :, 3].sum(-1) > 0).all()
    assert not atlas[:, :, :, :, GROUND:].any()
    assert not atlas[:, :, -1].any()
    assert not paint.verges()[..., KERB:, :, :].any()


def test_every_landmark_looks_different_in_every_colour_and_light():
    atlas = paint.landmarks()[:, :, :-1]
    for time in range(len(TIMES)):
        for season in range(len(SEASONS)):
            flat = atlas[time, season].flatten(0, 1).flatten(1)
            apart = torch.cdist(flat, flat) + torch.eye(len(flat)) * 100
            assert apart.min() > 0.5


def test_what_drives_to_the_left_is_mirrored():
    right, left = paint.actors()[0, 3, 0]
    wide = paint.actor_size(3)[1]
    assert torch.equal(right[:, :wide].flip(1), left[:, :wide])


def test_a_frame_alone_equals_the_same_frame_among_others():
    scene = sample_scene(16, seeded())
    together = render(scene, torch.arange(30)).video
    for frame in (0, 13, 29):
        alone = render(scene, torch.tensor([frame])).video
        assert torch.equal(alone[:, :, 0], together[:, :, frame])


def test_a_video_alone_equals_the_same_video_in_a_batch():
    scene = sample_scene(6, seeded(7), switch_share=1.0)
    one = replace(
        scene,
        **{name: value[2:3] for name, value in vars(scene).items() if name != "camera"},
        camera=CameraSchedule(scene.camera.pose[2:3], scene.camera.motion[2:3]),
    )
    frames = torch.arange(21)
    assert torch.equal(render(one, frames).video[0], render(scene, frames).video[2])


def test_the_same_generator_draws_the_same_scene():
    frames = torch.tensor([0, 5000])
    videos = [render(sample_scene(4, seeded(3)), frames).video for _ in range(2)]
    assert torch.equal(*videos)
    assert videos[0].shape == (4, 3, 2, HEIGHT, WIDTH)
    assert videos[0].abs().max() <= 1


def test_the_background_is_the_town_where_the_camera_looks():
    scene = sample_scene(8, seeded(1), pan_share=1.0, switch_share=0.0)
    frames = torch.arange(21)
    background, offset = render(scene, frames).background, scene.camera.offset(frames)
    for video in range(8):
        time, season = scene.asked[video, 0, :2].tolist()
        near = town(scene, torch.tensor([video]), time, season)[1][0]
        for frame in (0, 7, 20):
            left = int(offset[video, frame])
            shown = near[:, left : left + WIDTH]
            expected = (shown[..., :3] * 2 - 1).permute(2, 0, 1)
            covered = (shown[..., 3] > 0).expand(3, -1, -1)
            assert torch.equal(background[video, :, frame][covered], expected[covered])


def test_the_town_stays_the_same_in_another_light():
    scene = sample_scene(4, seeded(8))
    layers = [town(scene, torch.arange(4), time, season)[1] for time in range(3) for season in range(3)]
    covers = [layer[..., 3] for layer in layers]
    assert all(torch.equal(cover, covers[0]) for cover in covers)
    assert all(not torch.equal(layer, layers[0]) for layer in layers[1:])


def test_what_flies_is_hidden_by_landmarks_and_what_drives_is_not():
    scene = sample_scene(64, seeded(9), switch_share=0.0)
    rendering = render(scene, torch.arange(60))
    sizes = rendering.moving.sum((-1, -2))  # [B, T, 2]
    for thing, most in ((0, True), (1, False)):
        kind = scene.asked[:, 0, 2 + 2 * thing]
        varies = sizes[kind > 0, :, thing]
        assert (sizes[kind == 0, :, thing] == 0).all()
        assert bool((varies.amin(1) < varies.amax(1)).any()) == most
    changed = (rendering.video != rendering.background).any(1)
    assert not (changed & ~rendering.moving.any(2)).any()


def test_a_switch_changes_one_word_of_the_prompt_at_its_chunk():
    scene = sample_scene(64, seeded(2), switch_share=1.0, pan_share=0.0)
    changed = (scene.asked[:, 1:] != scene.asked[:, :-1]).sum(-1)
    assert (changed.sum(1) == 1).all()


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_drawn_cameras_stay_in_the_town_and_the_share_pans(share):
    camera = CameraSchedule.sample(2000, 7, seeded(), pan_share=share)
    offset = camera.offset(torch.arange(7 * CHUNK))
    assert offset.min() >= 0
    assert offset.max() <= TOWN - WIDTH
    assert (offset.diff(dim=1).abs() <= PAN).all()
    assert abs(float((camera.motion != 0).any(1).float().mean()) - share) < 0.05


def test_a_periodic_camera_sees_all_and_comes_back():
    camera = CameraSchedule.periodic(1, 200)
    period = 2 * (MAX_POSE + 2)
    assert set(camera.pose[0].tolist()) == set(range(MAX_POSE + 1))
    assert torch.equal(camera.pose[0, :period], camera.pose[0, period : 2 * period])


def test_after_its_last_chunk_the_camera_stands_still():
    camera = CameraSchedule.of(torch.tensor([1]), torch.tensor([[1, 1]]))
    assert camera.offset(torch.arange(12)).tolist() == [[12, 16, 20, 24, 28, 32, *[36] * 6]]


def test_a_camera_may_not_leave_the_town():
    with pytest.raises(ValueError, match=rf"poses 0\.\.{MAX_POSE}"):
        CameraSchedule.of(torch.tensor([MAX_POSE - 1]), torch.tensor([[1, 1]]))


def columns_shown(camera: CameraSchedule, video: int, frames: range) -> set[int]:
    lefts = camera.offset(torch.arange(frames.start, frames.stop))[video].tolist()
    return {column for left in lefts for column in range(left, left + WIDTH)}


@pytest.mark.parametrize("away", [0, 3, 9])
def test_returning_columns_are_those_of_earlier_chunks_but_not_of_the_last_ones(away):
    camera = CameraSchedule.sample(20, 7, seeded(4), pan_share=1.0)
    returning, columns = camera.returning(7, away), camera.columns(7)
    for video in range(20):
        for frame in range(21):
            begin = frame // CHUNK * CHUNK
            ever = columns_shown(camera, video, range(begin))
            lately = columns_shown(camera, video, range(max(0, begin - away), begin)) if away else set()
            expected = [column in ever - lately for column in columns[video, frame].tolist()]
            assert returning[video, frame].tolist() == expected


def test_absence_is_the_length_of_the_last_time_out_of_view():
    camera = CameraSchedule.sample(10, 20, seeded(5), pan_share=1.0)
    absence, columns = camera.absence(20), camera.columns(20)
    for video in range(10):
        seen: dict[int, int] = {}
        gone: dict[int, int] = {}
        for frame in range(60):
            for place, column in enumerate(columns[video, frame].tolist()):
                if column in seen and seen[column] < frame - 1:
                    gone[column] = frame - 1 - seen[column]
                seen[column] = frame
                assert int(absence[video, frame, place]) == gone.get(column, 0)


@pytest.mark.parametrize(
    "text",
    ["day summer balloon red car blue", "night winter calm bus white at0 left", "dusk autumn calm quiet"],
)
def test_prompts_survive_the_round_trip(text):
    ids = parse_prompt(text)
    assert ids.shape == (PROMPT_WORDS,)
    assert format_prompt(ids).startswith(text)
    assert torch.equal(parse_prompt(format_prompt(ids)), ids)


def test_every_scene_prompt_can_be_parsed_and_says_what_is_asked_for():
    scene = sample_scene(50, seeded())
    prompts = scene.prompts(torch.arange(7))
    for ids in prompts.flatten(0, 1):
        assert torch.equal(parse_prompt(format_prompt(ids)), ids)
    again = replace(scene, asked=asked_by(prompts))
    assert torch.equal(again.prompts(torch.arange(7)), prompts)
    assert torch.equal(render(again, torch.arange(21)).video, render(scene, torch.arange(21)).video)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("noon summer calm quiet", "'noon', expected the time of day: one of day, dusk"),
        ("day summer balloon", "word 4 of the prompt: got 'nothing', expected the colour of the balloon"),
        ("day summer calm quiet at99 still", "'at99', expected the camera position"),
        ("day summer calm quiet at1 up", "expected the camera motion: one of left, still"),
        ("day summer calm quiet at1 left now", "remove 'now'"),
    ],
)
def test_a_bad_prompt_names_the_allowed_words(text, expected):
    with pytest.raises(ValueError, match=expected):
        parse_prompt(text)


def test_the_camera_has_a_word_for_every_position():
    assert len(POSES) == MAX_POSE + 1


def test_words_are_unique():
    assert len(set(WORDS)) == len(WORDS)
    assert all(set(names) <= set(WORDS) for names in CHOICES)


def test_metrics_are_perfect_on_the_truth():
    scene = sample_scene(6, seeded(5), pan_share=1.0)
    truth = render(scene, torch.arange(40, 52))
    assert metrics.background_psnr(truth.video, scene, 40).shape == (6, 12)
    assert metrics.background_psnr(truth.video, scene, 40).min() > 70
    assert metrics.landmarks_recognised(truth.video, scene, 40).min() == 1
    assert metrics.actors_recognised(truth.video, scene, 40).nanmean() == 1
    assert torch.allclose(metrics.sharpness(truth.video, scene, 40), torch.ones(6, 12))


def test_metrics_notice_what_is_wrong():
    scene = sample_scene(6, seeded(5), pan_share=1.0, switch_share=0.0)
    frames = torch.arange(12)
    truth = render(scene, frames)
    other = replace(sample_scene(6, seeded(6)), asked=scene.asked, camera=scene.camera)
    swapped = replace(scene, colour=(scene.colour + 1) % len(COLOURS))
    repainted = scene.asked + torch.tensor([0, 0, 0, 1, 0, 1])
    repainted = replace(scene, asked=repainted % torch.tensor([3, 3, 3, 6, 3, 6]))
    blurred = functional.avg_pool3d(truth.video, (1, 3, 3), 1, (0, 1, 1))
    assert metrics.background_psnr(render(other, frames).video, scene).mean() < 16
    assert metrics.landmarks_recognised(render(other, frames).video, scene).nanmean() < 0.1
    assert metrics.landmarks_recognised(render(swapped, frames).video, scene).nanmean() == 0
    assert metrics.actors_recognised(render(swapped, frames).video, scene).nanmean() == 1
    assert metrics.actors_recognised(render(repainted, frames).video, scene).nanmean() == 0
    assert metrics.actors_recognised(truth.background, scene).nanmean() < 0.1
    assert metrics.sharpness(blurred, scene).mean() < 0.75


def test_something_that_moves_elsewhere_is_no_error_of_the_background():
    scene = sample_scene(6, seeded(5), pan_share=1.0, switch_share=0.0)
    frames = torch.arange(12)
    elsewhere = render(replace(scene, start=scene.start + 17), frames).video
    assert metrics.background_psnr(elsewhere, scene).median() > 35
    assert metrics.actors_recognised(elsewhere, scene).nanmean() > 0.9


def test_unseen_columns_are_not_judged():
    camera = CameraSchedule.periodic(4, 7)
    scene = sample_scene(4, seeded(6), camera=camera)
    video, seen = render(scene, torch.arange(21)).background, camera.returning(7)
    spoiled = torch.where(seen[:, None, :, None], video, -video)
    judged = metrics.background_psnr(spoiled, scene, columns=seen)
    clean = metrics.background_psnr(video, scene, columns=seen)
    assert judged[:, :CHUNK].isnan().all()
    assert torch.allclose(judged[:, CHUNK:], clean[:, CHUNK:], atol=1e-3)


def test_returned_slots_are_whole_known_and_long_gone():
    camera = CameraSchedule.periodic(1, 40)
    scene = sample_scene(1, seeded(7), num_chunks=40, camera=camera)
    slots = metrics.returned_slots(scene, 40, 21, 13)[0]
    offset = camera.offset(torch.arange(120))[0]
    shown, expected = -torch.ones(SLOTS), torch.zeros(120, SLOTS, dtype=torch.bool)
    gone = torch.zeros(SLOTS)
    for frame in range(120):
        for slot in range(SLOTS):
            left = slot * CELL - int(offset[frame])
            if -CELL < left < WIDTH:
                if 0 <= shown[slot] < frame - 1:
                    gone[slot] = frame - 1 - shown[slot]
                shown[slot] = frame
                expected[frame, slot] = gone[slot] > 21 + 2 and 0 <= left <= WIDTH - CELL
    assert slots.any()
    assert not (expected & ~slots).any()
    assert not (slots & (gone == 0)).any()
