"""`headforcing estimate` says what a real store holds, and what a real pass allocates."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

import headforcing as hf
from headforcing.attention.backends.sdpa import attend as sdpa
from headforcing.cli import app
from headforcing.errors import OptionError
from headforcing.measure import rehearsal
from headforcing.measure.census import Census, Remembering, ResultAlone
from headforcing.measure.estimate import (
    Setting,
    by_turns,
    dense,
    of_map,
    of_preset,
    streaming_at,
    takes,
    whole_heads,
)
from headforcing.measure.footprint import GRIDS, MODELS, ModelSize
from headforcing.measure.rehearsal import Layer, _cycle, _full, rehearse
from headforcing.roles import Anchor, Local, Memory, SlidingWindow
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.pyramid_forcing import Veil, Wave
from tests.hosts.rig import Rig

RUN = CliRunner()
GRID = (12, 12)
SMALL = ModelSize(1, 6, 16, window=21, chunk=3, tokens_per_frame=144, itemsize=4)
BOUND = (0.85, 1.1)
"""Allocated over said: kernels take scratch space, and some do in one step what is said of several."""


def row_of(name, size=SMALL):
    return of_preset(PRESETS[name], size).rows[0]


def bounded(name):
    return name not in {"full", "dummy_forcing"}


KNOWN = [name for name in PRESETS if bounded(name)]


class Real:
    """A layer with numbers on the CPU, that counts what its store holds and its queries see."""

    def __init__(self, row, size, grid, videos=1, store="ring"):
        self.layer, self.row, self.size, self.seen = Layer(size, grid, videos, "cpu"), row, size, []
        for parameter in self.layer.parameters():
            parameter.data.normal_(std=0.05)
        for name in ("k", "v"):
            self.layer.cache[name].zero_()
        self.handle = row and hf.apply_head_forcing(
            self.layer, [list(row)], window=size.window, chunk=size.chunk, store=store, backend=self.attend
        )

    def attend(self, parts, heads):
        pairs = sum(len(part.heads) * part.q.shape[1] * part.k.shape[1] for part in parts)
        queries = self.size.chunk * self.size.tokens_per_frame
        self.seen.append(Fraction(pairs, queries * heads * self.size.tokens_per_frame))
        return sdpa(parts, heads)

    def passes(self):
        """The passes that differ, once the memory is full: what to call, one after the other."""
        full = _full(self.row, self.size)
        for chunk in range(full + _cycle(self.row, self.size)):
            for time in (1.0, 0.0):
                self.layer.x.normal_()
                if chunk < full:
                    self.run(chunk, time)
                else:
                    yield lambda chunk=chunk, time=time: self.run(chunk, time)

    def run(self, chunk, time):
        with torch.no_grad():
            return self.layer(chunk, torch.tensor([time]))


# --- what is said is what is held ---------------------------------------------------------------------


@st.composite
def cases(draw):
    window, chunk = draw(st.sampled_from([(21, 3), (12, 3), (21, 1)]))
    grid = draw(st.sampled_from([(2, 6), (6, 4), (12, 2)]))
    heads, head_dim, itemsize = (draw(st.sampled_from(of)) for of in ([1, 2, 3, 5], [8, 12], [2, 4]))
    size = ModelSize(1, heads, head_dim, window, chunk, grid[0] * grid[1], itemsize)
    name = draw(st.sampled_from(KNOWN))
    if window < 21 and name in {"pyramid_forcing", "head_forcing"}:
        name = "streaming_llm"
    setting = Setting(size, grid, draw(st.sampled_from(["ring", "reference"])), draw(st.integers(1, 2)), 2)
    return name, setting


@settings(max_examples=6, deadline=None)
@given(cases())
@example(("pyramid_forcing", Setting(dataclasses.replace(SMALL, heads=12, head_dim=8), GRID, "ring", 1, 2)))
def test_a_real_layer_holds_sees_and_makes_what_was_said(case):
    """Bytes of the store and frames that queries see exactly, tensors alive at once but for RoPE's."""
    name, setting = case
    size = setting.size
    choice = of_map(name, hf.RoleMap((row_of(name, size),)), size)
    said = takes(choice, setting)
    real = Real(choice.rows[0], size, setting.grid, setting.videos, setting.store)
    held, made, noisy = [], [], []
    with ResultAlone():
        for number, run in enumerate(real.passes()):
            with Census() as census:
                run()
            made.append(census.most)
            noisy += real.seen[-1:] if number % 2 == 0 else []
            held.append(real.handle.status().stored_bytes)
    assert said.stored == 2 * max(held)
    assert said.attended == sum(noisy) / len(noisy)
    checks = 4 * 2 * 4 * size.heads  # sums that look for NaN, which a rehearsal has none of
    assert abs(max(made) - said.work) <= checks + 2 * by_frame(size, setting.videos)


