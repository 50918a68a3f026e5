"""Every answer of a Wan-like adapter: right ones pass the kit with nothing else, a wrong one is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from headforcing.testing import check_adapter
from headforcing.testing.answers import CHOICES
from tests.testing.wanlike import Answers, WanLike, WanLikeHost

EVERY = Answers(True, True, 3, True, "real", True, True, True, True, True)
"""No answer is Wan's."""
ONE_BY_ONE = [
    dataclasses.replace(Answers(), **{field.name: getattr(EVERY, field.name)})
    for field in dataclasses.fields(Answers)
]
PARITY = ("fits", "first_chunk", "dense_parity", "parity_through_eviction", "counters_move")


@pytest.mark.parametrize(
    "answers", [EVERY, Answers(table="attribute"), Answers(table="own"), *ONE_BY_ONE], ids=str
)
def test_answers_and_nothing_else_make_an_adapter(answers: Answers) -> None:
    report = check_adapter(WanLike(answers), WanLikeHost(answers), only=PARITY)
    report.raise_if_failed()
    assert report.count("passed") == len(PARITY)


@pytest.mark.slow
@pytest.mark.parametrize("answers", [Answers(), EVERY, dataclasses.replace(EVERY, plain=False)], ids=str)
def test_they_pass_the_whole_kit(answers: Answers) -> None:
    check_adapter(WanLike(answers), WanLikeHost(answers)).raise_if_failed()


def reasons(name: str) -> str:
    """What the kit says of one wrong answer, where all others are right."""
    wrong = WanLike(Answers())
    setattr(wrong, name, CHOICES[name][1])
    report = check_adapter(wrong, WanLikeHost(Answers()), only=("own_memory_is_the_hosts", *PARITY))
    return "\n".join(result.reason for result in report.failed)


@pytest.mark.parametrize("name", ["halves", "norm_per_head", "positions", "start_in"])
def test_the_wrong_answer_is_named(name: str) -> None:
    assert f"it passes with {name} = {CHOICES[name][0]!r}" in reasons(name)


def test_exchanged_names_are_named() -> None:
    for name, value in (("norms", ("norm_k", "norm_q")), ("projections", ("k", "q", "v"))):
        wrong = WanLike(Answers())
        right = getattr(wrong, name)
        setattr(wrong, name, value)
        report = check_adapter(wrong, WanLikeHost(Answers()), only=("first_chunk",))
        assert f"it passes with {name} = {right!r}" in str(report)


def test_where_no_answer_helps_none_is_named() -> None:
    class Forgetful(WanLike):
        def output(self, module: Any, out: Any, call: Any, memo: Any) -> Any:
            return 2 * super().output(module, out, call, memo)

    report = check_adapter(Forgetful(Answers()), WanLikeHost(Answers()), only=("first_chunk",))
    assert report.failed
    assert "it passes with" not in str(report)


@pytest.mark.parametrize("answer", ["grid", "start", "end", "cache"])
def test_an_answer_that_is_no_argument_is_said(answer: str) -> None:
    wrong = WanLike(Answers())
    setattr(wrong, answer, "elsewhere")
    report = check_adapter(wrong, WanLikeHost(Answers()), only=("fits",))
    assert f"has no argument 'elsewhere': set {answer}" in str(report)


def test_a_forward_without_a_mask_needs_no_answer() -> None:
    adapter = WanLike(Answers())
    adapter.forward, adapter.mask = (*WanLike.forward[:3], *WanLike.forward[4:]), "block_mask"
    model, cache = WanLikeHost(Answers()).model(), {name: torch.zeros(1) for name in adapter.counters}
    traced = adapter.traced_call(model, (), {"x": cache[adapter.counters[0]], "cache": cache})
    assert traced is not None
    assert "block_mask" not in traced.arguments
