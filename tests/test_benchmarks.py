"""The benchmarks of speed and memory run, say what every number is about, and compare what they claim to."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from headforcing.measure.memory import steady, stored_bytes
from headforcing.roles import SlidingWindow
from headforcing.roles.maps.role_map import RoleMap
from tests.examples import examples

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
ABOUT = {"variant", "scope", "warm_up", "backend", "store", "dtype", "device", "frames"}
TIMED = {"ideal", "best_wall", "best_wall_ratio", "median_wall", "stored_bytes", "roles", "passes"}
TOLD = {"pass_bytes", "growth_bytes", "host_syncs", "sync_places", "allocated_bytes"}


@pytest.fixture(scope="module")
def bench():
    """Modules of the folder by name; they import each other as scripts do."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_benchmark_runs(tmp_path):
    """One run for all of it, because it takes half a minute: `all.py --quick`."""
    pytest.importorskip("matplotlib", reason="every benchmark draws a picture")
    command = [sys.executable, str(FOLDER / "all.py"), "--quick", "--device", "cpu", "--threads", "1"]
    answer = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for word in ("backend", "store ring", "device cpu", "float32", "12 chunks"):
        assert word in answer.stdout
    for check in CHECKS:
        check(tmp_path)


def every_row_says_what_it_is_about(folder):
    reports = [read(folder, name) for name in ("attention", "presets", "transformer")]
    assert all(report["cases"] and report["machine"]["threads"] == 1 for report in reports)
    for found in (found for report in reports for found in report["cases"]):
        for row in found["rows"]:
            assert row.keys() >= ABOUT | TIMED
            assert len(row["passes"]) == found["chunks"]
            assert all(len(chunk) == 5 for chunk in row["passes"])
            assert all(row[name] for name in ABOUT)
        assert found["rows"][0]["variant"] == "dense"
        assert found["identity_differs_by"] == 0


def the_transformer_says_what_only_an_accelerator_knows(folder):
    for found in read(folder, "transformer")["cases"]:
        for row in found["rows"]:
            assert row.keys() >= TOLD | {"attention_share", "per_layer", "released_bytes", "equals"}
            assert all(row[name] is None for name in TOLD), "a CPU does not tell"


def what_a_grid_cannot_do_is_said_and_run_on_one_that_can(folder):
    first, odd, even = read(folder, "transformer")["cases"]
    assert (odd["grid"], even["grid"]) == ([5, 6], [4, 6])
    assert any("multiples of 2" in reason for reason in odd["left_out"])
    names = [[row["variant"].partition(":")[0] for row in found["rows"]] for found in (first, odd, even)]
    assert "pyramid_forcing" in names[0]
    assert "pyramid_forcing" not in names[1]
    assert names[2][:2] == ["dense", "pyramid_forcing"]
    assert "head_forcing" not in names[2]


def streaming_llm_has_the_bytes_or_the_frames_that_it_is_said_to_have(folder):
    for found in read(folder, "transformer")["cases"]:
        rows = {row["variant"]: row for row in found["rows"]}
        for row in rows.values():
            for kind, _, name in (other.partition(" of ") for other in row["equals"]):
                key = {"bytes": "stored_bytes", "frames": "frames"}[kind]
                one_frame = row[key] / row["frames"]
                assert abs(row[key] - rows[name][key]) <= 0.75 * one_frame


def the_trend_and_the_line(folder):
    report = read(folder, "length")
    assert report["flat"][0]["variant"] == "dense"
    for row in report["flat"]:
        assert row.keys() >= ABOUT
        for clock in ("wall", "cpu"):
            assert row[clock]["low"] <= row[clock]["high"]
            assert len(row[clock]["seconds"]) == row["chunks"] == 40
    assert [row["frames"] for row in report["linear"]] == [6, 12, 24]
    assert all(row.keys() >= ABOUT | {"fitted", "largest_residual"} for row in report["linear"])


