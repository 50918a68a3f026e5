"""Ours: every head gets the cheapest role that hardly increases the error of the whole model.

Uses the result of `ablate_heads`, which restricts one head at a time to each candidate role. If no candidate
is good enough, the head becomes a memory head with as many frames as the window allows. The allowed error is
our choice. Because one head is restricted at a time, effects of several heads together are not measured.
"""

from __future__ import annotations

import math

from headforcing.errors import OptionError
from headforcing.measure.classifiers import (
    Classification,
    as_margin,
    cheapest,
    frames_kept,
    short_names,
    table,
    tried,
    unrestricted,
)
from headforcing.measure.profile import HeadProfile


def classify(profile: HeadProfile, *, error: float = 0.05) -> Classification:
    """Labels by role, such as `local3` or `memory3+12+3`, from `ablation.increase`.

    Args:
        profile: made by `ablate_heads`.
        error: largest relative increase of the model's error that is allowed.

    Raises:
        OptionError: the error is negative or not finite.
        ProfileError: there is no ablation in the profile.
    """
    if not 0 <= error < math.inf:
        raise OptionError(f"error is {error!r}: expected a relative increase >= 0")
    roles, increase = tried(profile, "ablation.increase")
    model = profile.facts.model
    rest = unrestricted(model)
    chosen, distance = cheapest(increase, roles, model.chunk, error)
    none = (increase > error).all(1)
    names = short_names([*sorted(roles, key=lambda role: frames_kept(role, model.chunk)), rest])
    labels = [names[rest if lost else role] for role, lost in zip(chosen, none.tolist(), strict=True)]
    margin = distance.where(~none, increase.amin(1) - error)
    return Classification(
        "ablation",
        table(labels, profile.shape[1]),
        as_margin(margin, increase).view(profile.shape),
        {name: role for role, name in names.items()},
        {"error": float(error)},
        ("ablation",),
    )
