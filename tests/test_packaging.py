"""What is declared about the package is what is there."""

from __future__ import annotations

import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import headforcing
import headforcing.demo

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]


def packages_that_exist() -> set[str]:
    folders = {
        path.parent.relative_to(ROOT).parts
        for top in ("headforcing", "integrations")
        for path in (ROOT / top).rglob("__init__.py")
    }
    return {".".join(p if p[0] == "headforcing" else ("headforcing", *p)) for p in folders}


def setup_of(command: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names in setup.py, as a build with this command finds them."""
    monkeypatch.setattr(sys, "argv", ["setup.py", command])
    return runpy.run_path(str(ROOT / "setup.py"))


def test_the_packages_are_the_folders_that_exist(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sorted(setup_of("bdist_wheel", monkeypatch)["PACKAGES"]) == sorted(packages_that_exist())
    editable = setup_of("editable_wheel", monkeypatch)
    assert editable["MAPPED"] == {}
    assert {*editable["PACKAGES"]} == packages_that_exist() - {"headforcing.integrations"}


@pytest.mark.slow
def test_type_checkers_follow_a_path_entry(tmp_path):
    """Which is what an editable installation is."""
    (tmp_path / "user.py").write_text(
        "import headforcing as hf\n"
        "from headforcing.demo import demo_model\n"
        "hf.apply_head_forcing(demo_model(), hf.Full()).absent\n"
    )
    answer = subprocess.run(
        [sys.executable, "-m", "mypy", "user.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
    )
    assert answer.stdout.splitlines() == [
        'user.py:3: error: "HeadForcing" has no attribute "absent"  [attr-defined]',
        "Found 1 error in 1 file (checked 1 source file)",
    ]


def test_a_clone_finds_its_adapters_without_an_import_hook(tmp_path):
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from importlib.util import find_spec\n"
        "print(find_spec('headforcing.integrations.self_forcing').origin)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert answer.stdout.strip() == str(ROOT / "integrations" / "self_forcing.py")


@pytest.mark.parametrize("package", [headforcing, headforcing.demo], ids=lambda package: package.__name__)
def test_completion_shows_the_api(package):
    assert set(package.__all__) <= set(dir(package))
    assert all(hasattr(package, name) for name in dir(package))


@pytest.mark.parametrize("package", [headforcing, headforcing.demo], ids=lambda package: package.__name__)
def test_no_name_that_is_imported_when_it_is_used_is_that_of_a_module(package):
    """Once that module is imported, the name would be the module."""
    assert not set(package.__all__) & {module.name for module in pkgutil.iter_modules(package.__path__)}


def test_every_code_file_is_in_a_package():
    code = [*(ROOT / "headforcing").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]
    assert [path for path in code if not (path.parent / "__init__.py").exists()] == []


def test_the_adapters_have_one_name():
    """From a clone, `import integrations` would load every adapter a second time."""
    code = "import sys; sys.path.insert(0, ''); import integrations"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode != 0
    assert "ImportError" in answer.stderr
    assert "pip install -e ." in answer.stderr


def test_the_adapters_are_importable_from_anywhere(tmp_path):
    code = "import headforcing.integrations as i; print(i.__file__)"
    python = [sys.executable, "-c", code]
    answer = subprocess.run(python, capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0, f"pip install -e . first: {answer.stderr}"


def test_there_is_one_version():
    assert headforcing.__version__ == VERSION
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [VERSION]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert next(v for v in versions if v != "Unreleased") == VERSION


def test_the_extra_all_leaves_out_only_what_needs_cuda():
    extras = dict(PROJECT["project"]["optional-dependencies"])
    (requirement,) = extras.pop("all")
    named = re.fullmatch(r"headforcing\[(.+)\]", requirement).group(1).split(",")
    assert sorted(named) == sorted(extras.keys() - {"flash-attn"})


def test_the_package_says_that_it_is_typed():
    assert (Path(headforcing.__file__).parent / "py.typed").exists()
