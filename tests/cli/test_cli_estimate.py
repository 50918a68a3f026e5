"""`headforcing estimate` says what a real store holds and what real queries attend to."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import headforcing as hf
from benchmarks.meta_layer import Layer
from headforcing.attention.backends.sdpa import attend as sdpa
from headforcing.cli import app
from headforcing.measure import memory
from headforcing.measure.estimate import dense, estimate, of_map, of_preset, streaming_at
from headforcing.measure.memory import longest, steady
from headforcing.measure.sizes import MODELS, ModelSize
from headforcing.roles import Anchor, Full, Local, Memory, SlidingWindow
from headforcing.roles.maps import presets
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.pyramid_forcing import Veil, Wave
from tests.examples import examples
from tests.hosts.rig import Rig

pytestmark = pytest.mark.xdist_group("sizes")  # counts every preset once
RUN = CliRunner()
SMALL = ModelSize(1, 6, 16, window=21, chunk=3, grid=(12, 12), itemsize=4)
KNOWN = [name for name in PRESETS if name not in {"full", "dummy_forcing"}]


def row_of(name, size=SMALL):
    """Heads of a preset, each label in turn."""
    roles = [
        role.fit(size.window, size.chunk) for role in PRESETS[name].roles(size.window, size.chunk).values()
    ]
    return [roles[head % len(roles)] for head in range(size.heads)]


class Real:
    """A layer on the CPU, that counts what its store holds and its queries attend to."""

    def __init__(self, row, size, videos, store):
        self.layer, self.row, self.size, self.attended = Layer(size, videos, "cpu"), row, size, []
        for parameter in self.layer.parameters():
            parameter.data.normal_(std=0.05)
        for name in ("k", "v"):
            self.layer.cache[name].zero_()
        self.handle = hf.apply_head_forcing(
            self.layer, [row], window=size.window, chunk=size.chunk, store=store, backend=self.attend
        )

    def attend(self, parts, heads):
        pairs = sum(len(part.heads) * part.q.shape[1] * part.k.shape[1] for part in parts)
        queries = self.size.chunk * self.size.tokens_per_frame
        self.attended.append(Fraction(pairs, queries * heads * self.size.tokens_per_frame))
        return sdpa(parts, heads)

    def run(self):
        """Bytes stored and frames attended in noisy passes, through a cycle once memory is full."""
        size, held, attended = self.size, [], []
        full = -(-(max(role.capacity(size.chunk) for role in self.row) + 2 * size.window) // size.chunk)
        cycle = math.lcm(*(steady(role, size.window, size.chunk).cycle for role in set(self.row)))
        for chunk in range(full + cycle):
            for time in (1.0, 0.0):
                self.layer.x.normal_()
                with torch.no_grad():
                    self.layer(chunk, torch.tensor([time]))
            held.append(self.handle.status().stored_bytes)
            attended.append(self.attended[-2])
        return held[-cycle:], attended[-cycle:]


# --- what is said is what is held ---------------------------------------------------------------------


@st.composite
def cases(draw):
    window, chunk = draw(st.sampled_from([(21, 3), (12, 3), (21, 1)]))
    grid = draw(st.sampled_from([(2, 6), (6, 4), (12, 2)]))
    heads, head_dim, itemsize = (draw(st.sampled_from(of)) for of in ([1, 2, 3, 5], [8, 12], [2, 4]))
    size = ModelSize(1, heads, head_dim, window, chunk, grid, itemsize)
    name = draw(st.sampled_from(KNOWN))
    if window < 21 and name in {"pyramid_forcing", "head_forcing"}:
        name = "streaming_llm"
    return name, size, draw(st.sampled_from(["ring", "lean"])), draw(st.integers(1, 2))


@settings(max_examples=examples(6), deadline=None)
@given(cases())
@example(("pyramid_forcing", dataclasses.replace(SMALL, heads=3, head_dim=8, grid=(2, 6)), "ring", 1))
def test_a_real_layer_stores_and_attends_to_what_was_said(case):
    name, size, store, videos = case
    row = row_of(name, size)
    said = estimate(name, of_map(name, hf.RoleMap((tuple(row),)), size), size, store=store, streams=videos)
    held, attended = Real(row, size, videos, store).run()
    assert said.stored == max(held)
    assert said.attended == sum(attended) / len(attended)


@pytest.mark.slow
def test_a_real_model_of_several_layers_stores_and_releases_what_was_said():
    rig = Rig(window=21)
    roles = hf.RoleMap(((Wave(), Veil(), Local(1), Memory()), (Anchor(1), Anchor(1), Veil(), Wave())))
    size = ModelSize(2, 4, 16, window=21, chunk=3, grid=(4, 4), itemsize=4)
    said = estimate("mine", of_map("mine", roles, size), size, store="ring")
    caches = rig.caches()
    with hf.apply_head_forcing(rig.model, roles) as handle:
        held = rig.stored(handle, caches, 28)
        assert handle.status().released_bytes == dense(size).stored
    assert max(held[12:]) == said.stored


def check_that_it_fits_as_long_as_is_said(store):
    """A real model stores more than a room for the first time after as many frames as were said."""
    rig = Rig(window=21)
    roles = hf.RoleMap(((Full(), Veil(), Local(1), Memory()), (Full(), Anchor(1), Veil(), Full())))
    size = ModelSize(2, 4, 16, window=21, chunk=3, grid=(4, 4), itemsize=4)
    with hf.apply_head_forcing(rig.model, roles, store=store) as handle:
        held = rig.stored(handle, rig.caches(), 12)
    fitted = of_map("mine", roles, size)
    for room in (0, held[0] - 1, held[0], held[4], held[-1] - 1):
        first = next(chunk for chunk, stored in enumerate(held) if stored > room)
        assert longest(fitted, size, store, room) == 3 * first
        assert longest(fitted, size, store, 2 * room, streams=2) == 3 * first


@pytest.mark.parametrize("store", ["ring", pytest.param("lean", marks=pytest.mark.slow)])
def test_what_grows_fits_as_long_as_is_said(store):
    check_that_it_fits_as_long_as_is_said(store)


def test_a_chunk_that_is_not_counted_is_found(monkeypatch):
    right = memory._moments
    monkeypatch.setattr(memory, "_moments", lambda *given: itertools.islice(right(*given), 1, None))
    with pytest.raises(AssertionError):
        check_that_it_fits_as_long_as_is_said("ring")


def test_timelines_multiply_what_is_stored():
    roles = of_preset(PRESETS["streaming_llm"], SMALL)
    one, many = (estimate("s", roles, SMALL, store="ring", streams=streams) for streams in (1, 6))
    assert (many.stored, many.kept) == (6 * one.stored, 6 * one.kept)
    assert many.attended == one.attended
    assert dense(SMALL, 6).stored == 6 * SMALL.window_bytes


def test_what_keeps_everything_grows():
    found = estimate("full", of_preset(PRESETS["full"], SMALL), SMALL, store="ring")
    assert (found.stored, found.kept, found.attended) == (None,) * 3


def test_streaming_llm_attends_to_as_many_frames_to_the_nearest():
    wan = MODELS["wan-1.3b"]
    for frames, expected in (
        (Fraction(142, 10), SlidingWindow(14, sink=3)),
        (Fraction(4), SlidingWindow(4, sink=1)),
    ):
        (role,) = streaming_at(frames, wan)[1].counts()
        assert role == expected


# --- headforcing estimate -----------------------------------------------------------------------------


def told(*options):
    answer = RUN.invoke(app, ["estimate", *map(str, options), "--json"])
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def test_a_preset_on_a_model_beside_dense_and_streaming_llm():
    answer = told("--preset", "head_forcing")
    rows = answer["rows"]
    assert [row["name"] for row in rows] == ["dense, 21 frames", "head_forcing", "streaming_llm, 14 frames"]
    assert answer["released_bytes"] == rows[0]["stored"] == MODELS["wan-1.3b"].window_bytes
    assert [round(row["attended"], 2) for row in rows] == [21, 14.2, 14]
    assert rows[1]["of_dense"]["kept"] == rows[1]["kept"] / rows[0]["kept"]
    assert answer["attention_cost_of_dense"] == pytest.approx(14.2 / 21)


def test_the_bytes_are_those_of_headforcing_presets(monkeypatch):
    """Also on a model of another number of heads than the published ones."""
    monkeypatch.setattr(presets, "PRESETS", {"forcing_kv": PRESETS["forcing_kv"]})
    answer = told("--preset", "forcing_kv", "--model", "wan-14b")
    by_presets = json.loads(RUN.invoke(app, ["presets", "--model", "wan-14b", "--json"]).stdout)["presets"]
    (other,) = [row for row in by_presets if row["name"] == "forcing_kv"]
    row = answer["rows"][1]
    assert (row["kept"], row["stored"]) == (other["bytes"], other["ring_bytes"])
    assert row["attended"] == pytest.approx(other["attended"])


def test_a_role_map_file_with_sizes_one_by_one(tmp_path):
    file = tmp_path / "roles.json"
    hf.RoleMap(((Local(1), Anchor(1)), (Local(1), Local(1)))).save(file)
    sizes = ["--layers", 2, "--heads", 2, "--head-dim", 16, "--grid", "4x5", "--dtype", "fp32"]
    answer = told("--roles", file, *sizes, "--videos", 2, "--branches", 2)
    assert answer["model"]["tokens_per_frame"] == 20
    assert answer["rows"][1]["kept"] == 4 * 4 * 4 * 2 * 20 * 16 * 4  # timelines, frames, heads, k and v
    assert answer["rows"][1]["attended"] == 4
    assert answer["rows"][2]["name"] == "streaming_llm, 4 frames"


def test_the_demo_is_one_of_the_models():
    assert told("--preset", "streaming_llm", "--model", "demo")["model"]["grid"] == [4, 6]


def test_the_table_fits_a_terminal_and_says_what_is_not_counted():
    said = RUN.invoke(app, ["estimate", "--preset", "head_forcing"])
    assert said.exit_code == 0
    table = [line for line in said.stdout.splitlines() if "│" in line or "┃" in line]
    assert max(map(len, table)) <= 80
    assert "…" not in said.stdout
    for word in ("dense, 21 frames", "of dense", "5.62 GiB", "14.20", "not measured", "activations"):
        assert word in said.stdout


def test_what_fits_beside_the_weights():
    size = ("--model", "demo", "--weights", "10MB")
    (lean, ring) = told("--preset", "streaming_llm", "--vram", "20MB", *size)["rows"]
    assert (lean["store"], ring["store"]) == ("lean", "ring")
    (_, _, streaming) = told("--preset", "streaming_llm", "--model", "demo", "--store", "lean")["rows"]
    assert lean["stored"] == streaming["stored"]
    room = lean["stored"] + 10_000_000
    (lean, ring) = told("--preset", "streaming_llm", "--vram", room, *size)["rows"]
    assert lean["frames"] is None
    assert ring["frames"] is not None
    (lean, _) = told("--preset", "streaming_llm", "--vram", room - 1, *size)["rows"]
    assert lean["frames"] is not None


def test_every_preset_that_can_be_counted_is_shown():
    said = RUN.invoke(app, ["estimate", "--vram", "40MB", "--weights", "35MB", "--model", "demo"]).stdout
    for word in ("full", "grows", "any length", "up to", "left out: dummy_forcing"):
        assert word in said
    assert max(len(line) for line in said.splitlines() if "│" in line) <= 80


def test_the_documentation_shows_what_the_command_prints():
    page = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    options = "--model wan-1.3b --grid 30x52 --preset head_forcing"
    assert f"headforcing estimate {options}\n" in page
    printed = RUN.invoke(app, ["estimate", *options.split()]).stdout.splitlines()
    table = [line.rstrip() for line in printed if {"│", "┃", "━"} & set(line)]
    assert len(table) == 7
    assert "\n".join(table) in page


def test_the_table_says_what_grows():
    said = RUN.invoke(app, ["estimate", "--preset", "full"])
    assert said.exit_code == 0
    assert "grows with the video" in said.stdout
    assert told("--preset", "full")["rows"][1]["stored"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["one of --preset and --roles"]),
        (["--preset", "full", "--roles", "x.json"], ["one of --preset and --roles"]),
        (["--preset", "nope"], ["'nope'", "streaming_llm"]),
        (["--preset", "dummy_forcing"], ["not published", "--roles"]),
        (["--preset", "full", "--model", "wan-5b"], ["wan-1.3b, wan-14b, demo"]),
        (
            ["--preset", "pyramid_forcing", "--grid", "45x80"],
            ["Veil", "(45, 80)", "multiples of 2", "--grid"],
        ),
        (["--preset", "forcing_kv", "--grid", "5x7"], ["Dynamic", "(5, 7)", "6 equal pieces"]),
        (["--preset", "streaming_llm", "--grid", "30"], ["'30'", "HEIGHTxWIDTH"]),
        (["--preset", "streaming_llm", "--grid", "0x4"], ["'0x4'"]),
        (["--preset", "streaming_llm", "--store", "nope"], ["'nope'", "reference, ring"]),
        (["--preset", "streaming_llm", "--videos", "0"], ["videos is 0"]),
        (["--preset", "full", "--weights", "6GB"], ["--vram only"]),
        (["--vram", "24GB"], ["--vram requires --weights"]),
        (["--vram", "24GB", "--weights", "24GB"], ["leave nothing of --vram 24GB"]),
        (["--vram", "much", "--weights", "1GB"], ["--vram is 'much'", "such as 2GB"]),
        (["--preset", "streaming_llm", "--dtype", "fp8"], ["bf16, fp16, fp32"]),
        (["--preset", "infinity_rope", "--window", "5"], ["trained on 5", "at most 2"]),
        (["--roles", "missing.json"], ["missing.json", "cannot be read"]),
    ],
)
def test_a_mistake_gives_one_message(options, words):
    answer = RUN.invoke(app, ["estimate", *options])
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    for word in words:
        assert word in answer.stderr


def test_a_map_of_another_model_is_refused(tmp_path):
    file = tmp_path / "roles.json"
    hf.RoleMap.uniform(Local(1), 6, 4).save(file)
    answer = RUN.invoke(app, ["estimate", "--roles", str(file)])
    assert answer.exit_code == 2
    assert "--layers 6 --heads 4" in answer.stderr
