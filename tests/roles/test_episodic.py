"""`Uniform`: a memory spread over time, down to a single frame."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headforcing.roles import Memory, episodic
from headforcing.roles.episodic import Uniform
from headforcing.types import FrameTable


def by_definition(frames: list[int], stored: int, places: int) -> list[int]:
    """Frame numbers that stay: of one too many, an inner one with the nearest neighbours, else the newest."""
    kept = frames[:stored]
    for frame in frames[stored:]:
        kept = [*kept, frame]
        if len(kept) > places:
            inner = {b: c - a for a, b, c in zip(kept, kept[1:], kept[2:], strict=False)}
            kept.remove(max(inner, key=lambda b: (-inner[b], b)) if inner else frame)
    return kept


def check(frames: list[int], stored: int, places: int) -> None:
    kept = [frames[row] for row in Uniform().spread(frames, stored, places)]
    assert kept == by_definition(frames, stored, places)
    assert len(kept) == min(places, len(frames))
    assert kept[0] == frames[0], "the oldest stays"


@given(st.sets(st.integers(0, 99), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 12))
def test_frames_stay_spread_over_time(frames: set[int], places: int, stored: int) -> None:
    check(sorted(frames), min(stored, places, len(frames)), places)


def kept_by(role: Memory, chunks: int) -> list[tuple[int | None, ...]]:
    """Frames that a role keeps when a chunk begins, of chunks of three."""
    frames: tuple[int | None, ...] = ()
    found = []
    for start in range(0, 3 * chunks, 3):
        table = FrameTable(frames, min(3, start), 3, lambda rows: pytest.fail("keys are read"), start)
        rows = role.retain(table)
        assert not hasattr(rows, "chosen")
        found.append(tuple(frames[row] for row in rows))
        frames = (*found[-1], start, start + 1, start + 2)
    return found


def test_a_memory_of_one_place_keeps_the_first_frame_that_enters_it() -> None:
    found = kept_by(Memory(1, 1, 2, Uniform()), 20)
    assert found[:2] == [(), (0, 1, 2)]
    assert found[2:] == [(0, 1, start - 2, start - 1) for start in range(6, 60, 3)]


def test_a_rule_that_drops_another_frame_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = episodic._tightest
    for row in (0, -2):
        monkeypatch.setattr(episodic, "_tightest", lambda f, row=row: row if len(f) == 2 else right(f))
        with pytest.raises(AssertionError):
            check([3, 4, 8], 1, 1)
        with pytest.raises(AssertionError):
            test_a_memory_of_one_place_keeps_the_first_frame_that_enters_it()
