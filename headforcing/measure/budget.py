"""A role for every head within one budget over all heads: frames go where they reduce the error most.

Ours. Every head has a trade-off between stored frames and measured error, over the candidate roles of a
profile. Only its lower convex envelope counts, and steps along the envelopes are taken in the order of the
error they save per frame. After each step the total error is the smallest possible for that number of frames.
Errors of single heads are added up, which is our choice: interactions of heads are not measured.
Not `scipy.spatial.ConvexHull`: it rounds, and ties of exact fractions decide which head gets a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import torch

from headforcing.errors import OptionError, ProfileError
from headforcing.measure.classifiers import (
    Classification,
    Labels,
    candidates,
    frames_kept,
    short_names,
    table,
    tried,
    unrestricted,
)
from headforcing.measure.labels import measured_map
from headforcing.measure.profile import HeadProfile
from headforcing.measure.sizes import ModelSize
from headforcing.roles import HeadRole
from headforcing.roles.maps.origin import ModelFacts, Scalar
from headforcing.roles.maps.role_map import RoleMap

COLUMNS = ("output_regret.p95", "output_regret.mean", "ablation.increase")


@dataclass(frozen=True)
class Budget:
    """The result of a budget. Frames are stored frames, current chunk excluded, summed over all heads.

    Attributes:
        found: the labels, as from a classifier, without margins.
        frames: stored frames.
        left: unused frames of the budget.
        error: total error over all heads.
        errors: error of every head, `errors[layer][head]`.
        curve: the whole trade-off, from the cheapest roles on: stored frames and the smallest total error.
        profile: the profile with the errors.
    """

    found: Classification
    frames: int
    left: int
    error: float
    errors: tuple[tuple[float, ...], ...]
    curve: tuple[tuple[int, float], ...]
    profile: HeadProfile = field(repr=False, compare=False)

    @property
    def labels(self) -> Labels:
        """Name of the role of every head, `labels[layer][head]`."""
        return self.found.labels

    @property
    def roles(self) -> Mapping[str, HeadRole]:
        """Role of every label."""
        return self.found.roles

    def role_map(
        self, *, stability: Mapping[str, Scalar] | None = None, notes: Mapping[str, Scalar] | None = None
    ) -> RoleMap:
        """The roles as a map with its origin; the budget is stored in the notes.

        Args:
            stability: `StabilityReport.summary()`, of `lambda profile: fit_budget(profile, ...).found`.
            notes: anything else to store in the map.
        """
        spent = {"frames": self.frames, "frames_left": self.left, "error": self.error}
        return measured_map(self.found, self.profile, stability=stability, notes={**spent, **(notes or {})})


def fit_budget(
    profile: HeadProfile,
    *,
    frames: int | None = None,
    bytes: int | None = None,
    tokens_per_frame: int | None = None,
    itemsize: int = 2,
    held: bool = False,
    by: str = "output_regret.p95",
    groups: RoleMap | None = None,
) -> Budget:
    """A role for every head, chosen by measured error, within a budget over all heads.

    Steps are taken by the error they save per frame; of equal ones that of the lower head, counted layer by
    layer. A step that does not fit any more is skipped, so that smaller ones can use the rest of the budget;
    then the result is not a point of the curve, and another choice may be better. Candidates that store more
    than the window allows are never chosen.

    Bytes are those of keys and values of one stream of one video, current chunk included:
    `tokens_per_frame * head_dim * 2 * itemsize` per frame and head. The `ring` store takes 1.5 times as much,
    because it also stores rotated keys, and this is what `status()` counts: with `held=True` the budget is in
    bytes of the `ring` store.

    Args:
        profile: with `output_regret`, or made by `ablate_heads`. After an ablation a head may also store as
            much as the window allows, with an error of 0 by definition.
        frames: budget in stored frames, current chunk excluded, summed over all heads.
        bytes: budget in bytes instead.
        tokens_per_frame: patches of one frame; with `bytes` only.
        itemsize: bytes of one number, with `bytes`; default: that of bf16.
        held: whether `bytes` are those of the `ring` store.
        by: the error, one of `COLUMNS`; the mean over the noisy passes.
        groups: a map of the same shape; heads with the same label get the same role. Default: every head is
            chosen separately.

    Raises:
        OptionError: not exactly one budget is given, it is too small for the cheapest roles, `held` is used
            with candidates that attend to a part of their stored frames, or groups have another shape.
        ProfileError: the errors were not measured, or no candidate fits the window.
    """
    if (frames is None) == (bytes is None):
        raise OptionError("give a budget either in frames or in bytes")
    size: ModelSize | None = None
    settings: dict[str, Scalar] = {"by": by, "frames": frames}
    if bytes is not None:
        size = _size(profile.facts.model, tokens_per_frame, itemsize)
        settings = {"by": by, "bytes": bytes, "tokens_per_frame": tokens_per_frame, "itemsize": itemsize}
        settings["held"] = held
    elif tokens_per_frame is not None or held:
        raise OptionError("tokens_per_frame and held work with a budget in bytes only: leave them out")
    roles = _roles(profile, by)
    if held and (packed := [role for role in roles if _is_copied(role)]):
        raise OptionError(f"held does not count the copies of the ring store for {packed[0]}: leave it out")
    if groups is not None:
        settings["groups"] = groups.hash
    choices, members = _choices(profile, by, roles), _members(groups, profile)
    envelopes = [lower_envelope(together([choices[head] for head in heads])) for heads in members]
    budget = _frames(frames, bytes, size, held, sum(envelope[0].frames for envelope in envelopes))
    chosen = {
        head: c.role for heads, c in zip(members, buy(envelopes, budget), strict=True) for head in heads
    }
    bought = [{c.role: c for c in own}[chosen[head]] for head, own in enumerate(choices)]
    spent = sum(choice.frames for choice in bought)
    names = short_names(sorted(roles, key=lambda role: frames_kept(role, profile.facts.model.chunk)))
    found = Classification(
        "fit_budget",
        table([names[choice.role] for choice in bought], profile.shape[1]),
        torch.full(profile.shape, torch.nan, dtype=torch.float64),
        {name: role for role, name in names.items()},
        settings,
        (by.partition(".")[0],),
    )
    flat = tuple(float(choice.error) for choice in bought)
    errors = tuple(flat[first : first + profile.shape[1]] for first in range(0, len(flat), profile.shape[1]))
    total = float(sum(choice.error for choice in bought))
    return Budget(found, spent, budget - spent, total, errors, curve(envelopes), profile)


def _roles(profile: HeadProfile, by: str) -> list[HeadRole]:
    """The candidate roles that fit the window, in the order of their columns.

    Raises:
        OptionError: there is no such error, or a role has a compressed history.
        ProfileError: no role fits.
    """
    if by not in COLUMNS:
        raise OptionError(f"by is {by!r}: expected one of {', '.join(COLUMNS)}")
    model = profile.facts.model
    metric, room = by.partition(".")[0], model.window - model.chunk
    profile[by]  # raises with advice if it was not measured
    roles = [role for role in candidates(profile, metric) if frames_kept(role, model.chunk) <= room]
    if unfit := [role for role in roles if role.compressed() is not None]:
        raise OptionError(f"{unfit[0]} has a compressed history, which is not counted: leave it out")
    if metric == "ablation" and (rest := unrestricted(model)) not in roles:
        roles.append(rest)
    if not roles:
        raise ProfileError(f"no candidate of {metric} stores at most {room} frames: measure others")
    return roles


def _choices(profile: HeadProfile, by: str, roles: Sequence[HeadRole]) -> list[list[Choice]]:
    """The choices of every head, in the order of the roles; a role that was not measured has error 0."""
    known, columns = tried(profile, by)
    frames = [int(frames_kept(role, profile.facts.model.chunk)) for role in roles]
    places = [known.index(role) if role in known else None for role in roles]
    return [
        [
            Choice(kept, Fraction(0 if place is None else row[place]), role)
            for kept, place, role in zip(frames, places, roles, strict=True)
        ]
        for row in columns.tolist()
    ]


def _frames(frames: int | None, bytes: int | None, size: ModelSize | None, held: bool, least: int) -> int:
    """The budget in frames, current chunk excluded.

    Raises:
        OptionError: it is not a whole number, or less than `least`.
    """
    if size is None:
        budget, needed = _count(frames, "frames"), f"frames={least}"
    else:
        each = size.ring_head_bytes if held else size.head_bytes
        own = size.count * size.chunk
        budget = _count(bytes, "bytes") // each - own
        needed = f"bytes={(least + own) * each}"
    if budget < least:
        raise OptionError(
            f"the budget allows {budget} frames without the current chunks, but the cheapest roles store "
            f"{least} over all heads: give at least {needed}"
        )
    return budget


def _members(groups: RoleMap | None, profile: HeadProfile) -> list[list[int]]:
    """Heads of every group, counted layer by layer."""
    if groups is None:
        return [[head] for head in range(profile.shape[0] * profile.shape[1])]
    if groups.shape != profile.shape:
        raise OptionError(f"groups are for {groups.shape} layers and heads, the profile for {profile.shape}")
    members: dict[str, list[int]] = {}
    for head, label in enumerate(label for row in groups.labels for label in row):
        members.setdefault(label, []).append(head)
    return list(members.values())


def _count(value: object, what: str) -> int:
    if type(value) is not int or value < 0:
        raise OptionError(f"{what} is {value!r}: expected a whole number >= 0")
    return value


def _size(facts: ModelFacts, tokens_per_frame: int | None, itemsize: int) -> ModelSize:
    if tokens_per_frame is None:
        raise OptionError("a budget in bytes requires tokens_per_frame, the patches of one frame")
    return ModelSize(
        facts.layers, facts.heads, facts.head_dim, facts.window, facts.chunk, (1, tokens_per_frame), itemsize
    )


def _is_copied(role: HeadRole) -> bool:
    """Whether the `ring` store copies what the role attends to."""
    partly = role.clean_window is not None or type(role).visible is not HeadRole.visible
    return partly or "query" in role.depends_on


class Choice(NamedTuple):
    """One choice of a group of heads: total stored frames, total error, and the role."""

    frames: int
    error: Fraction
    role: HeadRole


class _Step(NamedTuple):
    """From one choice of a group to the next on its envelope."""

    group: int
    number: int
    frames: int
    saved: Fraction


def lower_envelope(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex envelope from the fewest frames to the smallest error, with points on its edges.

    Of choices with equal frames the best counts; of equally good ones the first.
    """
    best: dict[int, Choice] = {}
    for choice in choices:
        if choice.frames not in best or choice.error < best[choice.frames].error:
            best[choice.frames] = choice
    envelope: list[Choice] = []
    for choice in sorted(best.values(), key=itemgetter(0)):
        if envelope and choice.error >= envelope[-1].error:
            continue
        while len(envelope) > 1 and _slope(envelope[-2], envelope[-1]) < _slope(envelope[-1], choice):
            envelope.pop()
        envelope.append(choice)
    return envelope


