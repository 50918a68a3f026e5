"""`headforcing scenes` end to end, on a short video."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from headforcing.cli import app
from headforcing.demo import demo_roles

pytest.importorskip("imageio_ffmpeg", reason="requires the extra demo")

pytestmark = pytest.mark.xdist_group("headforcing scenes")  # makes its videos once
RUN = CliRunner()
PROMPTS = ("day summer calm car blue", "night winter calm bus red", "day summer calm car blue")
FILES = ["modes.png", "scenes.json", "scenes.mp4", "scenes_sheet.png", "timeline.png"]


def run(*options):
    prompts = [word for prompt in PROMPTS for word in ("--prompts", prompt)]
    return RUN.invoke(app, ["scenes", "--chunks", "2", *prompts, *map(str, options)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "new" / "out"
    answer = run("--out", out, "--json")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout, parse_constant=pytest.fail), out


def test_the_report_has_every_mode(made):
    report, _ = made
    assert report["names"] == ["A", "B", "A"]
    assert [row["mode"] for row in report["modes"]] == ["recall", "cut", "smooth", "continue"]
    assert (report["frames"], report["chunks"], report["seed"]) == (18, 2, 0)
    for row in report["modes"]:
        assert row["distance"] == pytest.approx(row["returned"] - row["leaked"])
    assert report["modes"][0]["stored_bytes"] > report["modes"][1]["stored_bytes"]  # the marks
    roles = {type(role).__name__.lower(): count for role, count in demo_roles().counts().items()}
    assert {role["role"]: role["heads"] for role in report["roles"]} == roles


def test_the_files_are_where_the_report_says(made):
    report, out = made
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert sorted(report["files"]) == sorted(str(out / name) for name in FILES)
    document = json.loads((out / "scenes.json").read_text())
    assert document["made_by"] == "headforcing scenes"
    held = document["stored_frames"]["recall"]
    assert {len(chunks) for chunks in held.values()} == {6}
    [memory] = (name for name in held if name.startswith("memory"))
    assert held[memory][4] == [0, 1, 2, 3, 4, 5]
    assert document["stored_frames"]["cut"][memory][4] == []


def test_the_video_has_every_frame(made):
    from imageio_ffmpeg import read_frames

    stream = read_frames(str(made[1] / "scenes.mp4"))
    assert next(stream)["size"] == (1280, 720)
    frames = [np.frombuffer(frame, np.uint8) for frame in stream]
    assert len(frames) == 18


def test_the_table_and_a_preset(made, tmp_path):
    answer = run("--out", tmp_path, "--preset", "streaming_llm", "--seed", 2)
    assert answer.exit_code == 0, answer.output
    assert all(word in answer.stdout for word in ("3 scenes: A B A", "recall", "leak", "This is one video"))
    assert "continue: 6/6" in answer.stderr
    report = json.loads((tmp_path / "scenes.json").read_text())
    assert [role["role"] for role in report["roles"]] == ["slidingwindow"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "day summer calm car orange"], "red, blue, yellow"),
        (["--prompts", PROMPTS[0]], "one scene"),
        (["--preset", "nonsense"], "unknown preset"),
        (["--roles", "absent.json"], "absent.json"),
        (["--preset", "full", "--roles", "absent.json"], "leave one out"),
    ],
)
def test_a_mistake_gives_one_message(tmp_path, options, message):
    answer = run("--out", tmp_path / "never", *options)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: ")
    assert message in answer.stderr
    assert not (tmp_path / "never").exists()


def test_foreign_files_are_not_overwritten(tmp_path):
    (tmp_path / "timeline.png").write_text("mine")
    answer = run("--out", tmp_path)
    assert (answer.exit_code, "choose another --out" in answer.stderr) == (2, True)
    assert (tmp_path / "timeline.png").read_text() == "mine"


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("headforcing.cli.scenes.DRAWING", ("PIL", "no_such_library"))
    answer = RUN.invoke(app, ["scenes"])
    assert (answer.exit_code, "no_such_library: pip install" in answer.stderr) == (2, True)
