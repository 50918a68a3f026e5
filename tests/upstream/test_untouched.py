"""The runs that the others are compared with are worth comparing with."""

from __future__ import annotations

import pytest
import torch

from .harness import MARKS, Upstream, assert_identical
from .scenarios import AGAIN, Case, every_case

pytestmark = MARKS
LATENTS = ("video", "first", "second", "clean")
SMALLEST_SPREAD = 0.1


@pytest.mark.parametrize("case", every_case(AGAIN), ids=str)
def test_untouched_run_is_deterministic(case: Case, upstream: Upstream) -> None:
    first, second = upstream.pair(case)
    assert first.passes == case.scenario.passes
    assert first.facts == second.facts
    assert_identical(first, second)


@pytest.mark.parametrize("case", every_case(AGAIN), ids=str)
def test_untouched_run_differs_from_frame_to_frame(case: Case, upstream: Upstream) -> None:
    result = upstream.result(case)
    latents = [result.tensors[name] for name in LATENTS if name in result.tensors]
    frames = torch.cat(latents).float().flatten(2)
    assert torch.isfinite(frames).all()
    assert frames.std(dim=-1).min() > SMALLEST_SPREAD
    assert (frames[:, 1:] - frames[:, :-1]).abs().amax(dim=-1).min() > SMALLEST_SPREAD
