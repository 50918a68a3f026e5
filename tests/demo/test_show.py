"""The files of the demo, and the numbers behind them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

pytest.importorskip("imageio_ffmpeg", reason="requires the extra demo")

from headforcing import Anchor, Local, Memory, RoleMap
from headforcing.demo.contest.compare import make_scene
from headforcing.demo.model.model import DemoModel
from headforcing.demo.show import draw, files, show
from headforcing.demo.show.plots import draw_memory
from headforcing.demo.show.report import PolicyRow, Report, RoleRow, spans
from headforcing.demo.show.story import FORCING, INK, TRUTH, WINDOW, Held, Story, Track

pytestmark = pytest.mark.xdist_group("show")  # makes its videos once
FRAMES = 48


def track(name, colour, seed, psnr=None):
    levels = np.random.default_rng(seed).integers(0, 255, (FRAMES, 3, 3, 3), dtype=np.uint8)
    return Track(name, colour, levels.repeat(16, 1).repeat(24, 2), psnr)


def a_story():
    curve = np.linspace(35.0, 20.0, FRAMES)
    gap = np.where(np.arange(FRAMES) % 7 == 0, np.nan, curve - 4)
    tracks = (
        track("True world", TRUTH, 0),
        track("The model's own sliding window", WINDOW, 1, gap),
        track("Head Forcing", FORCING, 2, curve),
    )
    return Story(tracks, "Headline", "byline", fps=16, trained=21, given=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One run with an untrained model: the request, the report and its folder."""
    folder = tmp_path_factory.mktemp("show")
    DemoModel().randomize(torch.Generator().manual_seed(0)).save_weights(folder / "weights.safetensors")
    rows = ((Local(), Anchor(), *[Memory()] * 4),) * 6
    RoleMap(rows).save(folder / "roles.json")
    request = show.Request(
        seconds=FRAMES / show.FPS,
        camera="pan",
        out=folder / "new" / "out",
        weights=folder / "weights.safetensors",
        roles=folder / "roles.json",
    )
    return request, show.show(request), request.out


def read(path):
    from imageio_ffmpeg import read_frames

    stream = read_frames(str(path))
    facts = next(stream)
    return facts, [np.frombuffer(frame, np.uint8).reshape(720, 1280, 3) for frame in stream]


def test_the_files_are_where_the_report_says(made):
    _, report, out = made
    assert sorted(path.name for path in out.iterdir()) == sorted(files.FILES)
    assert [str((out / name).resolve()) for name in files.FILES] == list(report.files)
    document = json.loads((out / files.REPORT).read_text(), parse_constant=pytest.fail)
    assert {**document, "files": tuple(document["files"])}["made_by"] == "headforcing demo"
    assert document["policies"][0]["name"] == "sliding window"


def test_the_video_has_every_frame(made):
    facts, frames = read(made[2] / "demo.mp4")
    assert (facts["size"], facts["fps"], facts["codec"]) == ((1280, 720), 16.0, "h264")
    assert facts["pix_fmt"].startswith("yuv420p")
    assert len(frames) == FRAMES
    head = (made[2] / "demo.mp4").read_bytes()[:4096]
    assert b"moov" in head  # the index comes first, so that a browser plays at once


def test_the_video_shows_what_it_is_given(tmp_path):
    story = a_story()
    files.write_mp4(tmp_path / "x.mp4", draw.draw_video(story), draw.SIZE, 16)
    _, frames = read(tmp_path / "x.mp4")
    for index, shown in enumerate(story.tracks):
        wide, high = draw.PANEL
        left = draw.LEFT + index * (wide + draw.GAP)
        panel = frames[17][draw.TOP : draw.TOP + high, left : left + wide]
        centres = panel[40::80, 60::120].astype(int)  # of the 3 x 3 fields
        assert np.abs(centres - shown.video[17, 8::16, 12::24]).max() < 16


def test_the_playhead_moves(monkeypatch):
    frames = [frame.copy() for frame in draw.draw_video(a_story())]
    row = draw.CURVES[1] + draw.CURVES[3] // 2
    ink = np.array([int(INK[i : i + 2], 16) for i in (1, 3, 5)])
    places = [
        np.flatnonzero((frame[row] == ink).all(-1)).mean() for frame in (frames[0], frames[15], frames[-1])
    ]
    assert places == sorted(places)
    assert places[2] - places[0] > 1000