def calls_are_compared_at_equal_tokens(folder):
    rows = read(folder, "calls")["rows"]
    assert rows
    assert all(row.keys() >= (ABOUT - {"variant"}) | {"heads", "one", "per_frame"} for row in rows)


def the_report_holds_every_table_and_says_where_numbers_are_from(folder):
    page = (folder / "report.md").read_text(encoding="utf-8")
    machine = read(folder, "machine")
    assert {"torch", "cpu", "threads", "load_average", "device", "commit"} <= machine.keys()
    for name in ("transformer", "attention", "presets", "length"):
        assert f"## {name}\n\n`python benchmarks/" in page
        assert (folder / f"{name}.png").stat().st_size > 10_000
        report = read(folder, name)
        for found in report.get("cases", []):
            assert all(f"| {row['variant']} |" in page for row in found["rows"])
    assert page.count("Scope: ") == page.count("Warm-up: ") == page.count("Backend sdpa, store ") >= 7


CHECKS = [
    every_row_says_what_it_is_about,
    the_transformer_says_what_only_an_accelerator_knows,
    what_a_grid_cannot_do_is_said_and_run_on_one_that_can,
    streaming_llm_has_the_bytes_or_the_frames_that_it_is_said_to_have,
    the_trend_and_the_line,
    calls_are_compared_at_equal_tokens,
    the_report_holds_every_table_and_says_where_numbers_are_from,
]


# --- parts --------------------------------------------------------------------------------------------


def test_the_weights_of_twins_are_one(bench):
    wan = bench("wan_shaped")
    model = wan.random_model(wan.SHAPES["tiny"], 2, torch.float32, "cpu", chunk=3, window=21, tokens=24)
    twin = model.twin()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    assert twin.blocks[0].self_attn is not model.blocks[0].self_attn


