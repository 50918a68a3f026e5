"""The porting guide works: its example passes the kit, serves roles, and is what the page shows."""

from __future__ import annotations

import dataclasses
import re
import runpy
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.cli import app
from headforcing.errors import ExternalEditError, StreamError, UnsupportedModelError
from headforcing.roles import Local, SlidingWindow
from headforcing.testing import check_adapter
from tests.docs.pages import ROOT, fences

sys.path.append(str(ROOT / "examples"))

from porting.adapter import ADAPTER, BrookAdapter
from porting.host import FRAME, BrookHost, random
from porting.model import Brook, LayerMemory, generate

PAGE = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
SHOWN = re.compile(r'notest="lines of (examples/porting/\w+\.py)"')


def video(model: Brook) -> torch.Tensor:
    return generate(model, random(1, 1, 12, 4, *FRAME), random(2, 1, 5, 32))


# The example --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the model's, under autocast
def test_the_example_passes_the_kit() -> None:
    report = check_adapter(None, BrookHost())
    report.raise_if_failed()
    assert report.adapter == "brook"
    assert {r.name for r in report.results if r.outcome == "skipped"} == BrookHost.unconcerned


def test_roles_that_change_nothing_or_something_and_removal() -> None:
    model = BrookHost().model()
    untouched = video(model)
    with hf.apply_head_forcing(model, SlidingWindow(6, positions="absolute"), adapter=ADAPTER) as handle:
        assert torch.equal(video(model), untouched)
        assert handle.status().calls == 2 * 3 * 6  # layers, passes, chunks
    with hf.apply_head_forcing(model, Local(recent=1), adapter=ADAPTER):
        assert not torch.equal(video(model), untouched)
    assert torch.equal(video(model), untouched)


def test_the_hosts_memory_stays_empty() -> None:
    host = BrookHost()
    model = host.model()
    caches = host.caches(model)
    with torch.no_grad(), hf.apply_head_forcing(model, Local(recent=1), adapter=ADAPTER):
        for start, draw in ((0, 1), (0, 0), (2, 1), (2, 0)):
            host.call(model, caches, start, 2, draw)
    assert [(memory.keys, memory.values) for memory in caches["memories"]] == [([], []), ([], [])]


def test_what_the_host_would_have_done_otherwise_is_refused() -> None:
    host = BrookHost()
    model = host.model()
    caches = host.caches(model)
    with torch.no_grad(), hf.apply_head_forcing(model, Local(recent=1), adapter=ADAPTER) as handle:
        host.call(model, caches, 0, 2, 1)
        with pytest.raises(StreamError, match="no pass over frame 0 had remember=True"):
            host.call(model, caches, 2, 2, 1)
        handle.reset()
        host.call(model, caches, 0, 2, 0)
        host.call(model, caches, 2, 2, 1)
        caches["memories"][0].remember(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), 2)
        with pytest.raises(ExternalEditError, match="the memory holds 2 frames that head forcing did not"):
            host.call(model, caches, 2, 2, 0)
        mixer = model.layers[0].mixer
        with pytest.raises(StreamError, match="positions are given together with a memory"):
            mixer(torch.zeros(1, 1, 32), torch.zeros(1, 3), LayerMemory())
    with pytest.raises(UnsupportedModelError, match="Linear has no chunk_frames: pass chunk="):
        ADAPTER.chunk(torch.nn.Linear(1, 1))


