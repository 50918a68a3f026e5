"""What is looked at with an installed wheel, on lines and commands that fail."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT, commands, imports

CHECK: dict[str, Any] = runpy.run_path(str(ROOT / ".ci" / "check_wheel.py"))
PYTHON = Path(sys.executable)

PAGE = """
```python
import os, json
def f():
    from headforcing import RoleMap
```
```{.python notest="a checkout"}
from pipeline import Inference
import headforcing as hf
```
```bash
$ A=1 headforcing presets --store lean \\
    --json && make test  # both
headforcing roles pull ORG/NAME --revision <a full hash>
```
"""


def test_what_a_page_shows() -> None:
    assert imports(PAGE) == [
        (3, "import os, json"),
        (5, "from headforcing import RoleMap"),
        (9, "import headforcing as hf"),
    ]
    assert [(line, words) for line, words, _ in commands(PAGE)] == [
        (12, ["headforcing", "presets", "--store", "lean", "--json"]),
        (12, ["make", "test"]),
        (14, ["headforcing", "roles", "pull", "ORG/NAME", "--revision", "0" * 40]),
    ]


@pytest.mark.slow
def test_no_line_lives_on_what_another_one_imported(tmp_path: Path) -> None:
    check_no_line_lives_on_another(tmp_path)


def test_no_line_lives_on_another_in_children_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which has imported torch, as the process that they are children of has."""

    def ends(python: Path, jobs: list[Any], here: Path) -> list[Any]:
        with capsys.disabled():
            return [CHECK["_forked"](job) for job in jobs]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(CHECK["failed_imports"].__globals__, "ends", ends)
    check_no_line_lives_on_another(tmp_path)


def check_no_line_lives_on_another(tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "__init__.py").touch()
    (tmp_path / "outer" / "inner.py").write_text("here = 1")
    used = "import outer\nouter.inner.here"
    lines = {"import outer.inner": "a.md:1", used: "a.md:2", "import os\nos._exit(3)": "a.md:3"}
    used_found, left = CHECK["failed_imports"](PYTHON, lines, tmp_path)
    assert used_found.startswith("a.md:2: import outer")
    assert "AttributeError: module 'outer' has no attribute 'inner'" in used_found
    assert left.startswith("a.md:3:")
    assert left.endswith("exit code 3")


@pytest.mark.slow
def test_commands_that_fail_are_told_from_those_that_say_what_they_lack(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def make():\n    return undefined\n")
    shown = [
        CHECK["Shown"](f"a.md:{line}", words.split(), spared)
        for line, (words, spared) in enumerate(
            [
                ("explain headforcing.demo:demo_model --json", False),
                ("explain absent:make", True),
                ("explain absent:make", False),
                ("explain broken:make", True),
                ("roles show roles.json --no-such --json", True),
                ("demo --seconds 30 --out my-demo", False),
            ]
        )
    ]
    option, lacking, crash = CHECK["failed_commands"](PYTHON, shown, tmp_path)
    assert option == "a.md:4: headforcing roles show has no --no-such"
    assert lacking.startswith("a.md:2: headforcing explain absent:make\n")
    assert lacking.endswith("exit code 2")
    assert crash.startswith("a.md:3: headforcing explain broken:make\n")
    assert "NameError: name 'undefined' is not defined" in crash


def test_the_description_has_no_relative_links() -> None:
    description = runpy.run_path(str(ROOT / "setup.py"))["description"]
    picture = "![c](docs/c.png)\n\n*Its caption: `make c`.*\n\n"
    kept = "[paper](https://arxiv.org/abs/1) [below](#below)\n"
    assert description(f"# Title\n\n{picture}[a](docs/a.md#b) {kept}") == f"# Title\n\na {kept}"
