"""Trade-offs of frames against error: their convex hulls, and what is bought along them.

Errors and frames are added up exactly, so that neither ties nor the order of heads hang on rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

from headforcing.role import HeadRole


class Choice(NamedTuple):
    """What a group of heads can have: frames kept in all, their error then, and the role."""

    frames: int
    error: Fraction
    role: HeadRole


class _Step(NamedTuple):
    """From one choice of a group to the next on its hull."""

    group: int
    number: int
    frames: int
    saved: Fraction


def lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull from the fewest frames to the smallest error, points on its edges included.

    Of choices that keep as many frames, the best counts; of equally good ones the first.
    """
    best: dict[int, Choice] = {}
    for choice in choices:
        if choice.frames not in best or choice.error < best[choice.frames].error:
            best[choice.frames] = choice
    hull: list[Choice] = []
    for choice in sorted(best.values(), key=itemgetter(0)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) < _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> Fraction:
    """Error saved per frame."""
    return (a.error - b.error) / (b.frames - a.frames)


def _steps(hulls: Sequence[Sequence[Choice]]) -> list[_Step]:
    """All steps of all groups, the most error saved per frame first."""
    steps = [
        _Step(group, number, b.frames - a.frames, a.error - b.error)
        for group, hull in enumerate(hulls)
        for number, (a, b) in enumerate(pairwise(hull))
    ]
    return sorted(steps, key=lambda step: (-step.saved / step.frames, step.group, step.number))


def buy(hulls: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """What every group gets."""
    chosen, spent = [0] * len(hulls), sum(hull[0].frames for hull in hulls)
    for step in _steps(hulls):
        if chosen[step.group] == step.number and spent + step.frames <= budget:
            chosen[step.group] += 1
            spent += step.frames
    return [hull[number] for hull, number in zip(hulls, chosen, strict=True)]


def curve(hulls: Sequence[Sequence[Choice]]) -> tuple[tuple[int, float], ...]:
    """Frames and total error after every step."""
    frames, error = sum(hull[0].frames for hull in hulls), sum((hull[0].error for hull in hulls), Fraction())
    points = [(frames, float(error))]
    for step in _steps(hulls):
        frames, error = frames + step.frames, error - step.saved
        points.append((frames, float(error)))
    return tuple(points)


def together(members: Sequence[Sequence[Choice]]) -> list[Choice]:
    """What heads can have that all get the same: frames and errors added up, role by role."""
    return [
        Choice(sum(c.frames for c in same), sum((c.error for c in same), Fraction()), same[0].role)
        for same in zip(*members, strict=True)
    ]
