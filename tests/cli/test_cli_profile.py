"""`headforcing profile`: the demo, a model of one's own, and what can go wrong on the way."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from headforcing.cli import app
from headforcing.cli.profile import METRICS
from headforcing.measure.profile import HeadProfile

RUN = CliRunner()

OWN = """
import torch
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.model.pipeline import DemoPipeline
from headforcing.demo.world.scene import sample_scene

SAID = []

def make():
    seeded = torch.Generator().manual_seed(0)
    model = DemoModel(DemoConfig(dim=64, heads=4, layers=2)).randomize(seeded).eval().requires_grad_(False)
    prompts = sample_scene(1, torch.Generator().manual_seed(1)).prompts(torch.arange(3))

    def run(*said):
        SAID.append(said)
        DemoPipeline(model).generate(prompts, generator=torch.Generator().manual_seed(2))

    return model, run

def no_pair():
    return make()[0]

def no_model():
    return "model", print

def no_run():
    return make()[0], 3

def short():
    return make()[0], lambda: None

def trouble():
    raise ValueError("the checkpoint is not there")

def out_of_disk():
    raise OSError("no space left")

def needs_more(checkpoint):
    return make()

def needs_a_prompt():
    return make()[0], lambda prompt: None

def takes_none():
    return make()[0], lambda: None

def fails_while_it_runs():
    def run():
        raise ValueError("shapes do not match")
    return make()[0], run

