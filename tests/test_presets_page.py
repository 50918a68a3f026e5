"""The reference of presets says what the presets are."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_what_its_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("presets_reference")
    said = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    assert script.PAGE == ROOT / "docs" / "presets.md"
    assert said == script.page(), "run: python benchmarks/presets_reference.py"
    sys.modules.pop("presets_reference")
