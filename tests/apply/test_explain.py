"""`hf.explain`, and the commands `explain` and `check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

import headforcing as hf
from headforcing.adapters.base import adapters
from headforcing.cli import app
from headforcing.errors import UnsupportedModelError
from headforcing.roles import Local
from headforcing.testing import snapshot
from tests.hosts import find_host
from tests.hosts.causvid import CausVidHost
from tests.hosts.rig import Rig

RUN = CliRunner()
OTHERS = {adapter.name for adapter in adapters()}

OWN = """
import torch
from torch import nn
from headforcing.integrations.self_forcing import SelfForcing
from tests.hosts.self_forcing import SelfForcingHost

class Backwards(SelfForcing):
    name = "backwards"

    def attentions(self, model):
        yield from reversed(list(super().attentions(model)))

class BadHost(SelfForcingHost):
    adapter = Backwards()

def make():
    return SelfForcingHost().model()

def pair():
    return make(), print

def foreign():
    return nn.TransformerEncoderLayer(8, 2, 8)

def needs_more(checkpoint):
    return make()

model = make()
nothing = 3
"""

APART = """
from headforcing.integrations.causvid import CausVid
from tests.hosts.self_forcing import SelfForcingHost
from own_host import Backwards

class Plain(Backwards):
    name = "plain"

instance = Plain()
"""

TWO = """
from headforcing.testing.host import Host
from own_host import Backwards, BadHost

class Own(Backwards): ...
class First(BadHost): ...
class Second(BadHost): ...
class Unfinished(Host): ...
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"own_host": OWN, "apart": APART, "two_hosts": TWO}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_known_model_is_explained_and_not_touched() -> None:
    model = Rig(window=9).model
    before = snapshot(model)
    found = hf.explain(model)
    assert before.diff(snapshot(model)) == []
    assert (found.model, found.adapter, found.also) == ("DemoModel", "self_forcing", ())
    assert [layer.path for layer in found.layers] == ["blocks.0.self_attn", "blocks.1.self_attn"]
    assert {(layer.kind, layer.heads, layer.head_dim) for layer in found.layers} == {
        ("DemoCausalSelfAttention", 4, 16)
    }
    assert (found.window, found.chunk, found.unknown, found.applied) == (9, 3, {}, ())
    assert set(found.why_not) == OTHERS - {"self_forcing"}
    assert [(seen.kind, seen.count) for seen in found.seen] == [
        ("DemoCausalSelfAttention", 2),
        ("DemoCrossAttention", 2),
    ]


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_every_interface_has_one_adapter(name: str) -> None:
    host = find_host(name)
    if (missing := host.missing()) is not None:
        pytest.skip(missing)
    found = hf.explain(host.model())
    assert (found.adapter, found.also) == (name, ())
    assert set(found.why_not) == OTHERS - {name}


def test_it_can_be_asked_twice_and_is_not_the_module() -> None:
    assert hf.explain is hf.explain
    assert str(hf.explain(nn.Linear(1, 1))) == str(hf.explain(nn.Linear(1, 1)))


def test_an_applied_model_is_explained_as_what_it_was() -> None:
    model = Rig().model
    before = hf.explain(model)
    handle = hf.apply_head_forcing(model, Local())
    found = hf.explain(model)
    assert (found.layers, found.seen) == (before.layers, before.seen)
    assert found.applied[0].startswith("head forcing on 2 layers x 4 heads (self_forcing, ")
    assert "applied: head forcing on 2 layers" in str(found)
    handle.remove()
    assert hf.explain(model) == before


def test_a_foreign_model_is_told_what_every_adapter_misses() -> None:
    model = Rig().model
    for block in model.blocks:
        del block.self_attn.norm_k
    found = hf.explain(model)
    text = str(found)
    assert (found.adapter, found.refused, found.layers, set(found.why_not)) == (None, None, (), OTHERS)
    assert text.startswith(f"{type(model).__name__}: no adapter fits")
    assert (
        f"2 x {type(model.blocks[0].self_attn).__name__}, first at blocks.0.self_attn: forward(x, seq" in text
    )
    assert "docs/porting.md" in text
    assert {*[*found.why_not][:3]} == {"krea", "reward_forcing", "self_forcing"}  # one signature