@pytest.mark.parametrize(("name", "billions"), [("wan-1.3b", 1.42), ("wan-14b", 14.29)])
def test_the_shapes_have_as_many_weights_as_the_models_they_are_of(bench, name, billions):
    wan = bench("wan_shaped")
    shape = wan.SHAPES[name]
    with torch.device("meta"):
        model = wan.WanShaped(shape, shape.layers, 3, 21, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(
        billions, rel=0.02
    )


def test_softmax_attention_is_left_out_on_both_sides_and_then_back(bench):
    measuring, variant = bench("measuring"), bench("variant")
    case = measuring.Case(2, 4, torch.float32, "cpu")
    sides = [
        variant.Variant(name, roles, case, "sdpa", {})
        for name, roles in (("dense", []), ("forced", [SlidingWindow(6)] * 12))
    ]
    with measuring.without_softmax_attention():
        assert all(not side.run(0).any() for side in sides)
    assert all(side.run(0).any() for side in sides)


def test_the_picture_of_the_folders_shows_the_imports_that_there_are(bench):
    pytest.importorskip("matplotlib", reason="it is drawn with matplotlib")
    assert bench("import_graph").is_current(), "python benchmarks/import_graph.py draws it anew"


@given(frames=st.integers(4, 21), heads=st.integers(1, 12))
@settings(max_examples=examples(6, nightly=300), deadline=None)
def test_streaming_llm_is_its_own_equal(bench, frames, heads):
    """At the bytes and at the frames of a window there is that window."""
    mixes, measuring = bench("mixes"), bench("measuring")
    case = measuring.Case(4, 6, torch.bfloat16, "cpu", heads=heads)
    window = mixes.streaming(frames, case)
    assert mixes.equal_bytes(window, case, "ring") == frames
    assert mixes.equal_frames(window, case) == frames


def test_what_takes_more_than_the_window_has_no_equal(bench):
    mixes, measuring = bench("mixes"), bench("measuring")
    case = measuring.Case(4, 6, torch.bfloat16, "cpu")
    (pyramid,) = [mix for mix in mixes.preset_mixes(case, False) if mix.name.startswith("pyramid")]
    size = mixes.size_of(case)
    held = stored_bytes(size, "ring", RoleMap((tuple(pyramid.roles),)))
    assert held > stored_bytes(size, "ring", RoleMap((tuple(mixes.streaming(21, case).roles),)))
    assert mixes.equal_bytes(pyramid, case, "ring") is None
    assert mixes.equal_frames(pyramid, case) == 10
    assert all(steady(role, 21, 3) is not None for role in pyramid.roles)


class Turns:
    """What takes turns, and who had one."""

    def __init__(self, name, log):
        self.name, self.log, self.chunk = name, log, 0

    def run(self, number):
        self.log.append((self.name, self.chunk, number))


def test_turns_are_taken_pass_by_pass_in_rotating_order(bench):
    log = []
    taken = bench("measuring").measure([Turns(name, log) for name in "abc"], 2)
    assert [len(chunks) for chunks in taken] == [2, 2, 2]
    assert [len(chunk) for chunk in taken[0]] == [5, 5]
    turns = ["".join(name for name, *_ in log[at : at + 3]) for at in range(0, len(log), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert turns[:4] == ["abc", "bca", "bca", "cab"]
    assert [number for name, chunk, number in log if name == "a"] == [0, 1, *range(5), *range(5)]


def test_nothing_more_begins_when_the_time_is_over(bench):
    measuring = bench("measuring")
    taken = measuring.measure([Turns("a", [])], 9, measuring.Deadline(0))
    assert len(taken[0]) == 1, "one chunk in any case"
    assert not measuring.Deadline(None).passed


def no_time(bench, monkeypatch, folder, name):
    """The report of a benchmark whose time is over when it begins."""
    out = folder / f"{name}.json"
    told = ["--quick", "--device", "cpu", "--minutes", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [name, *told])
    bench(name).main()
    return read(folder, name)


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 4))
@settings(max_examples=examples(10, nightly=400), deadline=None)
def test_the_file_has_every_case_that_was_measured(bench, tmp_path_factory, count, last, breaks):
    """Also when the time is over behind some, and when one breaks down: those before it are not lost."""
    reporting, folder = bench("reporting"), tmp_path_factory.mktemp("reported")
    begun, shown, pictures = [], [], []

    class Ends:
        passed = property(lambda self: len(begun) >= last)

    def measured(number, deadline):
        begun.append(number)
        if number == breaks:
            raise ArithmeticError
        return {"number": number}

    args = argparse.Namespace(device="cpu", minutes=None, out=folder / "report.json")
    cases = [(f"case {number}", functools.partial(measured, number)) for number in range(count)]
    fails = contextlib.nullcontext() if breaks >= min(count, last) else pytest.raises(ArithmeticError)
    with pytest.MonkeyPatch.context() as patched, fails:
        patched.setattr(reporting, "Deadline", lambda minutes: Ends())
        patched.setattr(reporting, "draw_ratios", lambda cases, path: pictures.append((len(cases), path)))
        reporting.report_cases(Console(quiet=True), args, "head", cases, shown.append)
    done = list(range(min(count, last, breaks)))
    assert [found["number"] for found in shown] == done
    assert pictures == [(number + 1, folder / "report.png") for number in done]
    if breaks < min(count, last) and not done:
        return
    report = read(folder, "report")
    assert [found["number"] for found in report["cases"]] == done
    left = [] if breaks < min(count, last) else range(min(count, last), count)
    assert report["left_out"] == [f"case {number}: no time was left" for number in left]


@pytest.mark.parametrize("name", ["attention", "transformer"])
def test_what_is_left_out_is_written_where_nothing_was_run(bench, monkeypatch, tmp_path, name):
    report = no_time(bench, monkeypatch, tmp_path, name)
    assert report["cases"] == []
    assert report["left_out"]
    assert all("no time was left" in reason for reason in report["left_out"])


def test_calls_stop_when_the_time_is_over(bench, monkeypatch, tmp_path):
    report = no_time(bench, monkeypatch, tmp_path, "calls")
    assert len(report["rows"]) == 1
    assert len(report["left_out"]) == 17


def test_a_line_is_not_drawn_through_too_few_chunks(bench, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="every benchmark draws a picture")
    report = no_time(bench, monkeypatch, tmp_path, "length")
    assert [row["chunks"] for row in report["flat"]] == [1] * 4
    for row in report["flat"]:
        assert {row["wall"][name] for name in ("per_1000_chunks", "low", "high")} == {None}
    assert "too few chunks" in bench("tables").length(report)
    trend = bench("length").trend
    assert trend([1.0] * 19)["low"] is None
    assert trend([1.0] * 20)["low"] == 0


def all_of(bench, **told):
    usual = {"device": "cpu", "backends": ["sdpa"], "store": "ring", "quick": True, "threads": None}
    return bench("all"), argparse.Namespace(**usual | told)


def test_only_attention_and_transformer_are_run_once_per_backend(bench):
    every, args = all_of(bench, backends=["auto", "varlen"])
    asked = [(part.name, part.options[part.options.index("--backend") + 1]) for part in every.parts(args)]
    assert asked == [
        ("transformer-auto", "auto"),
        ("transformer-varlen", "varlen"),
        ("attention-auto", "auto"),
        ("attention-varlen", "varlen"),
        ("presets", "auto"),
        ("length", "auto"),
        ("calls", "sdpa"),
    ]


def test_no_part_is_begun_when_the_time_of_all_is_over(bench, monkeypatch, tmp_path):
    every, args = all_of(bench)
    monkeypatch.setattr(every, "begun", lambda command, minutes: "ended")
    part = every.parts(args)[0]
    assert every.run(part, 0.0, tmp_path)["ended"] == every.NOT_BEGUN
    assert every.run(part, 0.1, tmp_path)["ended"] == "ended"


def test_a_device_with_a_number_becomes_the_one_that_is_used(bench, monkeypatch):
    module, numbers = types.SimpleNamespace(), []
    module.set_device = numbers.append
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    for device in ("cpu", "cuda", "cuda:1"):
        bench("measuring").prepare(device, None)
    assert numbers == ["cuda:1"]


@given(st.floats(-0.5, 0.5), st.integers(50, 400))
@settings(max_examples=examples(25), deadline=None)
def test_a_trend_is_found_whatever_single_chunks_do(bench, rise, count):
    """`rise` per thousand chunks of a millisecond, with a chunk in ten that takes ten times as long."""
    seconds = [1e-3 * (1 + rise * n / 1000) * (10 if n % 10 == 3 else 1) for n in range(count)]
    found = bench("length").trend(seconds)
    middle = found["median"] / 1e-3
    assert found["low"] - 0.02 <= rise / middle <= found["high"] + 0.02
    assert found["per_1000_chunks"] == pytest.approx(rise / middle, abs=0.05)


@given(st.floats(1e-4, 1), st.floats(1e-6, 1))
def test_a_line_is_found(bench, fixed, per_frame):
    frames = [6, 12, 24, 48]
    found = bench("length").line(frames, [fixed + per_frame * one for one in frames])
    assert found == pytest.approx((fixed, per_frame, 0), rel=1e-6, abs=1e-9)


def a_case(*points):
    rows = [{"variant": name, "frames": frames, "best_wall_ratio": ratio} for name, frames, ratio in points]
    return {"case": "float32, 4x6 = 24 tokens per frame, cpu", "rows": rows}


def drawn(bench, monkeypatch, cases, path):
    """The names in a picture as they lie when it is written, panel by panel, and the dots."""
    from headforcing.measure.plots import style

    figures, found = [], []
    new_figure = style.new_figure
    monkeypatch.setattr(style, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    bench("pictures").draw_ratios(cases, path)
    (figure,) = figures
    for ax in figure.axes[: len(cases)]:
        dots = [ax.transData.transform(line.get_xydata()[0]) for line in ax.lines[1:]]
        names = {(text.get_text(), text.xy): text.get_window_extent() for text in ax.texts}
        found.append((names, dots))
    return found


POINTS = st.lists(
    st.tuples(st.sampled_from(["a", "StreamingLLM", "head_forcing"]), st.integers(4, 6)), max_size=5
)
NEAR = st.tuples(st.sampled_from([0.3, 0.31, 1.0]), st.floats(0.0, 0.02))


@given(st.lists(st.tuples(POINTS, NEAR), min_size=1, max_size=2))
@settings(max_examples=examples(4, nightly=80), deadline=None)
def test_names_in_a_picture_do_not_overlap(bench, tmp_path_factory, told):
    """Also of variants that attend to as many frames in as much time; nor do they hide a point."""
    pytest.importorskip("matplotlib", reason="it is a picture")
    cases = []
    for points, (ratio, step) in told:
        near = [(f"{name} {n}", frames, ratio + n * step) for n, (name, frames) in enumerate(points)]
        cases.append(a_case(("dense", 21, 1.0), *near, ("identity", 21, 1.0)))
    with pytest.MonkeyPatch.context() as patched:
        panels = drawn(bench, patched, cases, tmp_path_factory.mktemp("drawn") / "ratios.png")
    for case, (names, dots) in zip(cases, panels, strict=True):
        assert len(names) == len(dots) == len(case["rows"])
        boxes = list(names.values())
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:index])
            assert not any(box.contains(*dot) for dot in dots)


