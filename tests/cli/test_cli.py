"""The command line, through typer's runner and in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

import headforcing
from headforcing import Anchor, Local, Memory, RoleMap
from headforcing.cli import app
from headforcing.cli.console import progress
from headforcing.roles.maps.origin import Origin

pytestmark = pytest.mark.xdist_group("headforcing")  # makes its videos once
RUN = CliRunner()
SLOW_IMPORTS = {"torch", "numpy", "matplotlib", "rich"}
BARE_PACKAGE = (
    "import sys, types, importlib.util as u\n"
    "package = types.ModuleType('headforcing')\n"
    "package.__path__ = u.find_spec('headforcing').submodule_search_locations\n"
    "sys.modules['headforcing'] = package\n"
)


def map_of(layers=6, heads=6):
    rows = [[Local(), Anchor(), *[Memory()] * (heads - 2)]] * layers
    return RoleMap(tuple(map(tuple, rows)), Origin(notes={"metric": "none [really]", "seed": 3}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("imageio_ffmpeg")
    from headforcing.demo.model.model import DemoModel

    folder = tmp_path_factory.mktemp("cli")
    model = DemoModel().randomize(torch.Generator().manual_seed(0))
    model.save_weights(folder / "weights.safetensors")
    map_of().save(folder / "roles.json")
    return folder


@pytest.fixture(scope="module")
def demo(folder):
    """Runs `headforcing demo` on a short video."""

    def run(*options, out="out"):
        files = ["--weights", folder / "weights.safetensors", "--roles", folder / "roles.json"]
        arguments = ["demo", "--seconds", "0.4", "--camera", "still", *files, "--out", folder / out, *options]
        return RUN.invoke(app, list(map(str, arguments)))

    return run


@pytest.fixture(scope="module")
def report(demo):
    answer = demo("--json", "--seed", 5)
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def fresh(code):
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_the_help_names_every_command():
    answer = RUN.invoke(app, ["--help"])
    assert answer.exit_code == 0
    assert all(name in answer.stdout for name in ("demo", "roles", "--version"))
    assert all(name in RUN.invoke(app, ["roles", "--help"]).stdout for name in ("show", "validate"))


def commands(command=None, above=()):
    """Every command there is, as its words."""
    command = command or typer.main.get_command(app)
    yield above
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*above, name))


EVERY_HELP = f"""
import sys
from headforcing.cli import app

for words in {list(commands())}:
    try:
        app([*words, "--help"])
    except SystemExit as end:
        print(words, end.code, {SLOW_IMPORTS} & {{*sys.modules}})
"""


@pytest.mark.parametrize("package", ["", BARE_PACKAGE], ids=["as it is", "the command line itself"])
def test_help_waits_for_no_slow_import(package):
    """In one process: what a command imports is still there after the next one."""
    answer = fresh(package + EVERY_HELP)
    for words in commands():
        assert f"\n{words} 0 set()\n" in answer
        if words not in ((), ("roles",)):
            assert f"Examples:\n    headforcing {' '.join(words)}" in answer


VALIDATE_AND_PULL = """
import sys
from headforcing.cli import app

file, *pull = sys.argv[1:]
unwanted = {"rich", "matplotlib", "huggingface_hub", "headforcing.measure.profile", "headforcing.demo"}
unwanted.add("headforcing.apply.handle")
try:
    app(["roles", "validate", file])
except SystemExit as end:
    print(end.code, unwanted & {*sys.modules})
