"""What a wrong command says: at once where nothing has to be loaded, and never a raw error of the system."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headforcing import Anchor, Local, RoleMap
from headforcing.cli import app, early
from headforcing.cli.console import show_error
from headforcing.roles.maps.origin import ModelFacts, Origin
from headforcing.roles.maps.presets import PRESETS

RUN = CliRunner()
ROOT = Path(__file__).parents[2]


def fresh(program: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in a process that has imported nothing."""
    path = [str(ROOT), *sys.path]
    program = f"import sys\nsys.path[:0] = {path!r}\n{program}"
    line = [sys.executable, "-I", "-c", program, *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


EARLY = """
import shlex
from headforcing.cli import app, early

PLANTED
for command in map(shlex.split, sys.argv[1:]):
    try:
        app(command)
    except SystemExit as error:
        assert error.code == 2, command
    assert "torch" not in sys.modules, command
    assert "numpy" not in sys.modules, command
"""
TYPOS = [
    "demo --preset memrop",
    "scenes --preset memrop",
    "compare full memrop",
    "estimate --preset memrop",
    "demo --prompt 'dawn summer calm car blue'",
    "scenes --prompts 'day summer calm car blue' --prompts 'day summer calm car'",
    "demo --out file",
    "demo --out file/inside",
    "demo --out /proc/self/nowhere",
    "scenes --out file",
    "compare full --out file",
    "profile --out file/profile.safetensors",
]


def test_typos_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = fresh(EARLY.replace("PLANTED", ""), tmp_path, *TYPOS)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    said = done.stderr.splitlines()
    assert len(said) == len(TYPOS)
    assert all("unknown preset 'memrop'" in said[row] and "memrope" in said[row] for row in (0, 1, 3))
    assert "'memrop' is neither a preset nor a role-map file" in said[2]
    assert "got 'dawn', expected the time of day" in said[4]
    assert "'day summer calm car': word 5 of the prompt: got 'nothing', expected the colour" in said[5]
    for line in said[6:]:
        assert re.search("cannot be written .*: choose another --out", line)
        assert "Errno" not in line


@pytest.mark.slow
def test_the_test_catches_a_typo_that_is_found_late(tmp_path: Path) -> None:
    """Planted bug: a name is checked where torch is needed anyway."""
    planted = (
        "import headforcing.cli.estimate as at\nright = at.check_preset\n"
        "def late(name):\n    import torch\n    right(name)\nat.check_preset = late"
    )
    assert "AssertionError" in fresh(EARLY.replace("PLANTED", planted), tmp_path, TYPOS[3]).stderr


def test_the_names_that_are_known_early_are_those_of_the_presets() -> None:
    assert tuple(PRESETS) == early.PRESETS


USERS = {
    "boom": ("def boom():\n    return inner()\n\ndef inner():\n    raise LookupError('mine')\n", "explain"),
    "late": (
        "import torch\n\ndef late():\n    return torch.nn.Linear(2, 2), run\n\n"
        "def run(prompt=''):\n    raise LookupError('mine')\n",
        "profile",
    ),
    "chained": (
        "def chained():\n    try:\n        {}['a']\n    except KeyError as error:\n"
        "        raise LookupError('mine') from error\n",
        "check",
    ),
    "module": ("raise LookupError('mine')\n", "explain"),
}
ENTRY = "from headforcing import cli\nPLANTED\ncli.app(sys.argv[1:])"


def frames(said: str) -> list[str]:
    """The files of a traceback, in order."""
    return re.findall(r'File "([^"]+)", line', said)


def check_ones_own(folder: Path, name: str, planted: str = "") -> None:
    text, command = USERS[name]
    (folder / f"my_{name}.py").write_text(text)
    if name == "late":  # a model that can be profiled, so that the run is reached
        (folder / f"my_{name}.py").write_text(
            text.replace("torch.nn.Linear(2, 2)", "demo_model()").replace(
                "import torch", "from headforcing.demo import demo_model"
            )
        )
    done = fresh(ENTRY.replace("PLANTED", planted), folder, command, f"my_{name}:{name}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "LookupError: mine"
    found = frames(done.stderr)
    assert found, done.stderr
    assert {Path(file).name for file in found} == {f"my_{name}.py"}, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", USERS)
def test_ones_own_error_begins_in_ones_own_code(tmp_path: Path, name: str) -> None:
    check_ones_own(tmp_path, name)


def test_it_begins_there_where_torch_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same without a process of its own."""
    (tmp_path / "my_own.py").write_text(USERS["boom"][0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", None)
    with pytest.raises(LookupError, match="mine") as caught:
        app(["explain", "my_own:boom"])
    assert sys.excepthook is show_error
    show_error(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "LookupError: mine"
    assert [Path(file).name for file in frames(said)] == ["my_own.py"] * 2


@pytest.mark.slow
def test_the_test_catches_frames_that_are_not_ones_own(tmp_path: Path) -> None:
    """Planted bug: the traceback as it is."""
    with pytest.raises(AssertionError):
        check_ones_own(tmp_path, "boom", "cli.show_error = sys.__excepthook__")


def test_maps_of_other_shapes_are_said_to_be_so(tmp_path: Path) -> None:
    facts = {"head_dim": 16, "window": 21, "chunk": 3, "model_class": "Model"}
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    for measured in (True, False):
        for file, layers, heads in ((one, 2, 3), (other, 4, 2)):
            origin = Origin(model=ModelFacts(layers=layers, heads=heads, **facts)) if measured else Origin()
            rows = ((Local(), *[Anchor()] * (heads - 1)),) * layers
            RoleMap(rows, origin).save(file)
        done = RUN.invoke(app, ["roles", "compare", str(one), str(other)])
        assert done.exit_code == 2
        assert "cannot compare 2 layers x 3 heads with 4 layers x 2 heads" in done.stderr
        assert "the model" not in done.stderr


def test_files_that_cannot_be_used_are_said_to_be_so(tmp_path: Path) -> None:
    roles, file = tmp_path / "roles.json", tmp_path / "file"
    RoleMap.uniform(Local(), 1, 1).save(roles)
    file.write_text("1\n")
    place = str(file / "out.json")
    weights = ["demo", "--weights", str(tmp_path / "nofile"), "--out", str(tmp_path / "out")]
    for command in (
        ["roles", "import", str(file), "--format", "pyramid_forcing", "--out", place],
        ["roles", "show", str(tmp_path / "nofile")],
        ["roles", "plot", str(roles), "--out", str(file)],
        weights,
    ):
        done = RUN.invoke(app, command)
        assert done.exit_code == 2, done.output
        assert re.search("check the path|cannot be read", done.stderr), done.stderr
        assert "Errno" not in done.stderr