def test_a_picture_is_the_same_every_time(bench, tmp_path):
    pytest.importorskip("matplotlib", reason="it is a picture")
    case = a_case(("dense", 21, 1.0), ("b", 4, 0.2), ("a", 4, 0.2), ("identity", 21, 1.0))
    other = {**case, "rows": case["rows"][:1] + case["rows"][:0:-1]}
    for name, one in (("one", case), ("two", case), ("other", other)):
        bench("pictures").draw_ratios([one], tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with pytest.MonkeyPatch.context() as patched:
        ((names, _),) = drawn(bench, patched, [case], tmp_path / "names.png")
    with pytest.MonkeyPatch.context() as patched:
        ((turned, _),) = drawn(bench, patched, [other], tmp_path / "names.png")
    assert {name: box.bounds for name, box in names.items()} == {n: b.bounds for n, b in turned.items()}


class Pretended:
    """The module of an accelerator that there is not: memory that a video takes, and two places that wait."""

    def __init__(self):
        self.now = self.most = 100
        self.mode = "default"

    def take(self, count):
        self.now += count
        self.most = max(self.most, self.now)

    def synchronize(self):
        assert self.mode == "default"

    def reset_peak_memory_stats(self):
        self.most = self.now

    def memory_allocated(self):
        return self.now

    def max_memory_allocated(self):
        return self.most

    def set_sync_debug_mode(self, mode):
        self.mode = mode
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)