app(["roles", "pull", *pull])
"""


def test_validate_imports_no_more_than_it_needs_and_pull_all_of_the_hub_that_it_uses(tmp_path):
    pytest.importorskip("huggingface_hub")
    map_of().save(tmp_path / "map.json")
    pull = ["org/name", "--revision", "0" * 40, "--out", str(tmp_path / "roles.json")]
    answer = subprocess.run(
        [sys.executable, "-c", VALIDATE_AND_PULL, str(tmp_path / "map.json"), *pull],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
    )
    assert answer.stdout.endswith("0 set()\n")
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: org/name: roles.json at ")
    assert "it is not in the cache" in answer.stderr


def test_the_module_runs_as_well(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-m", "headforcing", "--version"], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == headforcing.__version__


@pytest.mark.parametrize("total", [8, None])
def test_progress_on_a_terminal_and_in_a_pipe(capsys, monkeypatch, total):
    monkeypatch.setattr("headforcing.cli.console.QUIET_SECONDS", -1.0)
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with progress(quiet=False) as tell:
            for done in range(1, 9):
                tell("frames", done, total)
        said = capsys.readouterr()
        assert said.out == ""
        assert "8/8" in said.err if total else "8" in said.err
        if not terminal:
            assert said.err.count("\n") == (4 if total else 8)
    with progress(quiet=True) as tell:
        tell("frames", 8, total)
    assert capsys.readouterr().err == ""


def test_the_version_is_printed():
    assert RUN.invoke(app, ["--version"]).stdout.strip() == headforcing.__version__


@pytest.mark.parametrize("heads", [6, 12])
def test_a_role_map_is_shown(tmp_path, heads):
    map_of(heads=heads).save(tmp_path / "map.json")
    answer = RUN.invoke(app, ["roles", "show", str(tmp_path / "map.json")])
    assert answer.exit_code == 0
    assert all(word in answer.stdout for word in ("local", "anchor", "memory", "none [really]"))
    assert ("L" in answer.stdout.split("heads per role")[0]) == (heads > 8)


def test_a_role_map_as_json(tmp_path):
    map_of().save(tmp_path / "map.json")
    answer = json.loads(RUN.invoke(app, ["roles", "show", "--json", str(tmp_path / "map.json")]).stdout)
    assert (answer["layers"], answer["heads"], answer["origin"]["notes"]["seed"]) == (6, 6, 3)
    assert {name: role["heads"] for name, role in answer["roles"].items()} == {
        "local": 6,
        "anchor": 6,
        "memory": 24,
    }


def test_roles_of_one_type_get_numbers(tmp_path):
    RoleMap(((Local(1), Local(2)),)).save(tmp_path / "map.json")
    answer = RUN.invoke(app, ["roles", "show", str(tmp_path / "map.json")])
    assert "local1" in answer.stdout
    assert "local2" in answer.stdout


def test_a_good_map_is_valid(tmp_path):
    map_of().save(tmp_path / "map.json")
    answer = RUN.invoke(app, ["roles", "validate", str(tmp_path / "map.json")])
    assert answer.exit_code == 0
    assert "6 layers x 6 heads" in answer.stdout


@pytest.mark.parametrize("content", ["{}", "not json", '{"format": "headforcing.role-map"}', None])
def test_a_bad_map_is_not_valid(tmp_path, content):
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content)
    answer = RUN.invoke(app, ["roles", "validate", str(path)])
    assert answer.exit_code == 1
    assert answer.stderr.startswith(f"error: {path}: ")
    assert answer.stderr.count("\n") == 1
    assert RUN.invoke(app, ["roles", "show", str(path)]).exit_code == 2
    told = RUN.invoke(app, ["roles", "validate", "--json", str(path)])
    assert json.loads(told.stdout)["valid"] is False


def test_the_demo_reports_both_policies(report):
    names = [row["name"] for row in report["policies"]]
    assert names == ["sliding window", "Head Forcing"]
    window, forcing = report["policies"]
    assert window["roles"] == [{"role": "all", "heads": 36, "frames": 18}]
    assert {row["role"]: row["heads"] for row in forcing["roles"]} == {"local": 6, "anchor": 6, "memory": 24}
    assert (report["frames"], report["given"], report["trained"]) == (6, 3, 21)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(demo, report):
    again = json.loads(demo("--json", "--seed", 5).stdout)
    for one in (again, report):
        for row in one["policies"]:
            row.pop("fps")
    assert again == report


def test_the_table_holds_the_numbers(demo, report):
    answer = demo("--seed", 5, "--prompt", "night winter balloon red bus blue", out="prompted")
    assert answer.exit_code == 0
    words = (
        "night winter balloon red bus blue",
        "sliding window",
        "Head Forcing",
        "18 (36 heads)",
        "This is one video",
    )
    assert all(word in answer.stdout for word in words)
    assert "sliding window: 2/2" in answer.stderr
    assert "drawing: 6/6" in answer.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "day summer balloon orange"], "red, blue, yellow, green, white, purple"),
        (["--prompt", "day summer calm quiet at0 right"], "camera"),
        (["--seconds", "0.1", "--camera", "pan"], "use 2.7 seconds or more"),
        (["--weights", "pyproject.toml"], "not weights of the demo model"),
        (["--roles", "absent.json"], "absent.json"),
    ],
)
def test_a_mistake_gives_one_message(demo, options, message):
    answer = demo(*options, out="never")
    assert answer.exit_code == 2
    assert message in answer.stderr
    assert answer.stderr.startswith("error: ")
    assert "Traceback" not in answer.output


def test_a_preset_instead_of_a_map(demo, folder, report):
    files = ["--weights", str(folder / "weights.safetensors"), "--out", str(folder / "preset")]
    short = ["demo", "--seconds", "0.4", "--camera", "still", *files]
    answer = RUN.invoke(app, [*short, "--preset", "infinity_rope", "--json", "--seed", "5"])
    assert answer.exit_code == 0, answer.output
    window, row = json.loads(answer.stdout)["policies"]
    assert {**window, "fps": 0} == {**report["policies"][0], "fps": 0}, "the same seed"
    assert (row["name"], row["attended_frames"]) == ("preset infinity_rope", 6.0)
    assert row["roles"] == [{"role": "slidingwindow", "heads": 36, "frames": 3}]
    unknown = RUN.invoke(app, [*short, "--preset", "dense"])
    assert (unknown.exit_code, "sliding_window" in unknown.stderr) == (2, True)
    both = demo("--preset", "full", out="never")
    assert (both.exit_code, "leave one out" in both.stderr) == (2, True)


def test_foreign_files_are_not_overwritten(demo, folder):
    (folder / "foreign").mkdir()
    (folder / "foreign" / "demo.mp4").write_text("mine")
    answer = demo(out="foreign")
    assert answer.exit_code == 2
    assert "choose another --out" in answer.stderr
    assert [path.name for path in (folder / "foreign").iterdir()] == ["demo.mp4"]
    assert demo(out="roles.json").exit_code == 2


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("headforcing.cli.demo.DRAWING", ("PIL", "no_such_library"))
    answer = RUN.invoke(app, ["demo"])
    assert answer.exit_code == 2
    assert "no_such_library: pip install 'headforcing[demo]'" in answer.stderr