@pytest.mark.parametrize("name", ["dense", "streaming_llm", "head_forcing", "memrope", "deep_forcing"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_real_pass_allocates_about_as_much_as_was_said(name, itemsize):
    """As the allocator tells it, with scratch space: softmax attention runs."""
    size = dataclasses.replace(SMALL, heads=12, head_dim=32, itemsize=itemsize)
    row = () if name == "dense" else row_of(name, size)
    said, real, most = rehearse(row, size, GRID), Real(row, size, GRID), 0
    for run in real.passes():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
        most = max(most, highest(profiled))
    held = real.handle.status().stored_bytes if row else real.layer.cache_bytes
    (low, high), more = BOUND, 2 * by_frame(size, 1)
    assert low <= most / said.work
    assert most - more <= high * said.work
    assert low <= (held + most) / (said.stored + said.work)
    assert held + most - more <= high * (said.stored + said.work)


def by_frame(size, videos):
    """Bytes with which a CPU turns one frame: its numbers and its turns in float64. Said is one kernel."""
    return 8 * size.tokens_per_frame * size.head_dim * (videos * size.heads + 2)


def highest(profiled):
    """The most bytes that the allocator had given away at once."""
    events = profiled.profiler.kineto_results.events()
    found = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = most = 0
    for _, count in found:
        live += count
        most = max(most, live)
    return most


def test_a_real_model_of_several_layers_holds_what_was_said_and_lets_go_what_was_said():
    rig = Rig(window=21)
    roles = hf.RoleMap(((Wave(), Veil(), Local(1), Memory()), (Anchor(1), Anchor(1), Veil(), Wave())))
    size = ModelSize(2, 4, 16, window=21, chunk=3, tokens_per_frame=16, itemsize=4)
    said = takes(of_map("mine", roles, size), Setting(size, (4, 4)))
    caches, held = rig.caches(), []
    with hf.apply_head_forcing(rig.model, roles) as handle:
        for chunk in range(28):
            rig.video(caches, 1, first=chunk)
            held.append(handle.status().stored_bytes)
        assert handle.status().released_bytes == dense(Setting(size, (4, 4))).stored
    assert max(held[12:]) == said.stored


@pytest.mark.parametrize("name", KNOWN)
def test_two_ways_to_count_agree_at_the_size_of_a_real_model(name):
    """Arithmetic and small tensors on one side, a layer of the real size without numbers on the other."""
    size = dataclasses.replace(MODELS["wan-1.3b"], layers=1)
    row = row_of(name, size)
    found = rehearse(row, size, GRIDS["wan-1.3b"])
    assert found.stored == size.ring_bytes(hf.RoleMap((row,)))
    assert found.released == size.window_bytes


def test_roles_that_ask_for_the_phase_are_told():
    row = (SlidingWindow(9, clean_window=6),) * 6
    found = rehearse(row, SMALL, GRID)
    assert found.stored == SMALL.ring_bytes(hf.RoleMap((row,)))


def test_videos_and_branches_multiply_what_is_stored_and_videos_the_work():
    choice = of_preset(PRESETS["streaming_llm"], SMALL)
    one, many = (takes(choice, Setting(SMALL, GRID, "ring", *n)) for n in ((1, 1), (3, 2)))
    assert (many.stored, many.kept) == (6 * one.stored, 6 * one.kept)
    assert many.attended == one.attended
    assert 2.9 < many.work / one.work < 3.1
    assert dense(Setting(SMALL, GRID, "ring", 3, 2)).stored == 6 * SMALL.window_bytes


def test_what_keeps_everything_grows():
    found = takes(of_preset(PRESETS["full"], SMALL), Setting(SMALL, GRID))
    assert (found.stored, found.kept, found.attended, found.work, found.peak) == (None,) * 5


def test_streaming_llm_sees_as_many_frames_to_the_nearest():
    wan = MODELS["wan-1.3b"]
    (role,) = streaming_at(Fraction(142, 10), wan).roles.counts()
    assert role == SlidingWindow(14, sink=3)
    (role,) = streaming_at(Fraction(4), wan).roles.counts()
    assert role == SlidingWindow(4, sink=1)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(1, 64))
def test_shares_become_whole_heads_that_fill_the_layer(parts, heads):
    shares = {str(n): part / sum(parts) for n, part in enumerate(parts)}
    found = whole_heads(shares, heads)
    assert sum(found.values()) == heads
    assert all(abs(found[label] - heads * share) < 1 for label, share in shares.items())


def test_heads_of_a_role_lie_apart():
    row = by_turns({Local(1): 2, Anchor(1): 4})
    assert [role == Local(1) for role in row] == [False, True, False, False, True, False]


# --- the census ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_census_counts_a_storage_once_and_as_long_as_it_lives(device):
    x = torch.zeros(1000, device=device)
    with Census() as census:
        y = x + 1
        z = y.view(10, 100)[2:]
        assert (census.live, census.most) == (4000, 4000)
        x.add_(1)
        del y
        assert census.live == 4000
        del z
        assert census.live == 0
        torch.cat([x, x]).sum()
    assert census.most == 8000 + 4


def test_softmax_attention_is_its_result_alone():
    q, k = torch.zeros(1, 2, 3, 8, device="meta"), torch.zeros(1, 2, 500, 8, device="meta")
    with Census() as census, ResultAlone():
        out = scaled_dot_product_attention(q, key=k, value=k)
        scaled_dot_product_attention(query=q, key=k, value=k)
    assert out.shape == q.shape
    assert census.most == 2 * q.nbytes


def on_meta(shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


MAKE = [
    lambda x: x + 1,
    lambda x: x + 1.0,
    lambda x: x * True,
    lambda x: x.transpose(0, 1),
    lambda x: x.transpose(0, 1).clone(),
    lambda x: x.contiguous(),
    lambda x: x[1:],
    lambda x: x.add_(x),
    lambda x: torch.cat([x, x], 1),
    lambda x: x.to(torch.bfloat16),
    lambda x: x > 2,
    lambda x: x.sort().values,
    lambda x: torch.full_like(x, 2),
    lambda x: torch.full((len(x), 5), 3, device="meta"),
    lambda x: torch.full((len(x), 5), 3.0, device="meta"),
    lambda x: x.repeat_interleave(torch.arange(1, len(x) + 1), 0),
    lambda x: x.repeat_interleave(torch.arange(1, len(x) + 1).flip(0) ** 2, 0),
]


@given(st.lists(st.integers(0, len(MAKE) - 1), max_size=12), st.sampled_from([torch.int64, torch.float32]))
def test_what_is_remembered_is_what_would_be_worked_out(steps, dtype):
    """Twice, as only the second time all of it is known; also what is alive after every step."""

    def made(known):
        x, found = on_meta((3, 4), dtype), []
        with contextlib.nullcontext() if known is None else Remembering(known), Census() as census:
            for step in steps:
                x = MAKE[step](x)
                x = x[:3, :6]
                found.append((x.shape, x.stride(), x.dtype, x.storage_offset(), census.live, census.most))
        return found

    slow, known = made(None), {}
    assert made(known) == slow
    count = len(known)
    assert made(known) == slow
    assert len(known) == count


def test_only_what_has_no_numbers_in_it_is_remembered():
    known = {}
    with Remembering(known):
        assert (torch.ones(2) + torch.ones(2)).tolist() == [2, 2]
        on_meta(2).add_(1)
        on_meta((2, 3)).view(6)
        on_meta(3).repeat_interleave(torch.tensor([1, 2, 3]))
        assert on_meta(3).repeat_interleave(torch.tensor([2, 2, 9])).shape == (13,)
        count = len(known)
        for _ in range(2):
            on_meta(2) + 1
    assert {str(asked[0]) for asked in known} == {"aten.empty.memory_format", "aten.add.Tensor"}
    assert len(known) == count + 1


@st.composite
def rows_of_several(draw):
    """A few layers of one map, whose roles are those of a preset in any numbers and order."""
    heads, name = draw(st.integers(2, 6)), draw(st.sampled_from(KNOWN))
    roles = list(PRESETS[name].roles(21, 3).values())
    layer = st.lists(st.sampled_from(roles), min_size=heads, max_size=heads).map(tuple)
    return draw(st.lists(layer, min_size=2, max_size=4))


@settings(max_examples=6, deadline=None)
@given(rows_of_several(), st.sampled_from(["ring", "reference", "lean"]), st.integers(1, 2))
def test_remembering_changes_no_number(layers, store, videos):
    size = dataclasses.replace(SMALL, layers=len(layers), heads=len(layers[0]))
    choice, setting = of_map("any", hf.RoleMap(tuple(layers)), size), Setting(size, GRID, store, videos)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rehearsal, "Remembering", lambda known: contextlib.nullcontext())
        slow = [rehearse(row, size, GRID, videos=videos, store=store) for row in choice.rows]
    known = {}
    quick = [rehearse(row, size, GRID, videos=videos, store=store, known=known) for row in choice.rows]
    assert quick == slow
    assert takes(choice, setting).work == max(one.work for one in slow)


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
    assert all(row["peak"] == row["stored"] + row["work"] for row in rows)


def test_the_bytes_are_those_of_headforcing_presets():
    """Also on a model of another number of heads than the published ones."""
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
    assert told("--preset", "streaming_llm", "--model", "demo")["model"]["grid"] == [4, 4]


def test_the_table_fits_a_terminal_and_says_what_is_not_counted():
    said = RUN.invoke(app, ["estimate", "--preset", "head_forcing"])
    assert said.exit_code == 0
    table = [line for line in said.stdout.splitlines() if "│" in line or "┃" in line]
    assert max(map(len, table)) <= 80
    assert "…" not in said.stdout
    for word in ("dense, 21 frames", "of dense", "5.62 GiB", "14.20", "not measured", "scratch space"):
        assert word in said.stdout


def test_the_documentation_shows_what_the_command_prints():
    page = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    options = "--model wan-1.3b --grid 30x52 --preset head_forcing"
    assert f"headforcing estimate {options}\n" in page
    printed = RUN.invoke(app, ["estimate", *options.split()]).stdout.splitlines()
    table = [line.rstrip() for line in printed if {"│", "┃", "━"} & set(line)]
    assert len(table) == 7
    assert "\n".join(table) in page
    low, high = BOUND
    assert f"within {low} to {high} of it" in page


def test_the_table_says_what_grows():
    said = RUN.invoke(app, ["estimate", "--preset", "full"])
    assert said.exit_code == 0
    assert "grows with the video" in said.stdout
    assert told("--preset", "full")["rows"][1]["peak"] is None


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


def test_a_grid_of_other_tokens_than_a_frame_is_refused():
    with pytest.raises(OptionError, match="4x5 patches has 20 tokens, the model 144"):
        Setting(SMALL, (4, 5))
    with pytest.raises(OptionError, match="2 or 4 to rehearse"):
        rehearse((), dataclasses.replace(SMALL, itemsize=8), GRID)
