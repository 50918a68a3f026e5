"""Many prompts in one video: what is measured, what is remembered, and the pictures of it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from headforcing import Anchor, Local, Memory, RoleMap, SlidingWindow
from headforcing.demo import demo_model, demo_roles
from headforcing.demo.contest.compare import make_scene
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.scenes.run import MODES, PROMPTS, WRONG, Script, alike, background, measure, play
from headforcing.demo.show.story import Held
from headforcing.demo.world.metrics import LANDMARK_ROWS
from headforcing.demo.world.paint import actor_size, actors
from headforcing.demo.world.scene import ROAD_FOOT, render

pytestmark = pytest.mark.xdist_group("scenes")  # makes its videos once
A, B, C = "day summer calm car red", "day summer calm car blue", "day summer calm car green"


def towns(seed: int, batch: int = 2) -> torch.Tensor:
    """Backgrounds by day, `[batch, 3, 48, 72]`, a town each."""
    prompt = "day summer calm quiet"
    scene = make_scene(range(batch * seed, batch * (seed + 1)), 1, camera="still", prompt=prompt)
    return render(scene, torch.zeros(1, dtype=torch.long)).background[:, :, 0]


def video_of(script, seeds):
    """One town per scene, in which a red car drives that only A asks for."""
    scenes = []
    for seed in seeds:
        frames = towns(seed)[:, :, None].repeat(1, 1, script.chunks * 3, 1, 1)
        car = actors()[0, 3, 0, 0, : actor_size(3)[0]]
        road = slice(ROAD_FOOT - len(car), ROAD_FOOT)
        for frame in range(frames.shape[2]):
            left = 2 * (frame % 24)
            there = frames[:, :, frame, road, left : left + 16]
            ink = (car[..., :3] * 2 - 1).permute(2, 0, 1)
            frames[:, :, frame, road, left : left + 16] = torch.where(car[..., 3] > 0, ink, there)
        scenes.append(frames)
    return torch.cat(scenes, 2)


@pytest.fixture(scope="module")
def played():
    """A B A C in every mode with heads of many roles: what they hold does not depend on the weights."""
    model = DemoModel(DemoConfig(dim=96, layers=2)).randomize(torch.Generator().manual_seed(0)).eval()
    rows = ((Local(2), Anchor(1), Memory(2, 4, 3), *[SlidingWindow(9, sink=3)] * 3),) * 2
    script = Script((A, B, A, C), 3)
    return script, {mode: play(model, RoleMap(rows), script, mode, [0]) for mode in (*MODES, WRONG)}


def test_the_same_town_is_alike_and_others_are_not():
    a, b = towns(0, 24), towns(1, 24)
    assert alike(a, a).allclose(torch.ones(24, dtype=torch.double))
    assert alike(a, 0.4 * a - 0.1).allclose(torch.ones(24).double())
    assert alike(a, -a).allclose(-torch.ones(24).double())
    assert abs(float(alike(a[..., LANDMARK_ROWS, :], b[..., LANDMARK_ROWS, :]).mean())) < 0.2
    assert alike(torch.zeros_like(a), a).isnan().all()


def test_what_moves_does_not_count_as_background():
    video = video_of(Script((A, B), 8), (0, 1))[:, :, :24]
    assert torch.equal(background(video), towns(0)[..., LANDMARK_ROWS, :])


def test_a_planted_return_is_found_and_a_planted_leak():
    script = Script((A, B, A, C), 4)
    returning = measure(video_of(script, (0, 1, 0, 2)), script)
    assert (returning.returned > 0.99).all()
    assert (returning.leaked.abs() < 0.35).all()
    assert (returning.halves > 0.99).all()
    leaking = measure(video_of(script, (0, 0, 0, 0)), script)
    assert (leaking.leaked > 0.99).all()
    assert (leaking.distance.abs() < 0.01).all()
    assert returning.actors.tolist() == pytest.approx([2 / 4] * 2)  # all are red, as A asks
    assert returning.at_once.tolist() == pytest.approx([1 / 3] * 2)
    forgotten = measure(video_of(script, (0, 1, 3, 2)), script)
    assert (forgotten.returned < 0.5).all()


def test_without_a_return_there_is_no_return():
    script = Script((A, B), 4)
    found = measure(video_of(script, (0, 1)), script)
    assert found.returned.isnan().all()
    assert found.distance.isnan().all()
    assert found.leaked.isfinite().all()


def test_the_script_knows_what_returns():
    script = Script()
    assert script.names == ("A", "B", "C", "A", "D", "B")
    assert script.returns == {3: 0, 5: 1}
    assert script.frames == 144
    assert script.judged(1) == slice(30, 48)
    assert Script((A, B), 3).judged(1) == slice(9, 18)
    assert script.words(2).shape == (2, 48, 8)
    assert [script.scene_at(frame) for frame in (0, 23, 24, 143)] == [0, 0, 1, 5]


@pytest.mark.parametrize(
    ("prompts", "chunks", "message"),
    [
        ((A,), 8, "at least 2"),
        ((A, B), 1, "at least 2"),
        ((A, A), 8, "one scene"),
        ((A, "day summer calm car orange"), 8, "colour"),
        ((A, f"{B} at0 right"), 8, "camera stands still"),
    ],
)
def test_a_script_that_cannot_be_played_is_refused(prompts, chunks, message):
    with pytest.raises(ValueError, match=message):
        Script(prompts, chunks)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="recall, cut, smooth, continue"):
        play(demo_model(), demo_roles(), Script((A, B), 2), "fade", [0])


def by_role(played):
    """Frames held by chunk, of the local, anchor, memory and windowed head."""
    return [memory.held for memory in played.memories]


def test_after_a_cut_nothing_from_before_is_held(played):
    script, by_mode = played
    length = script.chunks * 3
    for held in by_role(by_mode["cut"]):
        for chunk, frames in enumerate(held):
            begin = script.scene_at(chunk * 3) * length
            assert all(begin <= frame < chunk * 3 for frame in frames)
        assert [held[chunk] for chunk in (0, 3, 6, 9)] == [()] * 4


def test_behind_a_recall_are_the_frames_of_the_mark(played):
    _, by_mode = played
    local, anchor, memory, window = by_role(by_mode["recall"])
    assert local[6] == ()
    assert anchor[6] == (0,)
    assert window[6] == (0, 1, 2)
    assert len(memory[6]) == 9
    assert set(memory[6]) <= set(range(9))
    assert memory[6][:2] == (0, 1)
    assert memory[6][-3:] == (6, 7, 8)
    assert memory[7][-3:] == (18, 19, 20)
    assert set(memory[8]) <= {*range(9), *range(18, 24)}
    for held in (local, anchor, memory, window):
        assert held[3] == held[9] == ()
    wrong = by_role(by_mode[WRONG])[2]
    assert set(wrong[6]) <= set(range(9, 18))


def test_smooth_keeps_first_and_chosen_frames_and_continue_all(played):
    _, by_mode = played
    local, anchor, memory, window = by_role(by_mode["smooth"])
    assert (local[3], anchor[3], window[3]) == ((), (0,), (0, 1, 2))
    assert memory[3][:2] == (0, 1)
    assert 2 <= len(memory[3]) <= 6
    local, anchor, memory, window = by_role(by_mode["continue"])
    assert (local[3], anchor[3], window[3]) == ((7, 8), (0,), (0, 1, 2, 6, 7, 8))
    assert memory[3][-3:] == (6, 7, 8)


def test_the_model_is_left_as_it_was_and_the_seed_decides():
    model, script = demo_model(), Script((A, B), 2)
    names = [type(module).__name__ for module in model.modules()]
    once = play(model, demo_roles(), script, "cut", [3])
    assert [type(module).__name__ for module in model.modules()] == names
    assert torch.equal(once.video, play(model, demo_roles(), script, "cut", [3]).video)
    assert not torch.equal(once.video, play(model, demo_roles(), script, "cut", [4]).video)
    both = play(model, demo_roles(), script, "cut", [4, 3])
    assert torch.allclose(both.video[1], once.video[0], atol=1e-4)


@pytest.mark.parametrize("chunks", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_a_recall_brings_the_town_back_and_a_cut_does_not(chunks):
    model, script = demo_model(), Script((PROMPTS[0], PROMPTS[1], PROMPTS[0]), chunks)
    modes = "recall", "cut", "smooth"
    found = {mode: measure(play(model, demo_roles(), script, mode, [0, 1]).video, script) for mode in modes}
    assert (found["recall"].returned > 0.9).all()
    assert (found["cut"].returned < 0.8).all()
    assert (found["smooth"].leaked > found["cut"].leaked + 0.2).all()  # the same town, in another light
    assert (found["recall"].leaked < 0.6).all()


def test_a_mark_of_the_timeline_has_the_colour_of_its_scene():
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_hex

    from headforcing.demo.scenes.timeline import draw_modes, draw_timeline, scene_colours

    script = Script((A, B, A), 2)
    held = Held("memory", ((), (0,), (), (6, 7), (0, 1), (1, 12)))
    figure = draw_timeline(script, [held], "title", "note", True)
    (marks,) = [each for axes in figure.axes for each in axes.collections if each.get_gid() == "stored"]
    corners = [path.get_extents().bounds for path in marks.get_paths()]
    assert corners == [
        (3, 0, 3, 1),
        (9, 6, 3, 1),
        (9, 7, 3, 1),
        (12, 0, 3, 1),
        (12, 1, 3, 1),
        (15, 1, 3, 1),
        (15, 12, 3, 1),
    ]
    colours = scene_colours(script.names)
    expected = [colours[name] for name in "ABBAAAA"]
    assert [to_hex(colour).upper() for colour in marks.get_facecolor()] == expected
    texts = [text.get_text().strip() for axes in figure.axes for text in axes.texts]
    assert {"mark A", "recall A"} <= set(texts)
    assert not any("recall" in text.get_text() for axes in draw_modes(script, {"cut": held}, "").axes
                   for text in axes.texts)  # fmt: skip


@pytest.mark.parametrize("prompts", [(A, B, A), (A, B) * 5])
def test_the_pictures_show_what_they_are_given(played, prompts):
    pytest.importorskip("PIL")
    from headforcing.demo.scenes import draw

    script = Script(prompts, 2)
    videos = {
        mode: np.full((script.frames, 48, 72, 3), 40 * number, np.uint8)
        for number, mode in enumerate(MODES, 1)
    }
    held = Held("memory", ((), *[(0, 1, 2)] * (2 * len(prompts) - 1)))
    told = draw.Tale(
        script,
        videos,
        dict.fromkeys(MODES, held),
        {mode: dict.fromkeys(script.returns, 0.5) for mode in MODES},
        dict.fromkeys(MODES, "return 0.5"),
        "head",
        "by",
        16,
    )
    frame = next(itertools.islice(draw.draw_video(told), 13, None))
    assert frame.shape == (720, 1280, 3)
    lefts = [draw.LEFT + number * (draw.FRAME[0] + draw.GAP) + draw.FRAME[0] // 2 for number in range(3)]
    assert [int(frame[draw.TOP + draw.FRAME[1] // 2, left, 0]) for left in lefts] == [40, 40, 80]
    sheet = np.asarray(draw.draw_sheet(told))
    shades = [int(sheet[draw.SHEET_TOP + row * draw.ROW + 60, draw.SHEET_LEFT + 60, 0]) for row in range(4)]
    assert shades == [40, 80, 120, 160]


def test_only_our_report_opens_a_folder(tmp_path):
    show = pytest.importorskip("headforcing.demo.scenes.show")
    ours = show.FILES, show.REPORT, show.MADE_BY
    (tmp_path / "timeline.png").write_text("mine")
    with pytest.raises(FileExistsError, match="did not write"):
        show.check_folder(tmp_path, *ours)
    (tmp_path / show.REPORT).write_text(json.dumps({"made_by": show.MADE_BY}))
    show.check_folder(tmp_path, *ours)
    with pytest.raises(NotADirectoryError):
        show.check_folder(tmp_path / "timeline.png", *ours)