number = 3
"""


def run(*arguments):
    return RUN.invoke(app, ["profile", *map(str, arguments)])


def parsed(answer):
    """The JSON on stdout, which holds nothing else."""
    assert answer.exit_code == 0, answer.output
    assert answer.stderr == ""
    return json.loads(answer.stdout)


def refused(answer, *words):
    assert answer.exit_code == 2, answer.output
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert all(word in answer.stderr for word in words), answer.stderr
    return True


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a module of one's own, as the current one; its name, which no other test uses."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"{name}_broken.py").write_text("def make(:")
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("profile") / "made" / "demo.safetensors"
    return run("--videos", 2, "--metrics", "attention_mass", "--out", out), out


def test_the_demo_is_profiled(demo):
    answer, out = demo
    assert answer.exit_code == 0, answer.output
    profile = HeadProfile.load(out)
    assert profile.shape == (6, 6)
    assert list(profile.facts.metrics) == ["attention_mass"]
    assert len(profile.video.unique()) == 2
    for word in ("DemoModel", "attention_mass", "seconds", str(out), str(out.with_suffix(".profile.json"))):
        assert word in answer.stdout.replace("│\n│                    │ ", "")
    assert f"next: headforcing roles classify {out}" in answer.stdout
    assert "prompts: 2/2" in answer.stderr


def test_the_next_command_works(demo, tmp_path):
    command = next(line for line in demo[0].stdout.splitlines() if line.startswith("next: "))
    arguments = command.removeprefix("next: headforcing ").split()
    arguments[-1] = str(tmp_path / "roles.json")
    answer = RUN.invoke(app, [*arguments, "--draws", "5"])
    assert answer.exit_code == 0, answer.output
    assert "no stable map" in answer.stdout  # of two videos
    assert RUN.invoke(app, ["roles", "validate", arguments[-1]]).exit_code == 0


def test_a_model_of_ones_own(own, tmp_path):
    out = tmp_path / "own.safetensors"
    options = ["--starts", "6", "--queries", 4, "--seed", 7, "--base-model", "nobody/tiny", "--out", out]
    told = parsed(run(f"{own}:make", "--metrics", "attention_mass, mass_ratio", *options, "--json"))
    profile = HeadProfile.load(out)
    assert told["hash"] == profile.hash
    assert told["metrics"] == list(profile.facts.metrics) == ["attention_mass", "mass_ratio"]
    assert told["starts"] == [6]
    assert told["files"] == [str(out), str(out.with_suffix(".profile.json"))]
    assert told["model"]["base_model"] == profile.facts.model.base_model == "nobody/tiny"
    assert told["seconds"] > 0
    assert (profile.facts.protocol["queries"], profile.facts.protocol["seed"]) == (4, 7)
    assert profile.facts.prompts is None


def test_every_prompt_is_given_to_the_function(own, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n")
    options = ["--prompts", "prompts.txt", "--metrics", "mass_ratio", "--metrics", "attention_mass"]
    told = parsed(run(f"{own}:make", *options, "--json"))
    assert told["videos"] == 2
    assert told["metrics"] == ["mass_ratio", "attention_mass"]
    assert __import__(own).SAID == [("a cat",), ("a dog",)]
    profile = HeadProfile.load(tmp_path / "profile.safetensors")
    assert profile.facts.prompts is not None


def test_quiet_is_quiet(own):
    answer = run(f"{own}:make", "--metrics", "attention_mass", "--quiet")
    assert answer.exit_code == 0
    assert answer.stderr == ""
    assert "next: " in answer.stdout


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("OWN", ["MODULE:FUNCTION"]),
        ("OWN:", ["MODULE:FUNCTION"]),
        (":make", ["MODULE:FUNCTION"]),
        ("OWN:make.it", ["MODULE:FUNCTION"]),
        (".OWN:make", ["MODULE:FUNCTION"]),
        ("no_such_module_anywhere:make", ["cannot be imported", "no_such_module_anywhere"]),
        ("OWN_broken:make", ["cannot be imported"]),
        ("OWN:absent", ["no function absent"]),
        ("OWN:number", ["no function number"]),
        ("OWN:no_pair", ["returned DemoModel", "(model, run)"]),
        ("OWN:no_model", ["returned (str, builtin_function_or_method)"]),
        ("OWN:no_run", ["returned (DemoModel, int)"]),
        ("OWN:short", ["made no attention call"]),
        ("OWN:needs_more", ["needs_more(checkpoint)", "without arguments"]),
        ("OWN:needs_a_prompt", ["run(prompt)", "without arguments", "'prompt'"]),
    ],
)
def test_a_target_that_does_not_work(own, tmp_path, target, words):
    assert refused(run(target.replace("OWN", own), "--metrics", "attention_mass", "--quiet"), *words)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "profile.json"], [".safetensors"]),
        (["--metrics", "tarot"], ["tarot", "attention_mass"]),
        (["--metrics", "attention_mass,attention_mass"], ["each once"]),
        (["--metrics", ""], ["expected one of"]),
        (["--prompts", "prompts.txt"], ["--prompts", "MODULE:FUNCTION"]),
        (["--starts", "9"], ["--starts", "MODULE:FUNCTION"]),
        (["--queries", "9"], ["--queries", "MODULE:FUNCTION"]),
        (["--base-model", "x"], ["--base-model", "MODULE:FUNCTION"]),
        (["OWN:make", "--long"], ["--long", "demo"]),
        (["OWN:make", "--videos", "2"], ["--videos", "demo"]),
        (["OWN:make", "--starts", "9,a"], ["--starts", "9,12,18"]),
        (["OWN:make", "--prompts", "absent.txt"], ["absent.txt"]),
        (["OWN:make", "--prompts", "empty.txt"], ["empty.txt", "one per line"]),
        (["OWN:make", "--prompts", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["OWN:make", "--starts", "100", "--quiet"], ["[100]"]),
    ],
)
def test_a_mistake_gives_one_message(own, tmp_path, options, words):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert refused(run(*(option.replace("OWN", own) for option in options)), *words)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        ("trouble", ValueError, "the checkpoint is not there"),
        ("out_of_disk", OSError, "no space left"),
        ("fails_while_it_runs", ValueError, "shapes do not match"),
    ],
)
def test_ones_own_errors_keep_their_traceback(own, tmp_path, function, kind, said):
    answer = run(f"{own}:{function}", "--metrics", "attention_mass", "--quiet")
    assert type(answer.exception) is kind
    assert str(answer.exception) == said
    assert answer.exit_code == 1
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_run_that_takes_no_prompt(own, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    answer = run(f"{own}:takes_none", "--prompts", "prompts.txt", "--quiet")
    assert refused(answer, "run()", "with a prompt, because --prompts is given")


def test_the_default_metrics_are_those_of_the_library():
    from headforcing.measure import profiler

    assert tuple(METRICS.split(",")) == profiler.METRICS
