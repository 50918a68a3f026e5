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
from headforcing.cli.presets import in_units
from headforcing.errors import OptionError
from headforcing.measure.footprint import BUFFERS, MODELS, ModelSize
from headforcing.measure.steady import _Row, held_bytes, steady
from headforcing.roles import Anchor, Full, Local, Memory, SlidingWindow
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from tests.hosts.rig import Rig

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
    are no frames, but are seen as two."""
    assert frames(role) == (stored, attended)


def test_single_frames_as_chunks():
    assert frames(Wave(), chunk=1) == (1 + 24 + 1 + 1, 1 + 4 + 1 + 1)
    assert frames(Veil(), chunk=1)[1] == 3 + 1 + 1 + 3.75 / 4
    assert frames(Local(3), chunk=1) == (4, 4)


def test_a_cycle_is_found_and_what_grows_has_none():
    assert steady(Veil(), 21, 3).cycle == 4
    assert steady(Veil(), 21, 3).most == 8
    assert steady(Veil(block=5, blocks=2), 21, 3).cycle == 5
    assert steady(Local(1), 21, 3).cycle == 1
    assert steady(Full(), 21, 3) is None


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(OptionError, match="cannot be simulated"):
        steady(Veil(patch=5), 21, 3)
    with pytest.raises(OptionError, match="2 and 4 only"):
        held_bytes("ring", Veil(), 21, 3, 8)
    odd = ModelSize(1, 1, 1, window=21, chunk=3, tokens_per_frame=10)
    with pytest.raises(OptionError, match="10 tokens per frame cannot be merged"):
        odd.kv_bytes(hf.RoleMap.uniform(Veil(patch=3), 1, 1))


def test_what_does_not_settle_is_refused(monkeypatch):
    monkeypatch.setattr(
        "headforcing.measure.steady._run", lambda *_: [_Row(n, n, Fraction(1)) for n in range(50)]
    )
    with pytest.raises(OptionError, match="does not settle"):
        steady(Local(17), 21, 3)


def test_what_grows_otherwise_than_its_size_is_refused(monkeypatch):
    def squared(store, role, window, chunk, tiny):
        return [_Row(tiny.size, tiny.size**2, Fraction(1))] * 50

    monkeypatch.setattr("headforcing.measure.steady._run", squared)
    with pytest.raises(OptionError, match="cannot be told from its size"):
        held_bytes("ring", Local(16), 21, 3, 4)


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
}
PLAIN = (Local(1), Memory(3, 12, 3), SlidingWindow(21), Anchor(3, 3))


@pytest.mark.parametrize(
    ("store", "row"),
    [
        *((store, row) for store in BUFFERS for row in ROWS.values()),
        ("reference", (Wave(), Strided(), *PLAIN[:2])),
    ],
    ids=[*(f"{store}, {name}" for store in BUFFERS for name in ROWS), "reference"],
)
def test_a_real_rollout_holds_as_many_bytes(row, store):
    """At the end of every chunk of a long video no more than was said, and in some as many."""
    rig, roles, held = Rig(window=21), hf.RoleMap((row,) * 2), []
    size = ModelSize(2, 4, 16, window=21, chunk=3, tokens_per_frame=16, itemsize=4)
    caches = rig.caches()
    with hf.apply_head_forcing(rig.model, roles, store=store) as handle:
        for chunk in range(32):
            rig.video(caches, 1, first=chunk)
            held.append(handle.status().stored_bytes)
    assert max(held[12:]) == size.stored_bytes(store, roles)
    if store == "reference":
        assert max(held[12:]) == size.kv_bytes(roles)
    if store == "ring":
        assert max(held[12:]) == size.ring_bytes(roles)


def test_frames_are_those_of_a_noisy_pass_and_bytes_those_after_the_clean_one():
    """The ring store holds nine frames three times, and packs keys and values of two and the own chunk."""
    assert frames(TwoFaced(9)) == (9, 1 + 3)
    held = held_bytes("ring", TwoFaced(9), 21, 3, 2)
    assert set(held.each) == {2 * (3 * 9 + 2 * (2 + 3))}
    assert set(held.once) == {8 * 9}


def test_what_merged_blocks_take_by_hand():
    """Seven frames, four blocks of a quarter, and a sum of a quarter in float32, keys and values."""
    size = ModelSize(1, 1, 8, window=21, chunk=3, tokens_per_frame=16)
    numbers = 2 * 16 * 8
    assert size.kv_bytes(hf.RoleMap.uniform(Veil(), 1, 1)) == numbers * (8 * 2 + 4 // 4)
    again = dataclasses.replace(size, itemsize=4)
    assert again.kv_bytes(hf.RoleMap.uniform(Veil(), 1, 1)) == numbers * (8 * 4 + 4 // 4)


def test_what_averages_take_by_hand():
    """Ten frames, and two averages in float32, keys and values, however many tokens a frame has."""
    for tokens in (1, 16, 1560):
        size = ModelSize(2, 3, 8, window=21, chunk=3, tokens_per_frame=tokens)
        said = size.kv_bytes(hf.RoleMap.uniform(Averaging(), 2, 3))
        assert said == 2 * 3 * 2 * 8 * (10 * tokens * 2 + 2 * 4)


def test_plain_roles_are_counted_as_they_are_simulated():
    for role in PLAIN:
        size, one = MODELS["wan-1.3b"], hf.RoleMap.uniform(role, 30, 12)
        said = {None: size.kv_bytes(one)} | {store: size.stored_bytes(store, one) for store in BUFFERS}
        for store, count in said.items():
            held = held_bytes(store, role, 21, 3, 2).of(12, size.tokens_per_frame, size.head_dim)
            assert count == 30 * max(held)


def test_a_store_with_slots_twice_takes_a_third_less():
    size, roles = MODELS["wan-1.3b"], hf.RoleMap((PLAIN * 3,) * 30)
    lean, ring = (size.stored_bytes(store, roles) for store in ("lean", "ring"))
    assert size.kv_bytes(roles) < lean < 1.001 * size.kv_bytes(roles)
    assert 1.499 < ring / lean < 1.5


def test_a_store_that_there_is_not_is_refused_and_what_grows_has_no_size():
    size = MODELS["demo"]
    with pytest.raises(OptionError, match="unknown store 'disk': expected one of lean, reference, ring"):
        size.stored_bytes("disk", hf.RoleMap.uniform(Local(1), 6, 4))
    for store in ("lean", "reference", "ring"):
        assert size.stored_bytes(store, hf.RoleMap.uniform(Full(), 6, 4)) is None


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
    """Without the own chunk 3.22 frames are stored: a frame more per dynamic head than is published."""
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


def test_single_frames():
    row = row_of(told("--chunk", 1), "pyramid_forcing")
    assert [role["attended"] for role in row["roles"]] == [7, 9, 5.9375]


def test_sizes_can_be_given_one_by_one():
    answer = told("--model", "wan-14b", "--window", 12, "--tokens-per-frame", 10, "--dtype", "fp32")
    assert answer["model"]["frame_bytes"] == 2 * 40 * 40 * 128 * 10 * 4
    assert row_of(answer, "streaming_llm")["attended"] == 12
    assert round(row_of(told("--model", "wan-14b"), "sliding_window")["bytes"] / 2**30, 1) == 25.0


def test_the_table_says_what_is_unbounded_and_what_does_not_fit():
    said = RUN.invoke(app, ["presets", "--chunk", "6"])
    assert said.exit_code == 0
    for word in ("grows", "274 MiB", "infinity_rope", "not fit", "5.62 GiB", "100%"):
        assert word in said.stdout
    assert "at least 7" in row_of(told("--chunk", 6), "infinity_rope")["does_not_fit"]
    assert "raise far" in row_of(told("--chunk", 6), "pyramid_forcing")["does_not_fit"]


def test_the_table_shows_roles_and_says_what_is_not_known(monkeypatch):
    def refuse(size, roles):
        raise OptionError("odd patches")

    monkeypatch.setattr(ModelSize, "ring_bytes", refuse)
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
