"""With roles equal to upstream's own policy, nothing about a run changes."""

from __future__ import annotations

import pytest
import torch

from .harness import MARKS, Upstream, assert_identical, largest_difference
from .scenarios import LAYERS, PAST_THE_END, PRESET, Case, cases_of, control_cases, parity_cases

pytestmark = MARKS
SMALLEST_CHANGE = 0.02


@pytest.mark.parametrize("case", parity_cases(), ids=str)
def test_equal_roles_change_nothing(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.passes == untouched.passes == case.scenario.passes
    assert applied.calls == case.scenario.passes * LAYERS
    assert_identical(untouched, applied)


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


@pytest.mark.parametrize("case", cases_of(PAST_THE_END, policy=PRESET), ids=str)
def test_bounded_roles_go_on_where_upstream_ends(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert untouched.facts["ended"]
    assert not applied.facts["ended"]
    assert applied.passes == case.scenario.passes
    assert applied.calls == case.scenario.passes * LAYERS
    assert torch.isfinite(applied.tensors["video"]).all()