def test_what_an_accelerator_tells_is_read_rightly(bench, monkeypatch):
    module, numbers = Pretended(), []

    class Video:
        chunk = 7

        def launch(self, number):
            numbers.append((self.chunk, number))
            module.take(50)
            module.take(-50 + (number == 0))  # a byte per chunk stays
            if number < 2:
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    facts = bench("accelerator").accelerator_facts(Video(), "cuda", 3)
    assert numbers == [(chunk, number) for chunk in (7, 8, 9) for number in range(5)]
    (place,) = facts.pop("sync_places")
    assert place.startswith("test_benchmarks.py:")
    assert facts == {"pass_bytes": 53, "growth_bytes": 3, "host_syncs": 2}
    assert module.mode == "default"
    assert set(bench("accelerator").accelerator_facts(Video(), "cpu", 3).values()) == {None}


# --- launches -----------------------------------------------------------------------------------------


def test_launches_are_counted_and_views_are_not(bench):
    launches = bench("launches")
    x, counter = torch.zeros(4, 3), torch.zeros(1)
    with launches.Launches([counter]) as seen:
        x.view(12)[2:].t()
        torch.empty(3)
        x.add_(1)
        (x + x).t().contiguous()
        counter.item()
        x[0, 0].item()
    assert (seen.launches, seen.reads) == (3, 1)


