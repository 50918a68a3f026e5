"""With roles equal to upstream's own policy, nothing about a run changes."""

from __future__ import annotations

import pytest
import torch

from .harness import MARKS, Upstream, assert_identical, largest_difference
from .scenarios import (
    AVERAGED,
    AVERAGES,
    LAYERS,
    LONG_AVERAGES,
    OTHER_AVERAGES,
    OTHER_SINKS,
    PAST_ENDS,
    PRESET,
    REWARD,
    RINGS,
    TWICE,
    TWICE_FORGOTTEN,
    TWO_STEP_RING,
    TWO_TRANSFORMERS,
    WITHOUT_A_TABLE,
    Case,
    cases_of,
    control_cases,
    parity_cases,
)

pytestmark = MARKS
SMALLEST_CHANGE = 0.02


@pytest.mark.parametrize("case", parity_cases(), ids=str)
def test_equal_roles_change_nothing(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.passes == untouched.passes == case.scenario.passes
    assert applied.calls == case.scenario.passes * LAYERS
    assert_identical(untouched, applied)


@pytest.mark.parametrize("case", cases_of(TWO_TRANSFORMERS), ids=str)
def test_frames_are_told_from_the_tables_alone(case: Case, upstream: Upstream) -> None:
    assert upstream.result(case).facts["grids"] == [[1, 4, 6], [case.scenario.chunk, 4, 6]]


@pytest.mark.parametrize("case", control_cases(), ids=str)
def test_other_roles_change_the_video(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.calls == case.scenario.passes * LAYERS
    video = applied.tensors["video"]
    assert torch.isfinite(video).all()
    assert largest_difference(untouched.tensors["video"], video) > SMALLEST_CHANGE


@pytest.mark.parametrize("case", control_cases(), ids=str)
def test_other_roles_leave_the_end_indices_as_upstream_counts_them(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert torch.equal(untouched.tensors["indices"], applied.tensors["indices"])


@pytest.mark.parametrize("case", cases_of(*PAST_ENDS, policy=PRESET), ids=str)
def test_bounded_roles_go_on_where_upstream_ends(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert untouched.facts["ended"]
    assert not applied.facts["ended"]
    assert applied.passes == case.scenario.passes
    assert applied.calls == case.scenario.passes * LAYERS
    assert torch.isfinite(applied.tensors["video"]).all()


@pytest.mark.parametrize("case", cases_of(*WITHOUT_A_TABLE), ids=str)
def test_equal_roles_change_nothing_past_frame_1024(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.calls == case.scenario.passes * LAYERS
    assert untouched.tensors["video"].shape[1] == case.scenario.frames > 1024
    assert_identical(untouched, applied)


@pytest.mark.parametrize("case", cases_of(*WITHOUT_A_TABLE, policy=PRESET), ids=str)
def test_bounded_roles_go_past_frame_1024(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.calls == case.scenario.passes * LAYERS
    video = applied.tensors["video"]
    assert video.shape == untouched.tensors["video"].shape
    assert torch.isfinite(video).all()
    late = (video[:, 1024:] - video[:, 1023:-1]).abs().amax(dim=(2, 3, 4))
    assert late.min() > SMALLEST_CHANGE


@pytest.mark.parametrize("case", cases_of(LONG_AVERAGES, policy=PRESET), ids=str)
def test_other_roles_go_past_frame_1024_where_averages_do(case: Case, upstream: Upstream) -> None:
    applied = upstream.result(case)
    assert applied.calls == case.scenario.passes * LAYERS
    assert torch.isfinite(applied.tensors["video"]).all()


@pytest.mark.parametrize("case", cases_of(AVERAGES, policy=AVERAGED), ids=str)
def test_averages_are_close(case: Case, upstream: Upstream) -> None:
    """Not bit for bit: ours come first among the keys, theirs behind the sink, and ours are in float32."""
    untouched, applied = upstream.pair(case)
    assert applied.calls == case.scenario.passes * LAYERS
    limit = 1e-4 if case.dtype == "float32" else 0.1
    assert largest_difference(untouched.tensors["video"], applied.tensors["video"]) < limit


@pytest.mark.parametrize("case", cases_of(*RINGS, TWICE_FORGOTTEN), ids=str)
def test_a_ring_is_close(case: Case, upstream: Upstream) -> None:
    """Not bit for bit: the ring is attended in the order of its slots, ours by age."""
    untouched, applied = upstream.pair(case)
    assert applied.calls == case.scenario.passes * LAYERS
    assert torch.equal(untouched.tensors["indices"], applied.tensors["indices"])
    limit = 1e-5 if case.dtype == "float32" else 0.1
    for name in ("video",) if "video" in applied.tensors else ("first", "second"):
        expected, found = untouched.tensors[name], applied.tensors[name]
        filled = case.scenario.window
        assert torch.equal(expected[:, :filled], found[:, :filled])
        assert largest_difference(expected, found) < limit


@pytest.mark.parametrize("case", cases_of(TWO_STEP_RING), ids=str)
def test_a_ring_upstream_keeps_two_passes_of_a_chunk(case: Case, upstream: Upstream) -> None:
    """From the chunk that fills the cache on, its second pass writes the slot of the next one."""
    untouched, applied = upstream.pair(case)
    expected, found = untouched.tensors["video"], applied.tensors["video"]
    filled = case.scenario.window - 1
    assert torch.equal(expected[:, :filled], found[:, :filled])
    for frame in range(filled, case.scenario.frames):
        assert largest_difference(expected[:, frame], found[:, frame]) > SMALLEST_CHANGE


@pytest.mark.parametrize("case", cases_of(TWICE), ids=str)
def test_a_second_video_upstream_begins_with_the_slots_of_the_first(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    limit = 1e-5 if case.dtype == "float32" else 0.1
    assert largest_difference(untouched.tensors["first"], applied.tensors["first"]) < limit
    assert largest_difference(untouched.tensors["second"], applied.tensors["second"]) > SMALLEST_CHANGE


@pytest.mark.parametrize("case", cases_of(AVERAGES, policy=OTHER_AVERAGES), ids=str)
def test_averages_of_other_weights_are_not(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    limit = 1e-3 if case.dtype == "float32" else SMALLEST_CHANGE
    assert largest_difference(untouched.tensors["video"], applied.tensors["video"]) > limit


@pytest.mark.parametrize("case", [c for p in OTHER_SINKS for c in cases_of(REWARD, policy=p)], ids=str)
def test_other_sinks_change_the_video_once_frames_are_evicted(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    before, after = (result.tensors["video"] for result in (untouched, applied))
    window = case.scenario.window
    assert torch.equal(before[:, :window], after[:, :window])
    assert largest_difference(before, after) > 1e-4
