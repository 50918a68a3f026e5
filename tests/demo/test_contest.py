"""A contest is paired, judges every entrant on the same videos, and says what its controls did."""

from __future__ import annotations

import json

import pytest
import torch

from headforcing import Local, RoleMap, SlidingWindow
from headforcing.demo.contest.compare import Policy, make_scene, roll
from headforcing.demo.contest.contest import Setting, compete, decided
from headforcing.demo.contest.entrants import Entrant, controls, entrant, shuffled
from headforcing.demo.contest.intervals import Interval
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.world.camera import CHUNK
from headforcing.errors import OptionError

pytestmark = pytest.mark.xdist_group("contest")  # makes its videos once
CONFIG = DemoConfig(dim=96, layers=2)
SETTING = Setting((3, 4), seconds=9 * CHUNK / 16, camera="still")
SHAPE = CONFIG.layers, CONFIG.heads
WINDOW = Entrant("window", (RoleMap.uniform(SlidingWindow(9), *SHAPE),))
MIXED = Entrant("mixed", (RoleMap((((Local(1), Local(6)) * 3), (Local(1),) * 6)),))


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(0)
    return DemoModel(CONFIG).randomize(generator).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def found(model):
    told = []
    found = compete(
        model, [WINDOW, MIXED], SETTING, with_controls=True, progress=lambda *step: told.append(step)
    )
    chunks = SETTING.chunks
    maps = len({roles for result in found.results for roles in result.entrant.draws})
    assert told == [("chunks", done + 1, maps * chunks) for done in range(maps * chunks)]
    return found


def test_every_entrant_continues_the_same_videos(model, found):
    assert [result.entrant for result in found.entrants] == [WINDOW, MIXED]
    scene = make_scene(SETTING.seeds, SETTING.chunks, camera="still")
    for result in found.entrants:
        policy = Policy("", result.entrant.roles)
        alone = roll(model, policy, scene, SETTING.chunks, seeds=SETTING.seeds, given_chunks=1)
        torch.testing.assert_close(result.psnr, alone.psnr, equal_nan=True)
        assert torch.equal(result.video, alone.video[0])
        assert result.stored_bytes == alone.stored_bytes // 2


def test_controls_follow_their_entrant(found):
    window, mixed = found.entrants
    assert [result.entrant for result in found.controls_of(mixed)] == controls(MIXED, CONFIG)
    assert all(result.of == "mixed" for result in found.controls_of(mixed))
    assert [result.entrant.kind for result in found.controls_of(window)] == ["as many attended and bytes"]
    assert window.stored == window.attended == 9


def test_draws_count_with_their_mean(model, found):
    drawn = found.controls_of(found.entrants[1])[-1]
    alone = [
        compete(model, [Entrant("one", (shuffled(MIXED.roles, seed),))], SETTING).entrants[0]
        for seed in range(len(drawn.entrant.draws))
    ]
    mean = torch.stack([one.psnr for one in alone]).mean(0)
    torch.testing.assert_close(drawn.psnr, mean, equal_nan=True)


def test_differences_are_paired(found):
    window, mixed = found.entrants
    first, last = found.late
    by_video = (mixed.psnr - window.psnr)[:, first : last + 1].nanmean(1)
    difference = found.ahead(mixed, window)
    assert difference.mean == pytest.approx(float(by_video.mean()), abs=1e-4)
    assert float(by_video.min()) - 1e-4 <= difference.low <= difference.high <= float(by_video.max()) + 1e-4
    assert found.ahead(window, window).mean == 0


def test_two_videos_decide_nothing():
    assert not decided(Interval(1.0, 0.5, 1.5, 4))
    assert decided(Interval(1.0, 0.5, 1.5, 5))
    assert not decided(Interval(1.0, -0.5, 1.5, 50))


def test_everything_is_plain_data(found):
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (document["frames"], document["given"], document["seeds"]) == (27, 3, [3, 4])
    window, control, *_ = document["results"]
    assert window["minus_first"] is None
    assert control["control_of"] == "window"
    assert control["entrant_minus_this"]["mean"] == pytest.approx(-control["minus_first"]["mean"])
    assert window["psnr_by_frame"][:3] == [None] * 3
    assert len(window["psnr_late_by_seed"]) == 2


def test_many_seeds_are_made_in_batches(model, monkeypatch):
    setting = Setting((1, 2, 3), seconds=2 * CHUNK / 16, camera="still")
    together = compete(model, [WINDOW], setting).entrants[0]
    monkeypatch.setattr("headforcing.demo.contest.contest.BATCH", 2)
    apart = compete(model, [WINDOW], setting).entrants[0]
    torch.testing.assert_close(together.psnr, apart.psnr, equal_nan=True, rtol=1e-3, atol=1e-2)
    assert together.stored_bytes == apart.stored_bytes


def test_mistakes_are_named(model):
    with pytest.raises(OptionError, match="each once"):
        compete(model, [WINDOW, WINDOW], SETTING)
    with pytest.raises(OptionError, match="nothing to compare"):
        compete(model, [], SETTING)
    with pytest.raises(OptionError, match="each once"):
        Setting((1, 1))
    with pytest.raises(OptionError, match=r"use 2\.7 seconds or more"):
        Setting((1,), seconds=1.0, camera="pan")


def test_pictures_show_every_entrant(found, monkeypatch):
    pytest.importorskip("PIL")
    from headforcing.demo.contest import pictures

    assert len(pictures.drift(found).axes) == 2
    drawn = []
    monkeypatch.setattr(pictures, "draw_sheet", lambda story: drawn.append(story))
    pictures.sheet(found)
    (story,) = drawn
    assert [track.name for track in story.tracks] == ["Ground truth", "window", "mixed"]
    assert (story.frames, story.trained, story.given) == (27, CONFIG.window, 3)


def test_presets_with_open_numbers_are_fitted():
    roles = entrant("head_forcing", DemoConfig()).roles
    assert all(role.fit(21, 3) == role for role in roles.counts())
