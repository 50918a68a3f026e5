"""Krea's sessions: frames that are computed again before every chunk, in one call under a mask."""

from __future__ import annotations

import pytest
import torch

from .harness import MARKS, Upstream, assert_identical, largest_difference
from .scenarios import (
    EQUAL,
    FIVE_FRAMES,
    IN_FLEX,
    LEFT_SESSION,
    REFERENCE,
    SESSION,
    SESSIONS,
    UNTOUCHED,
    VERIFIED,
    Case,
    Scenario,
    cases_of,
)

pytestmark = MARKS
VIDEOS = 2
ROUNDING = 1e-4
SMALLEST_CHANGE = 0.02


def fast(*scenarios: Scenario, policy: str = EQUAL) -> list[Case]:
    """In float32."""
    return [case for case in cases_of(*scenarios, policy=policy) if case.dtype == "float32"]


def equal_cases() -> list[Case]:
    return [*cases_of(SESSION), *fast(*SESSIONS[1:]), *fast(SESSION, policy=REFERENCE)]


@pytest.mark.parametrize("case", equal_cases(), ids=str)
def test_equal_roles_change_nothing(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.passes == untouched.passes == VIDEOS * case.scenario.passes
    assert applied.calls == VIDEOS * case.scenario.calls
    assert_identical(untouched, applied)


@pytest.mark.parametrize("case", fast(*IN_FLEX), ids=str)
def test_equal_roles_change_the_rounding_of_flex_attention_only(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.calls == VIDEOS * case.scenario.calls
    for name in ("first", "second"):
        apart = largest_difference(untouched.tensors[name], applied.tensors[name])
        assert 0 < apart < ROUNDING, f"{name}: {apart}"


@pytest.mark.parametrize("case", fast(*VERIFIED, policy=UNTOUCHED), ids=str)
def test_verify_says_so(case: Case, upstream: Upstream) -> None:
    facts = upstream.result(case).facts
    assert facts["result"] == ("rounding" if case.scenario.flex else "equal"), facts["said"]


@pytest.mark.parametrize("case", fast(SESSION, policy=FIVE_FRAMES), ids=str)
def test_other_roles_change_the_video_and_not_the_counters(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.calls == VIDEOS * case.scenario.calls
    assert torch.equal(untouched.tensors["indices"], applied.tensors["indices"])
    for name in ("first", "second"):
        assert torch.isfinite(applied.tensors[name]).all()
        assert largest_difference(untouched.tensors[name], applied.tensors[name]) > SMALLEST_CHANGE


@pytest.mark.parametrize("case", fast(LEFT_SESSION), ids=str)
def test_removal_leaves_no_trace(case: Case, upstream: Upstream) -> None:
    untouched, applied = upstream.pair(case)
    assert applied.calls == case.scenario.calls
    assert_identical(untouched, applied)
