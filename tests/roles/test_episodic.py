"""`Uniform`: a memory spread over time, down to a single frame. Rules that read keys: whatever these are."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headforcing.roles import Memory, episodic
from headforcing.roles.episodic import EpisodicUpdate, MaxMin, ThresholdFifo, Uniform, similarity
from headforcing.types import FrameTable
from tests.examples import examples


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


# Rules that read keys ---------------------------------------------------------------------------------

RULES = (MaxMin(), ThresholdFifo(), ThresholdFifo(1.5))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
rules, dtypes = st.sampled_from(RULES), st.sampled_from(DTYPES)


def drawn_keys(seed: int, frames: int, dtype: torch.dtype) -> Tensor:
    """Keys `[2, frames, 2, 2, 4]` with magnitudes below 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(2, frames, 2, 2, 4, generator=generator) * 2 - 1).to(dtype)


def least_alike(alike: Tensor, stored: int, places: int) -> list[int]:
    """Rows that `MaxMin` keeps, of similarities `[m, m]`, in plain words."""
    kept = list(range(stored))
    for candidate in range(stored, len(alike)):
        kept.append(candidate)
        if len(kept) > places:
            pairs = [(a, b) for a in kept for b in kept if a < b]
            older, newer = max(pairs, key=lambda pair: (float(alike[pair]), [-row for row in pair]))

            def next_nearest(row: int, pair: tuple[int, int] = (older, newer)) -> float:
                return max((float(alike[row, other]) for other in kept if other not in pair), default=-9.0)

            kept.remove(older if next_nearest(older) > next_nearest(newer) else newer)
    return kept


def check_least_alike_stay(seed: int, places: int, more: int, stored: int, ties: bool) -> None:
    keys = drawn_keys(seed, places + more, torch.float32)
    if ties:
        keys = (2 * keys).round()
    alike = similarity(keys)
    alike = alike.triu() + alike.triu(1).mT  # what is rounded otherwise in the two halves is no tie
    found = MaxMin().choose(keys, stored, places)
    assert found.tolist() == [least_alike(one, stored, places) for one in alike]


@given(st.integers(0, 999), st.integers(1, 8), st.integers(1, 4), st.data(), st.booleans())
@settings(max_examples=examples(60))
def test_of_the_most_similar_frames_one_leaves(
    seed: int, places: int, more: int, data: st.DataObject, ties: bool
) -> None:
    check_least_alike_stay(seed, places, more, data.draw(st.integers(0, places)), ties)


def check_forty() -> None:
    for seed in range(40):
        check_least_alike_stay(seed, 4, 3, 4, False)


def the_nearest_decides(patch: pytest.MonkeyPatch) -> None:
    topk = Tensor.topk
    patch.setattr(Tensor, "topk", lambda x, k, dim: SimpleNamespace(values=topk(x, k, dim).values.flip(-1)))


def a_frame_is_like_itself(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tensor, "fill_", lambda x, value: x)


def who_left_comes_back(patch: pytest.MonkeyPatch) -> None:
    scatter = Tensor.scatter_
    patch.setattr(
        Tensor, "scatter_", lambda x, dim, index, value: x if dim == 2 else scatter(x, dim, index, value)
    )


@pytest.mark.parametrize("plant", [the_nearest_decides, a_frame_is_like_itself, who_left_comes_back])
def test_a_rule_that_lets_another_frame_go_is_found(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_forty()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_forty()


def check_rows_exist(rule: EpisodicUpdate, keys: Tensor, stored: int, places: int) -> None:
    rows = rule.choose(keys, stored, places)
    assert rows.shape == (len(keys), places)
    assert bool((rows[:, 1:] > rows[:, :-1]).all())
    assert rows.min() >= 0
    assert rows.max() < keys.shape[1]


@given(rules, dtypes, st.integers(0, 99), st.data())
@settings(max_examples=examples(50))
def test_rows_exist_whatever_keys_are(
    rule: EpisodicUpdate, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    stored = data.draw(st.integers(1, 4))
    keys = drawn_keys(seed, stored + data.draw(st.integers(1, 3)), dtype)
    for _ in range(data.draw(st.integers(0, 3))):
        value = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max, 0.0]))
        frame = data.draw(st.integers(0, keys.shape[1] - 1))
        keys[0, frame, data.draw(st.integers(0, 1)), 0, data.draw(st.integers(0, 3)) :] = value
    check_rows_exist(rule, keys, stored, stored)


def check_magnitude_does_not_matter(dtype: torch.dtype, seed: int) -> None:
    """Cosines: by a power of two, so that no key is rounded."""
    keys = drawn_keys(seed, 5, dtype)
    largest = 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] - 1)
    assert torch.equal(similarity(keys * largest), similarity(keys))


@given(dtypes, st.integers(0, 99))
@settings(max_examples=examples(30))
def test_frames_are_alike_however_large_their_keys_are(dtype: torch.dtype, seed: int) -> None:
    check_magnitude_does_not_matter(dtype, seed)


def similarity_as_it_was(keys: Tensor) -> Tensor:
    spots = keys.flatten(2, 3).transpose(1, 2).contiguous().float()
    dots = spots @ spots.mT
    scale = dots.diagonal(dim1=-2, dim2=-1).clamp_min(1e-24).rsqrt()
    return (dots * scale[..., :, None] * scale[..., None, :]).mean(1)


def test_a_similarity_that_hangs_on_magnitude_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "similarity", similarity_as_it_was)
    with pytest.raises(AssertionError):
        check_magnitude_does_not_matter(torch.float32, 0)


class Spy(EpisodicUpdate):
    """Notes what it is asked."""

    reads_keys = True
    asked: ClassVar[list[tuple[int, int]]] = []

    def choose(self, keys: Tensor, stored: int, capacity: int) -> Tensor:
        self.asked.append((stored, capacity))
        return torch.arange(capacity)[None]


@pytest.mark.parametrize(("before", "stored"), [(6, 3), (5, 2), (7, 4), (12, 4)])
def test_frames_that_were_recent_are_candidates_like_new_ones(before: int, stored: int) -> None:
    """Of `before` frames one is the sink, and up to two are the last ones; three more come."""
    Spy.asked.clear()
    rows = before + 3
    table = FrameTable(tuple(range(rows)), 3, 3, keys=lambda rows: torch.ones(1, len(rows), 1, 1, 1))
    Memory(1, 4, 2, Spy()).retain(table)
    assert Spy.asked == [(stored, 4)]