def test_a_model_without_a_cache_is_told_so() -> None:
    found = hf.explain(nn.TransformerEncoderLayer(8, 2, 8))
    text = str(found)
    assert (found.adapter, found.layers, set(found.why_not)) == (None, (), OTHERS)
    assert text.startswith(
        "TransformerEncoderLayer: no adapter fits\n  cannot be served: nothing in it takes"
    )
    assert "1 x MultiheadAttention, first at self_attn: forward(query, key, value, " in text
    assert "docs/porting.md" not in text
    assert "nothing looks like attention" in str(hf.explain(nn.Linear(1, 1)))


def test_what_a_model_does_not_say_is_named() -> None:
    model = Rig().model
    del model.num_frame_per_block
    for block in model.blocks:
        del block.self_attn.num_frame_per_block
        del block.cross_attn
    found = hf.explain(model)
    assert found.chunk is None
    assert "pass chunk=..." in found.unknown["chunk"]
    assert "no cross_attn" in found.unknown["prompt switches"]
    assert "chunks of unknown" in str(found)
    named = nn.ModuleDict({"inner": Rig().model.blocks})
    assert "nobody knows which pass" in hf.explain(named).unknown["phases"]


def test_many_layers_are_not_all_listed() -> None:
    text = str(hf.explain(Rig(layers=9).model))
    assert "9 layers, 4 heads of 16 channels" in text
    assert "... 7 more" in text
    assert "blocks.4." not in text


def test_only_modules_can_be_explained() -> None:
    with pytest.raises(UnsupportedModelError, match=r"dict is not a torch\.nn\.Module"):
        hf.explain({})  # type: ignore[arg-type]


# The commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["make", "pair", "model"])
def test_explain_takes_a_function_a_pair_and_a_model(name: str) -> None:
    result = RUN.invoke(app, ["explain", f"own_host:{name}"])
    assert result.exit_code == 0, result.output
    assert "DemoModel: adapter self_forcing" in result.output


def test_explain_says_by_its_exit_code_that_none_fits() -> None:
    result = RUN.invoke(app, ["explain", "own_host:foreign", "--json"])
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["adapter"] is None
    assert set(told["why_not"]) == OTHERS


@pytest.mark.parametrize(
    ("command", "target", "said"),
    [
        ("explain", "own_host", "is not MODULE:NAME"),
        ("explain", "no_such:make", "no_such cannot be imported"),
        ("explain", "own_host:absent", "own_host has no absent"),
        ("explain", "own_host:nothing", "returned int: expected a torch module"),
        ("explain", "own_host:needs_more", "is called without arguments"),
        ("check", "causvid", "'causvid' is not MODULE:NAME, as in my_adapter:MyAdapter"),
        (
            "check",
            "own_host:make",
            "is DemoModel: expected a subclass of headforcing.Adapter or headforcing.t",
        ),
        ("check", "own_host:nothing", "is int: expected a subclass"),
    ],
)
def test_a_wrong_target_is_one_line(command: str, target: str, said: str) -> None:
    result = RUN.invoke(app, [command, target])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_check_passes_our_adapters(name: str) -> None:
    host = type(find_host(name))
    target = f"{host.__module__}:{host.__name__}"
    result = RUN.invoke(app, ["check", target, "--only", "fits,layers_in_order", "--quiet"])
    if (missing := host().missing()) is not None:
        assert result.exit_code == 2
        assert f"{target} cannot be checked here: {missing}" in result.stderr
    else:
        assert result.exit_code == 0, result.output
        assert f"{name}: 2 passed, 0 failed, 0 skipped" in result.stdout


