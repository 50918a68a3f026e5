"""Presets keep the frames of their sources, and `headforcing presets` counts their bytes."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import headforcing as hf
from headforcing.cli import app
from headforcing.cli.presets import in_units
from headforcing.errors import RoleError, RoleMapError, WindowError
from headforcing.footprint import MODELS
from headforcing.presets import PRESETS, dummy_forcing
from headforcing.types import FrameTable

RUN = CliRunner()
CHUNK = 3


def seen(role, start, window=21):
    """Frames and positions of the chunk that begins at `start`, own chunk last."""
    known = ()
    for begin in range(0, start + CHUNK, CHUNK):
        table = FrameTable(
            known, min(CHUNK, begin), CHUNK, keys=lambda rows: torch.ones(1, len(rows), 1, 1, 1)
        )
        frames = tuple(known[row] for row in role.retain(table))
        own = tuple(range(begin, begin + CHUNK))
        known = (*frames, *own)
    return known, role.place(known, CHUNK, window)


def the_role(name):
    found = PRESETS[name](2, 4, 21, CHUNK).fit(2, 4, 21, CHUNK)
    (role,) = found.counts()
    return role


def test_infinity_rope_sees_six_frames_placed_by_their_rank():
    role = the_role("infinity_rope")
    assert seen(role, 60) == ((0, 58, 59, 60, 61, 62), (0, 1, 2, 3, 4, 5))
    assert seen(role, 3) == ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5))
    assert seen(role, 0)[0] == (0, 1, 2)


def test_the_other_presets():
    assert seen(the_role("full"), 60)[0] == tuple(range(63))
    assert seen(the_role("sliding_window"), 60)[0] == tuple(range(42, 63))
    assert seen(the_role("streaming_llm"), 60)[0] == (0, 1, 2, *range(45, 63))


def test_a_preset_that_does_not_fit_says_so():
    with pytest.raises(WindowError, match="at least 7"):
        PRESETS["infinity_rope"](2, 4, 21, 6).fit(2, 4, 21, 6)
    with pytest.raises(WindowError, match="trained on 5 frames"):
        PRESETS["infinity_rope"](2, 4, 5, 3).fit(2, 4, 5, 3)


def test_the_frames_of_dummy_forcing():
    """Our own computation from the policy of the project, at the chunk that begins at frame 60."""
    roles = dummy_forcing([["sink", "neighbour", "dummy"]]).fit(1, 3, 21, CHUNK)
    expected = {"sink": (0, 60, 61, 62), "neighbour": tuple(range(57, 63)), "dummy": (59, 60, 61, 62)}
    for label, role in roles.named().items():
        assert seen(role, 60) == (expected[label], expected[label])
    far = dummy_forcing([["neighbour"]], context=2).fit(1, 1, 21, CHUNK)
    assert seen(far.layers[0][0], 60)[0] == tuple(range(54, 63))


def test_labels_that_dummy_forcing_does_not_know():
    with pytest.raises(RoleMapError, match="sink, neighbour, dummy"):
        dummy_forcing([["sink", "local"]])
    with pytest.raises(RoleError, match="recent"):
        dummy_forcing([["sink"]], context=-1)


def test_head_forcing_itself_takes_a_measured_map():
    from headforcing.testing import Rig

    with pytest.raises(RoleMapError, match="come as a measured map"):
        hf.apply_head_forcing(Rig(window=6).model, "head_forcing")


# --- headforcing presets ------------------------------------------------------------------------------


def told(*options):
    answer = RUN.invoke(app, ["presets", *map(str, options), "--json"])
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def row_of(answer, name):
    return next(row for row in answer["presets"] if row["name"] == name)


def test_every_preset_has_its_row():
    answer = told()
    assert [row["name"] for row in answer["presets"]] == list(PRESETS)
    window, six = row_of(answer, "sliding_window"), row_of(answer, "infinity_rope")
    assert (window["kept"], window["attended"], window["of_window"]) == (18, 21, 1)
    assert round(window["bytes"] / 2**30, 1) == 5.6
    assert (six["kept"], six["attended"], six["bytes"]) == (3, 6, 6 * answer["model"]["frame_bytes"])
    assert row_of(answer, "full")["bytes"] is None
    assert answer["model"]["window_bytes"] == MODELS["wan-1.3b"].window_bytes


def test_sizes_can_be_given_one_by_one():
    answer = told("--model", "wan-14b", "--window", 12, "--tokens-per-frame", 10, "--dtype", "fp32")
    assert answer["model"]["frame_bytes"] == 2 * 40 * 40 * 128 * 10 * 4
    assert row_of(answer, "streaming_llm")["attended"] == 12
    assert round(row_of(told("--model", "wan-14b"), "sliding_window")["bytes"] / 2**30, 1) == 25.0


def test_the_table_says_what_is_unbounded_and_what_does_not_fit():
    said = RUN.invoke(app, ["presets", "--chunk", "6"])
    assert said.exit_code == 0
    for word in ("unbounded", "274 MiB", "infinity_rope", "not fit", "5.62 GiB", "100%"):
        assert word in said.stdout
    assert "at least 7" in row_of(told("--chunk", 6), "infinity_rope")["does_not_fit"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--model", "wan-5b"], "wan-1.3b, wan-14b, demo"),
        (["--heads", "0"], "heads is 0"),
        (["--dtype", "fp8"], "bf16, fp16, fp32"),
    ],
)
def test_a_mistake_gives_one_message(options, word):
    answer = RUN.invoke(app, ["presets", *options])
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert word in answer.stderr


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (25 * 2**30, "25.0 GiB"), (2**51, "2048 TiB")],
)
def test_bytes_as_people_read_them(count, text):
    assert in_units(count) == text