def test_the_sheet_has_a_cell_per_time():
    story = a_story()
    sheet = np.asarray(draw.draw_sheet(story, columns=4))
    for shown in story.tracks:
        for frame in (0, 16, 31, FRAMES - 1):
            cell = np.asarray(draw.enlarge(shown.video[frame], draw.CELL))
            high, wide = cell.shape[:2]
            starts = np.argwhere((sheet[: 1 - high, : 1 - wide] == cell[0, 0]).all(-1))
            assert any((sheet[y : y + high, x : x + wide] == cell).all() for y, x in starts)


def test_a_strip_holds_a_mark_per_frame_remembered():
    held = Held("local", ((), (0, 1), (3,)))
    (panel,) = draw_memory([held], 3, "title").axes
    corners = [path.get_extents().bounds for path in panel.collections[0].get_paths()]
    assert corners == [(3, 0, 3, 1), (3, 1, 3, 1), (6, 3, 3, 1)]


def test_the_strip_shows_the_frames_that_are_kept():
    video = a_story().tracks[0].video
    held = [Held("local", ((), (0, 1), (3,))), Held("memory", ((), (0,), (7, 9)))]
    strip = np.asarray(draw.draw_strip(held, video, "title"))
    for row, frames in ((0, (3,)), (1, (7, 9))):
        top = 76 + row * (48 + 62) + 20
        for place, frame in enumerate(frames):
            left = 32 + place * (72 + 6)
            assert (strip[top : top + 48, left : left + 72] == video[frame]).all()


def test_the_view_moves_with_the_camera():
    offsets = np.linspace(0, 2 / 3, FRAMES)
    frames = [frame.copy() for frame in draw.draw_video(dataclasses.replace(a_story(), camera=offsets))]
    left = draw.LEFT + draw.PANEL[0] + 2 - 120
    bar = [frame[draw.TOP - 16, left : left + 121].min(1) > 180 for frame in (frames[0], frames[-1])]
    assert bar[0][:40].all()
    assert not bar[0][42:].any()
    assert bar[1][81:].all()


def test_memory_is_what_the_roles_keep(made):
    request, _, _ = made
    model, roles = show.load_model(request.weights), RoleMap.load(request.roles)
    scene = make_scene([0], request.chunks, camera="pan")
    _, held = show.roll_both(model, roles, scene, request, lambda *_: None)
    window, local, anchor, memory = held
    assert window.held[-1] == tuple(range(FRAMES - 3 - 18, FRAMES - 3))
    assert local.held[0] == ()
    assert local.held[-1] == (FRAMES - 4,)
    assert anchor.held[-1] == (0,)
    assert len(memory.held[-1]) == 18
    assert memory.held[-1][0] == 0
    assert memory.held[-1][-9:] == tuple(range(FRAMES - 12, FRAMES - 3))


def test_a_failure_leaves_the_old_file(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.replace_file(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("content", ["[]", "3", "{}", "no json", '{"made_by": "another"}'])
def test_only_our_report_opens_a_folder(tmp_path, content):
    (tmp_path / files.REPORT).write_text(content)
    with pytest.raises(FileExistsError, match="did not write"):
        files.check_folder(tmp_path)
    (tmp_path / files.REPORT).write_text('{"made_by": "headforcing demo"}')
    files.check_folder(tmp_path)


@pytest.mark.parametrize(
    ("frames", "given", "early", "late"),
    [
        (240, 3, (3, 20), (210, 239)),
        (240, 18, (18, 20), (210, 239)),
        (30, 3, (3, 20), (21, 29)),
        (6, 3, (3, 5), (5, 5)),
    ],
)
def test_the_spans(frames, given, early, late):
    assert spans(frames, given, trained=21) == (early, late)


def a_report(window, forcing):
    def row(name, late):
        return PolicyRow(name, (RoleRow("all", 36, None),), 10, 21.0, 50.0, 30.0, late, *[None] * 4)

    rows = (row("sliding window", window), row("Head Forcing", forcing))
    return Report("day", "still", 0, 240, 21, 3, (3, 20), (210, 239), rows)


def test_the_reading_follows_the_numbers():
    text = a_report(34.13, 20.3).reading()
    assert "Head Forcing 20.3 dB, sliding window 34.1 dB" in text
    assert "recognised" not in text
    assert "one video" in text
    assert "nothing could be measured" in a_report(None, None).reading()
