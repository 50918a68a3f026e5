"""`headforcing compare`, through typer's runner."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from headforcing.cli import app
from headforcing.demo import demo_roles

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.xdist_group("headforcing compare")  # makes its videos once
RUN = CliRunner()
SHORT = ["--seeds", "2", "--seconds", "1.3", "--camera", "still"]


def run(*arguments):
    return RUN.invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    demo_roles().save(folder / "mine.json")
    return folder


@pytest.fixture(scope="module")
def report(folder):
    answer = run("infinity_rope", folder / "mine.json", *SHORT, "--out", folder / "out", "--json")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def test_presets_and_files_compete(report, folder):
    first, second = report["results"]
    assert (first["name"], second["name"]) == ("infinity_rope", "mine")
    assert (first["stored_frames"], first["attended_frames"], first["minus_first"]) == (6.0, 6.0, None)
    assert second["minus_first"]["videos"] == 2
    assert first["stored_bytes"] > 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "compare-drift.png",
        "compare-sheet.png",
        "compare.json",
    ]
    written = json.loads((folder / "out" / "compare.json").read_text())
    assert written == {name: value for name, value in report.items() if name != "files"}
    for name in ("compare-drift.png", "compare-sheet.png"):
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_table_has_the_controls(folder):
    answer = run("streaming_llm", "forcing_kv", *SHORT, "--equal-bytes", "--out", folder / "out")
    assert answer.exit_code == 0, answer.output
    words = (
        "stored, attended", "minus streaming_llm", "forcing_kv *", "positions leave the range",
        "controls", "attended, bytes", "shuffled", "2 videos are too few",
    )  # fmt: skip
    assert [word for word in words if word not in answer.stdout] == []
    assert answer.stdout.splitlines()[-1].endswith("compare-sheet.png")
    assert "chunks: " in answer.stderr
    document = json.loads((folder / "out" / "compare.json").read_text())
    kinds = [row["kind"] for row in document["results"]]
    assert kinds == ["entrant", "entrant", "as many attended and bytes", "shuffled"]
    assert [row["control_of"] for row in document["results"]] == [None, None, "forcing_kv", "forcing_kv"]


def test_five_videos_are_judged(folder):
    few = ["--seeds", "5", "--seconds", "0.6", "--camera", "still", "--out", folder / "out"]
    answer = run("streaming_llm", "sliding_window", *few)
    verdict = "Compared with streaming_llm by late PSNR: no significant difference: sliding_window."
    assert verdict in answer.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dense"], "neither a preset nor a role-map file"),
        (["full", "full"], "each once"),
        (["full", "--seconds", "0.1"], "use 2.7 seconds or more"),
        (["pyproject.toml"], "pyproject.toml"),
    ],
)
def test_a_mistake_gives_one_message(folder, arguments, message):
    answer = run(*arguments, "--out", folder / "never")
    assert answer.exit_code == 2
    assert message in answer.stderr
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("headforcing.cli.contest.DRAWING", ("no_such_library",))
    answer = run("full")
    assert (answer.exit_code, "no_such_library" in answer.stderr) == (2, True)