def _slope(a: Choice, b: Choice) -> Fraction:
    """Error saved per frame."""
    return (a.error - b.error) / (b.frames - a.frames)


def _steps(envelopes: Sequence[Sequence[Choice]]) -> list[_Step]:
    """All steps of all groups, the most error saved per frame first."""
    steps = [
        _Step(group, number, b.frames - a.frames, a.error - b.error)
        for group, envelope in enumerate(envelopes)
        for number, (a, b) in enumerate(pairwise(envelope))
    ]
    return sorted(steps, key=lambda step: (-step.saved / step.frames, step.group, step.number))


def buy(envelopes: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """The choice of every group within the budget."""
    chosen, spent = [0] * len(envelopes), sum(envelope[0].frames for envelope in envelopes)
    for step in _steps(envelopes):
        if chosen[step.group] == step.number and spent + step.frames <= budget:
            chosen[step.group] += 1
            spent += step.frames
    return [envelope[number] for envelope, number in zip(envelopes, chosen, strict=True)]


def curve(envelopes: Sequence[Sequence[Choice]]) -> tuple[tuple[int, float], ...]:
    """Frames and total error after every step."""
    frames, error = (
        sum(envelope[0].frames for envelope in envelopes),
        sum((envelope[0].error for envelope in envelopes), Fraction()),
    )
    points = [(frames, float(error))]
    for step in _steps(envelopes):
        frames, error = frames + step.frames, error - step.saved
        points.append((frames, float(error)))
    return tuple(points)


def together(members: Sequence[Sequence[Choice]]) -> list[Choice]:
    """The choices of heads that get the same role: frames and errors added up, role by role."""
    return [
        Choice(sum(c.frames for c in same), sum((c.error for c in same), Fraction()), same[0].role)
        for same in zip(*members, strict=True)
    ]
