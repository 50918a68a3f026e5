"""The script that plants bugs: what it changes, and what it says of a run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import ROOT, TESTS, Mutant, drawn, run, table

FILES = ("roles/windows.py", "stores/shifts.py", "roles/maps/strict_json.py", "attention/stream.py")


@pytest.fixture(scope="module")
def found() -> list[Mutant]:
    return mutants.all_mutants([f"headforcing/{name}" for name in FILES])


def test_every_mutant_is_another_program_and_one_change(found: list[Mutant]) -> None:
    assert {one.path for one in found} == {f"headforcing/{name}" for name in FILES}
    assert {one.kind for one in found} >= {"comparison", "operator", "constant", "left out", "sign"}
    for one in found:
        text = (ROOT / one.path).read_bytes()
        first, last = one.span
        assert text[first:last].decode() == one.before
        assert text[:first].count(b"\n") + 1 == one.line
        changed = one.source(text)
        assert changed.startswith(text[:first])
        assert changed.endswith(text[last:])
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
        assert not one.before.startswith(('"', "'", 'f"'))


def test_messages_annotations_and_docstrings_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    path = tmp_path / "one.py"
    path.write_text(
        '''"""About 1 < 2."""
def f(x: "1 < 2" = 3) -> tuple[int, 4]:
    """About 5."""
    if x > 6:
        raise ValueError(f"{x} > {6 + 1}: ä")
    return f"{x + 1}"
''',
        encoding="utf-8",
    )
    made = [(one.before, one.after) for one in mutants.mutants(path)]
    raising = """raise ValueError(f"{x} > {6 + 1}: ä")"""
    assert made == [("3", "(4)"), ("x > 6", "(x >= 6)"), ("6", "(7)"), (raising, "pass")]


def test_a_draw_is_even_repeatable_and_of_the_size(found: list[Mutant]) -> None:
    some = drawn(found, 20, 3)
    assert some == drawn(found, 20, 3) != drawn(found, 20, 4)
    assert len(set(some)) == 20
    assert all(sum(one.path.endswith(name) for one in some) == 5 for name in FILES)
    assert sorted(map(repr, drawn(found, 10**6, 0))) == sorted(map(repr, found))


def test_every_named_test_is_there_and_every_module_has_some() -> None:
    for name, files in TESTS.items():
        assert (ROOT / name).exists() or list(ROOT.glob(f"{name}*")), name
        assert all((ROOT / file).is_file() for file in files), name


@pytest.mark.parametrize(
    ("result", "body"),
    [
        ("killed", "assert False"),
        pytest.param("survived", "pass", marks=pytest.mark.slow),
        pytest.param("timed out", "import time; time.sleep(60)", marks=pytest.mark.slow),
    ],
)
def test_a_run_says_how_it_ended(tmp_path: Path, result: str, body: str) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: slow\n")
    name = f"test_{result.replace(' ', '_')}.py"
    (tmp_path / name).write_text(f"def test_it():\n    {body}\n")
    got, _, by = run(tmp_path, [name], 2 if result == "timed out" else 60)
    assert got == result
    assert (name in by) == (result == "killed")


def test_the_table_counts_only_what_was_decided() -> None:
    results = ["killed"] * 3 + ["survived", "timed out"]
    said = table([{"path": "a.py", "result": result} for result in results])
    assert "| a.py | 3 | 1 | 1 |" in said
    assert "75.0 % killed of the 4 that were decided" in said