# Where it goes ------------------------------------------------------------------------------------


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers an object as an installed package would."""

    def register(value: str) -> None:
        point = EntryPoint("brook", value, "headforcing.adapters")
        found = lambda group: [point] if group == point.group else []  # noqa: E731
        monkeypatch.setattr("headforcing.adapters.base.entry_points", found)

    return register


def test_a_plug_in_is_found(plug_in: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="no adapter fits Brook"):
        find_adapter(Brook())
    plug_in("porting.adapter:ADAPTER")
    assert find_adapter(Brook()) is ADAPTER
    assert hf.explain(Brook()).adapter == "brook"
    with hf.apply_head_forcing(Brook(), Local(recent=1)) as handle:
        assert handle.status().adapter == "brook"


def test_a_plug_in_that_names_its_class_is_refused(plug_in: Any) -> None:
    plug_in("porting.adapter:BrookAdapter")
    with pytest.raises(
        UnsupportedModelError, match=r"plug-in brook = 'porting\.adapter:BrookAdapter' is <class"
    ):
        find_adapter(Brook())


def test_the_command_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples")
    answer = CliRunner().invoke(app, ["check", "porting.host:BrookHost", "--stop", "--only", "fits"])
    assert answer.exit_code == 0, answer.output
    assert "brook: 1 passed, 0 failed, 0 skipped" in answer.output


# The example with a bug ---------------------------------------------------------------------------


class CutsHeadsLast(BrookAdapter):
    def project(self, module: Any, call: Any) -> Any:
        shape = (len(call.x), call.grid[0], -1, *self.heads(module))
        q, k, v = (part.reshape(shape) for part in module.to_qkv(call.x).chunk(3, -1))
        return module.norm_q(q), module.norm_k(k), v


class SwapsTheNorms(BrookAdapter):
    def project(self, module: Any, call: Any) -> Any:
        qkv = module.to_qkv(call.x).unflatten(-1, (module.num_heads, -1)).unflatten(1, (call.grid[0], -1))
        q, k, v = qkv.chunk(3, -1)
        return module.norm_k(q), module.norm_q(k), v


class PairsNeighbours(BrookAdapter):
    def rotate(self, x: Any, call: Any, positions: Any, patch: int = 1) -> Any:
        half = x.shape[-1] // 2
        apart = x.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2)
        return (
            super()
            .rotate(apart, call, positions, patch)
            .unflatten(-1, (2, half))
            .transpose(-1, -2)
            .flatten(-2)
        )


class AnchorIsAModule(BrookAdapter):
    def read(self, module: Any, args: Any, kwargs: Any) -> Any:
        call = super().read(module, args, kwargs)
        return call and dataclasses.replace(call, anchor=module.rotary)


class KeepsThePrompt(BrookAdapter):
    def forget_prompt(self, module: Any, args: Any, kwargs: Any) -> None:
        pass


BUGS = [
    (CutsHeadsLast, "values_are_the_hosts", "does it split heads first, or queries, keys and values?"),
    (SwapsTheNorms, "keys_are_the_hosts", "are q and k or their norms swapped, or is a norm missing?"),
    (PairsNeighbours, "rotation_is_the_hosts", "channels paired where the base model pairs halves"),
    (AnchorIsAModule, "anchor_is_the_timeline", "layers or timelines share an anchor"),
    pytest.param(
        KeepsThePrompt,
        "prompt_switch_takes_effect",
        "forget_prompt() must make cross-attention project it again",
        marks=pytest.mark.slow,  # nearly all checks come before
    ),
]


@pytest.mark.parametrize(("bug", "check", "hint"), BUGS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_kit_finds_a_bug_and_the_page_knows_its_words(
    bug: type[BrookAdapter], check: str, hint: str
) -> None:
    first = check_adapter(bug(), BrookHost(), stop=True).failed[0]
    assert first.name == check
    assert hint in first.reason
    assert hint in " ".join(PAGE.split())


# The page -----------------------------------------------------------------------------------------


def test_the_page_shows_the_lines_of_the_example() -> None:
    shown: dict[str, list[str]] = {}
    for fence in fences(PAGE, "python"):
        if (match := SHOWN.search(fence.info)) is not None:
            assert fence.body in (ROOT / match[1]).read_text(encoding="utf-8"), (
                f"line {fence.line}: {match[1]}"
            )
            shown.setdefault(match[1], []).append(fence.body)
    adapter = textwrap.dedent((ROOT / "examples" / "porting" / "adapter.py").read_text(encoding="utf-8"))
    methods = re.findall(r"^    def (\w+)", adapter, re.MULTILINE)
    assert [
        name for name in methods if f"def {name}(" not in "".join(shown["examples/porting/adapter.py"])
    ] == []


def test_the_page_shows_what_explain_says_of_the_model() -> None:
    shown = PAGE.split("```text\n")[1].split("```")[0].splitlines()
    assert len(shown) == 2
    assert set(shown) <= set(str(hf.explain(Brook())).splitlines())


def test_what_the_page_says_the_kit_says_is_said() -> None:
    said = runpy.run_path(str(Path(__file__).with_name("test_quotes.py")))["said"]()
    rows = re.findall(r"^\| .* \| (.*) \|$", PAGE[PAGE.index("## 3.") :], re.MULTILINE)
    quotes = [quote for row in rows for quote in row.split("`")[1::2] if " " in quote]
    assert len(quotes) > 10
    assert [quote for quote in quotes if quote not in said] == []


def test_every_question_of_an_adapter_is_on_the_page() -> None:
    questions = [name for name in vars(hf.Adapter) if not name.startswith("_")]
    table = PAGE[PAGE.index("## The questions") : PAGE.index("## 1.")]
    assert [name for name in questions if f"`{name}" not in table] == []
