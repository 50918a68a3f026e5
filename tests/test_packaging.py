"""What is declared about the package is what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import headforcing

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


def test_the_declared_packages_are_the_folders_that_exist():
    declared = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted(packages_that_exist())


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
