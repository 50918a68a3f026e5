"""`headforcing presets` counts frames on a real store, and its bytes are those that a store holds."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import pytest
from typer.testing import CliRunner

import headforcing as hf
from headforcing.cli import app
from headforcing.cli.amounts import in_units
from headforcing.errors import OptionError
from headforcing.measure import memory
from headforcing.measure.memory import Moment, kept_bytes, simulate, steady, stored_bytes
from headforcing.measure.sizes import FRAME_ID, MODELS, ModelSize
from headforcing.roles import Anchor, Full, Local, Memory, SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.maps import presets
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from tests.hosts.rig import Rig

pytestmark = pytest.mark.xdist_group("sizes")  # counts every preset once
RUN = CliRunner()


def frames(role, window=21, chunk=3):
    found = steady(role.fit(window, chunk), window, chunk)
    return float(found.stored), float(found.attended)


# --- frames in steady state ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "stored", "attended"),
    [
        (SlidingWindow(21), 21, 21),
        (SlidingWindow(6, sink=1), 6, 6),
        (Local(2, sink=1), 6, 6),
        (Anchor(1, 2), 6, 6),
        (Memory(), 21, 21),
        (Wave(), 29, 9),
        (Strided(), 11, 11),
        (Veil(), 8 + 3 / 4 * 1 / 4, 7 + 3.75 / 4),
        (Dynamic(), 1 + 1 + 1 + 1 + 3, 6),
        (Averaging(), 3 + 4 + 3, 12),
    ],
    ids=str,
)
def test_frames_by_hand(role, stored, attended):
    """Veil: three blocks of a quarter frame while a chunk begins at a multiple of 12, else four; and a block
    is under way in three chunks of four. Dynamic: pieces of one frame, and a copy of the last one. Averages
    are no frames, but are attended as two."""
    assert frames(role) == (stored, attended)


def test_single_frames_as_chunks():
    assert frames(Wave(), chunk=1) == (1 + 24 + 1 + 1, 1 + 4 + 1 + 1)
    assert frames(Veil(), chunk=1)[1] == 3 + 1 + 1 + 3.75 / 4
    assert frames(Local(3), chunk=1) == (4, 4)


def test_a_cycle_is_found_and_what_grows_has_none():
    assert steady(Veil(), 21, 3).cycle == 4
    assert steady(Veil(), 21, 3).most == 8
    assert steady(Veil(block=5, blocks=2), 21, 3).cycle == 5
    assert steady(Veil(block=7, blocks=2), 21, 3).cycle == 7
    assert steady(Veil(patch=5), 21, 3, (5, 10)).cycle == 4
    assert steady(Local(1), 21, 3).cycle == 1
    assert steady(Full(), 21, 3) is None


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(OptionError, match="give a --grid of other sides"):
        steady(Veil(patch=5), 21, 3)
    with pytest.raises(OptionError, match="2 or 4"):
        simulate(((Veil(), 1),), ModelSize(1, 1, 1, 21, 3, (4, 4), itemsize=8), "ring")
    odd = ModelSize(1, 1, 1, window=21, chunk=3, grid=(2, 5))
    with pytest.raises(OptionError, match=r"\(2, 5\) patches"):
        kept_bytes(odd, hf.RoleMap.uniform(Veil(patch=3), 1, 1))


def test_what_does_not_settle_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "simulate", lambda *_: [Moment(n, n, (Fraction(1),)) for n in range(50)])
    with pytest.raises(OptionError, match="does not settle"):
        steady(Local(17), 21, 3)


# --- bytes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoFaced(SlidingWindow):
    """Sees less of its past in a noisy pass than in the clean one."""

    depends_on: ClassVar[tuple[str, ...]] = ("phase",)

    def visible(self, table, phase):
        return range(2 if phase == "clean" else 1) if len(table) > 2 else range(len(table))


ROWS = {
    "pyramid": (Wave(), Strided(), Veil(), Veil()),
    "veils": (Veil(), Veil(blocks=2, block=5), Local(1), Local(1)),
    "pieces": (Dynamic(pieces=4), Local(1, sink=1), Dynamic(2, 2), Dynamic(pieces=4)),
    "averages": (Averaging(), Averaging(9, sink=1), Local(1), Averaging()),
    "asked for": (Participating(), Dynamic(pieces=4), Local(1), Participating()),
}
PLAIN = (Local(1), Memory(3, 12, 3), SlidingWindow(21), Anchor(3, 3))


@pytest.mark.parametrize("store", [pytest.param("lean", marks=pytest.mark.slow), "ring"])
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=name, marks=() if name in ("pyramid", "asked for") else pytest.mark.slow)
        for name, row in ROWS.items()
    ],
)
def test_a_real_rollout_holds_as_many_bytes(row, store):
    """At the end of every chunk of a long video no more than was said, and in some as many."""
    rig, roles = Rig(window=21), hf.RoleMap((row,) * 2)
    size = ModelSize(2, 4, 16, window=21, chunk=3, grid=(4, 4), itemsize=4)
    with hf.apply_head_forcing(rig.model, roles, store=store) as handle:
        held = rig.stored(handle, rig.caches(), 32)
    assert max(held[12:]) == stored_bytes(size, store, roles)


def test_frames_are_those_of_a_noisy_pass_and_bytes_those_after_the_clean_one():
    """The ring store holds nine frames three times, and packs two and the current chunk."""
    assert frames(TwoFaced(9)) == (9, 1 + 3)
    size = ModelSize(1, 1, 8, window=21, chunk=3, grid=(4, 4))
    held = {moment.stored for moment in simulate(((TwoFaced(9), 1),), size, "ring")}
    assert held == {16 * 8 * 2 * (3 * 9 + 2 * (2 + 3)) + FRAME_ID * 9}


def test_what_merged_blocks_take_by_hand():
    """Seven frames, four blocks of a quarter, and a sum of a quarter in float32, keys and values."""
    size = ModelSize(1, 1, 8, window=21, chunk=3, grid=(4, 4))
    numbers = 2 * 16 * 8
    assert kept_bytes(size, hf.RoleMap.uniform(Veil(), 1, 1)) == numbers * (8 * 2 + 4 // 4)
    again = dataclasses.replace(size, itemsize=4)
    assert kept_bytes(again, hf.RoleMap.uniform(Veil(), 1, 1)) == numbers * (8 * 4 + 4 // 4)


def test_what_averages_take_by_hand():
    """Ten frames, and two averages in float32, keys and values, however many tokens a frame has."""
    for tokens in (1, 16, 1560):
        size = ModelSize(2, 3, 8, window=21, chunk=3, grid=(1, tokens))
        said = kept_bytes(size, hf.RoleMap.uniform(Averaging(), 2, 3))
        assert said == 2 * 3 * 2 * 8 * (10 * tokens * 2 + 2 * 4)


@pytest.mark.parametrize("role", PLAIN, ids=str)
@pytest.mark.parametrize(("store", "buffers"), [("lean", 2), ("ring", 3)])
def test_roles_that_keep_whole_frames_take_their_capacity(role, store, buffers):
    size, one = MODELS["wan-1.3b"], hf.RoleMap.uniform(role, 30, 12)
    slots = role.fit(21, 3).capacity(3) + 3
    assert kept_bytes(size, one) == slots * size.frame_bytes
    assert stored_bytes(size, store, one) == slots * (buffers * size.frame_bytes // 2 + 30 * FRAME_ID)


def test_a_store_with_slots_twice_takes_a_third_less():
    quick = (Local(1), SlidingWindow(21), Anchor(3, 3))  # choosing by content takes seconds
    size, roles = MODELS["wan-1.3b"], hf.RoleMap((quick * 4,) * 30)
    lean, ring = (stored_bytes(size, store, roles) for store in ("lean", "ring"))
    assert kept_bytes(size, roles) < lean < 1.001 * kept_bytes(size, roles)
    assert 1.499 < ring / lean < 1.5


def test_a_store_that_there_is_not_is_refused_and_what_grows_has_no_size():
    size = MODELS["demo"]
    with pytest.raises(OptionError, match="unknown store 'disk': expected one of lean, reference, ring"):
        stored_bytes(size, "disk", hf.RoleMap.uniform(Local(1), 6, 4))
    for store in ("lean", "ring"):
        assert stored_bytes(size, store, hf.RoleMap.uniform(Full(), 6, 4)) is None
    with pytest.raises(OptionError, match="lists for tests"):
        stored_bytes(size, "reference", hf.RoleMap.uniform(Local(1), 6, 4))


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
    assert (window["stored"], window["attended"], window["of_window"]) == (21, 21, 1)
    assert round(window["bytes"] / 2**30, 1) == 5.6
    assert (six["stored"], six["attended"], six["bytes"]) == (6, 6, 6 * answer["model"]["frame_bytes"])
    assert row_of(answer, "full")["bytes"] is None
    assert answer["model"]["window_bytes"] == MODELS["wan-1.3b"].window_bytes


def test_pyramid_forcing_over_its_published_heads():
    row = row_of(told(), "pyramid_forcing")
    by_label = {role["label"]: role for role in row["roles"]}
    assert {label: role["heads"] for label, role in by_label.items()} == row["published"]
    assert [by_label[label]["stored"] for label in ("wave", "anchor")] == [29, 11]
    assert [by_label[label]["attended"] for label in ("wave", "anchor")] == [9, 11]
    assert round(row["attended"], 2) == 9.86
    most = sum(role["heads"] * role["attended_most"] for role in by_label.values()) / 360
    assert round(most, 2) == 9.87  # what the project's own count gives: a veil never sees more than 8
    assert round(row["stored"], 2) == 18.55  # the block under way among them
    assert round(row["of_window"], 2) == 0.88


def test_forcing_kv_over_its_published_heads():
    """Without the current chunk 3.22 frames are stored: a frame more per dynamic head than is published."""
    row = row_of(told(), "forcing_kv")
    assert {role["label"]: role["attended"] for role in row["roles"]} == {"static": 5, "dynamic": 6}
    assert {role["label"]: role["stored"] for role in row["roles"]} == {"static": 5, "dynamic": 7}
    assert round(row["attended"], 2) == 5.61
    assert round(row["stored"] - 3 - 219 / 360, 2) == 2.61
    assert row["bytes"] < row["ring_bytes"]


def test_memrope_is_counted():
    row = row_of(told(), "memrope")
    assert (row["stored"], row["attended"]) == (10, 12)
    heads = 30 * 12 * 2 * 128
    assert row["bytes"] == heads * (10 * 1560 * 2 + 2 * 4)


def test_dummy_forcing_has_no_mean_because_its_split_is_not_published():
    row = row_of(told(), "dummy_forcing")
    assert [role["attended"] for role in row["roles"]] == [4, 6, 4]
    assert [role["heads"] for role in row["roles"]] == [None, None, 180]
    assert row["attended"] is row["bytes"] is row["ring_bytes"] is None
    assert "not published" in row["counted"]


@pytest.mark.slow
def test_single_frames():
    row = row_of(told("--chunk", 1), "pyramid_forcing")
    assert [role["attended"] for role in row["roles"]] == [7, 9, 5.9375]


def some_presets(monkeypatch, *names):
    monkeypatch.setattr(presets, "PRESETS", {name: PRESETS[name] for name in names})


def test_sizes_can_be_given_one_by_one(monkeypatch):
    some_presets(monkeypatch, "streaming_llm", "sliding_window")
    answer = told("--model", "wan-14b", "--window", 12, "--grid", "2x5", "--dtype", "fp32")
    assert answer["model"]["frame_bytes"] == 2 * 40 * 40 * 128 * 10 * 4
    assert row_of(answer, "streaming_llm")["attended"] == 12
    assert round(row_of(told("--model", "wan-14b"), "sliding_window")["bytes"] / 2**30, 1) == 25.0


def test_the_table_says_what_is_unbounded_and_what_does_not_fit(monkeypatch):
    some_presets(monkeypatch, "full", "sliding_window", "infinity_rope", "pyramid_forcing")
    said = RUN.invoke(app, ["presets", "--chunk", "6"])
    assert said.exit_code == 0
    for word in ("grows", "274 MiB", "infinity_rope", "not fit", "5.62 GiB", "100%"):
        assert word in said.stdout
    assert "at least 7" in row_of(told("--chunk", 6), "infinity_rope")["does_not_fit"]
    assert "raise far" in row_of(told("--chunk", 6), "pyramid_forcing")["does_not_fit"]


def test_the_table_shows_roles_and_says_what_is_not_known(monkeypatch):
    def refuse(size, store, roles):
        raise OptionError("odd patches")

    monkeypatch.setattr(memory, "stored_bytes", refuse)
    said = RUN.invoke(app, ["presets"])
    assert said.exit_code == 0
    for word in ("wave", "neighbour", "9.86", "?", "not published", "arXiv:2605.13111", "full: odd patches"):
        assert word in said.stdout


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