LAUNCHES = {
    "dense": (37, 33),
    "streaming_llm": (41, 30),
    "head_forcing": (134, 48),
    "pyramid_forcing": (124, 50),
}
"""Kernels of the first pass over a chunk, and of a later one; heads of a role scattered."""


def rows_of(launches, names):
    found = {name.partition(":")[0]: row for name, row in launches.rows().items() if "neighbours" not in name}
    return {name: found[name] for name in names}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "pyramid_forcing" else pytest.mark.slow) for n in LAUNCHES]
)
def test_a_layer_launches_as_many_kernels_as_the_table_says(bench, name):
    launches = bench("launches")
    found = launches.counted(rows_of(launches, [name])[name], (2, 6), "ring")
    assert (found["first_launches"], found["later_launches"]) == LAUNCHES[name]


@pytest.mark.slow
def test_no_memory_reads_the_counters_of_the_host_and_one_role_launches_less_than_dense_does(bench):
    launches = bench("launches")
    found = {name: launches.counted(row, (2, 6), "ring") for name, row in launches.rows().items()}
    dense = found.pop("dense")
    assert (dense["first_reads"], dense["later_reads"]) == (2, 2)
    assert all(row["first_reads"] == row["later_reads"] == 0 for row in found.values())
    assert all(row["later_launches"] <= row["first_launches"] for row in found.values())
    alike = [row["later_launches"] for name, row in found.items() if ":" not in name]
    assert max(alike) < dense["later_launches"]


# --- host_time and predict ----------------------------------------------------------------------------


def test_host_time_is_taken_and_a_speed_predicted_from_it(bench, tmp_path, monkeypatch, capsys):
    host_time, predict = bench("host_time"), bench("predict")
    few = rows_of(bench("launches"), ["dense", "streaming_llm"])
    for module in (host_time, predict):
        monkeypatch.setattr(module, "rows", lambda: few)
    times, out = tmp_path / "host.json", tmp_path / "predict.json"
    monkeypatch.setattr("sys.argv", ["host_time", "--chunks", "2", "--out", str(times)])
    host_time.main()
    found = json.loads(times.read_text("utf-8"))["rows"]
    assert [row["variant"] for row in found] == [*few]
    assert all(
        0 < row[f"{which}_least"] <= row[f"{which}_median"] for row in found for which in ("first", "later")
    )
    monkeypatch.setattr(
        "sys.argv", ["predict", "--host-time", str(times), "--out", str(out), "--grids", "30x52"]
    )
    predict.main()
    said = json.loads(out.read_text("utf-8"))["rows"]
    assert {row["speed"] for row in said if row["variant"] == "dense"} == {1}
    assert len(said) == len(few) * len(predict.CARDS) * 2
    assert "streaming_llm" in capsys.readouterr().out


def test_the_slower_of_host_and_device_decides(bench):
    predict = bench("predict")
    card, shape, counts = (
        predict.CARDS["H200"],
        predict.SHAPES["wan-1.3b"],
        {"first_launches": 40, "later_launches": 30},
    )
    host = {"first_median": 0.0, "later_median": 0.0}
    device = [
        predict.device_time(card, shape, 1560, 21, counts[f"{which}_launches"])
        for which in ("first", "later")
    ]
    attention, rest = 4 * 4680 * 21 * 1560 * 1536 / card.attention, 0.8e-3
    assert device[1] == pytest.approx(attention + rest, rel=0.15)
    assert predict.chunk_time(card, shape, 1560, 21, counts, host) == pytest.approx(device[0] + 4 * device[1])
    slow = {"first_median": 20_000.0, "later_median": 10_000.0}
    assert predict.chunk_time(card, shape, 1560, 21, counts, slow) == pytest.approx(
        0.06 + 5 * predict.OTHER_HOST
    )
    assert (
        predict.device_time(card, shape, 1560, 10, 30)
        < device[1]
        < predict.device_time(card, shape, 1560, 21, 300)
    )