def test_check_tells_what_a_host_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausVidHost, "missing", lambda self: "no such package: install it")
    result = RUN.invoke(app, ["check", "tests.hosts.causvid:CausVidHost"])
    assert result.exit_code == 2
    assert (
        "tests.hosts.causvid:CausVidHost cannot be checked here: no such package: install it" in result.stderr
    )


def test_check_fails_a_bad_adapter_and_says_where_to_begin() -> None:
    result = RUN.invoke(app, ["check", "own_host:BadHost", "--stop", "--quiet"])
    assert result.exit_code == 1
    assert "begin with layers_in_order" in result.stdout


def checked(*arguments: str) -> tuple[str, str]:
    """The adapter and the host of a check."""
    result = RUN.invoke(app, ["check", *arguments, "--only", "fits", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    return report["adapter"], report["host"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["own_host:Backwards"], ("backwards", "BadHost")),
        (["own_host:Backwards", "--host", "apart:SelfForcingHost"], ("backwards", "SelfForcingHost")),
        (["apart:Plain", "--host", "own_host:BadHost"], ("plain", "BadHost")),
        (["apart:instance", "--host", "own_host:BadHost"], ("plain", "BadHost")),
        (["own_host:BadHost"], ("backwards", "BadHost")),
        (["own_host:BadHost", "--adapter", "apart:Plain"], ("plain", "BadHost")),
        (["own_host:BadHost", "--adapter", "apart:instance"], ("plain", "BadHost")),
        (["apart:SelfForcingHost"], ("self_forcing", "SelfForcingHost")),
        (["apart:SelfForcingHost", "--adapter", "apart:Plain"], ("plain", "SelfForcingHost")),
    ],
)
def test_check_takes_an_adapter_or_a_host(arguments: list[str], found: tuple[str, str]) -> None:
    assert checked(*arguments) == found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["apart:Plain"], "apart defines no subclass of headforcing.testing.Host: say which"),
        (["apart:Plain"], "as in check apart:Plain --host my_host:MyHost"),
        (
            ["two_hosts:Own"],
            "two_hosts defines 2 subclasses of headforcing.testing.Host (First, Second): say",
        ),
        (["own_host:Backwards", "--host", "apart:Plain"], "apart:Plain is Plain: expected a subclass of"),
        (["own_host:Backwards", "--adapter", "apart:Plain"], "is an adapter itself: leave out --adapter"),
        (["own_host:BadHost", "--host", "own_host:BadHost"], "is a host itself: leave out --host"),
        (["apart:SelfForcingHost", "--host", "own_host:BadHost"], "is a host itself: leave out --host"),
        (["own_host:BadHost", "--adapter", "own_host:BadHost"], "is BadHost: expected a subclass of headfor"),
        (["--adapter", "apart:Plain"], "Missing argument 'MODULE:ADAPTER|MODULE:HOST'"),
        (
            ["own_host:BadHost", "--adapter", "Plain"],
            "'Plain' is not MODULE:NAME, as in my_adapter:MyAdapter",
        ),
    ],
)
def test_check_says_what_to_write(arguments: list[str], said: str) -> None:
    result = RUN.invoke(app, ["check", *arguments])
    assert result.exit_code == 2, result.output
    assert said in result.stderr


def test_check_prints_json_and_nothing_else() -> None:
    result = RUN.invoke(app, ["check", "own_host:BadHost", "--only", "layers_in_order,fits", "--json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["adapter"], report["host"], report["ok"]) == ("backwards", "BadHost", False)
    assert [(r["name"], r["outcome"]) for r in report["results"]] == [
        ("fits", "passed"),
        ("layers_in_order", "failed"),
    ]
    assert "roles would go to other layers" in report["results"][1]["reason"]


def test_check_refuses_an_unknown_check() -> None:
    result = RUN.invoke(app, ["check", "apart:SelfForcingHost", "--only", "everything"])
    assert result.exit_code == 2
    assert "no check is called 'everything'" in result.stderr
