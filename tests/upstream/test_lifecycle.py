"""What is not ours passes through, and nothing stays behind after removal."""

from __future__ import annotations

import pytest

from .harness import MARKS, Upstream, assert_identical
from .scenarios import (
    EMPTIED,
    EMPTIED_UNSAID,
    GRADIENTS_MIDWAY,
    LAYERS,
    PASS_THROUGH,
    REFUSED_RINGS,
    REMOVALS,
    RINGS_REFUSED,
    SWITCHES,
    Case,
    cases_of,
)

pytestmark = MARKS


@pytest.mark.parametrize("case", cases_of(*PASS_THROUGH), ids=str)
def test_calls_without_a_cache_or_with_gradients_pass_through(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.calls == 0
    assert applied.passes == untouched.passes == case.scenario.passes
    assert_identical(untouched, applied)


@pytest.mark.parametrize("case", cases_of(GRADIENTS_MIDWAY), ids=str)
def test_gradients_in_the_middle_of_a_video_are_right_or_refused(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert not untouched.facts["refused"]
    if not applied.facts["refused"]:
        assert_identical(untouched, applied)


@pytest.mark.parametrize("case", cases_of(*REMOVALS), ids=str)
def test_removal_leaves_no_trace(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.calls == case.scenario.passes // 2 * LAYERS
    for fact, value in untouched.facts.items():
        assert applied.facts[fact] == value, fact
    assert_identical(untouched, applied)


@pytest.mark.parametrize("case", cases_of(*SWITCHES), ids=str)
def test_a_prompt_switch_does_what_is_done_by_hand_upstream(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.calls == case.scenario.passes * LAYERS
    assert_identical(untouched, applied)


@pytest.mark.parametrize("case", cases_of(*EMPTIED), ids=str)
def test_a_prompt_switch_may_empty_the_cache(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.facts["refused"] == ""
    assert applied.calls == case.scenario.passes * LAYERS
    assert_identical(untouched, applied)


@pytest.mark.parametrize("case", cases_of(*EMPTIED_UNSAID), ids=str)
def test_a_prompt_switch_that_leaves_an_empty_sink_is_refused(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert untouched.facts["refused"] == ""
    assert "global_sink=True" in applied.facts["refused"]


@pytest.mark.parametrize("case", cases_of(*RINGS_REFUSED), ids=str)
def test_what_a_ring_cannot_be_served_with_is_refused(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert untouched.facts["refused"] == ""
    assert REFUSED_RINGS[case.scenario.name] in applied.facts["refused"]
