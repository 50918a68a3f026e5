"""The reference of presets says what the presets are, and its script where it does not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
LINES = st.lists(st.sampled_from(["", "a", "b", "| c | d |", "# é"]), max_size=8)


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("presets_reference")
    sys.path.remove(str(ROOT / "benchmarks"))
    sys.modules.pop("presets_reference")


def test_the_page_is_what_its_script_writes(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.PAGE == ROOT / "docs" / "presets.md"
    assert script.main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_that_was_edited_is_told_from_the_page_and_left_alone(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "page", lambda: "one\ntwo\nthree\n")
    monkeypatch.setattr(script, "PAGE", tmp_path / "not_asked_for.md")
    out = tmp_path / "page.md"
    assert script.main(["--out", str(out)]) == 0
    assert out.read_bytes() == b"one\ntwo\nthree\n"
    assert script.main(["--out", str(out), "--check"]) == 0
    assert capsys.readouterr().out == ""
    out.write_bytes(edited := b"one\n2\nthree\nfour\n")
    assert script.main(["--out", str(out), "--check"]) == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert f"--out {out}" in first
    assert lines == ["-2: 2", "+2: two", "-4: four"]
    assert out.read_bytes() == edited
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_a_page_that_is_not_there_is_not_checked(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["--out", str(tmp_path / "page.md"), "--check"])
    assert stopped.value.code == 2
    assert "without --check" in capsys.readouterr().err


@given(LINES, LINES, st.sampled_from(["\n", "\r\n", ""]))
def test_texts_differ_where_a_line_is_told(script: Any, old: list[str], new: list[str], end: str) -> None:
    """The lines that are told turn one text into the other."""
    said, page = "\n".join(old) + end, "\n".join(new) + "\n"
    found = script.differences(said, page)
    assert bool(found) == (said != page)
    if said.splitlines() == page.splitlines():
        return
    gone = {int(line[1:].partition(":")[0]) for line in found if line[0] == "-"}
    come = {int(n[1:]): text for n, _, text in (line.partition(": ") for line in found if line[0] == "+")}
    stays = iter([line for number, line in enumerate(said.splitlines(), 1) if number not in gone])
    whole = [come[n] if n in come else next(stays) for n in range(1, len(page.splitlines()) + 1)]
    assert whole == page.splitlines()
    assert list(stays) == []
