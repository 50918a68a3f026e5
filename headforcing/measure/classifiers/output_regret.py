"""Ours: every head gets the cheapest role that hardly changes its output.

The metric restricts each head to what each candidate role would store and measures how much its output
changes. No number here is from a paper: the allowed error, the 95th percentile over queries, and the mean
over passes are our choices.
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
)
from headforcing.measure.profile import HeadProfile

COLUMNS = ("p95", "mean")


def classify(profile: HeadProfile, *, error: float = 0.1, by: str = "p95") -> Classification:
    """Labels by role, such as `local3` or `memory3+12+3`, from `output_regret`, over the noisy passes.

    Candidates are tried from the fewest frames to the most; of equal ones the first in the profile's list. If
    no candidate is good enough, the head gets the one with the smallest error.

    Args:
        profile: with the metric `output_regret`.
        error: largest relative change of the output that is allowed.
        by: which column of the metric, `p95` or `mean`.

    Raises:
        OptionError: the error is negative or not finite, or there is no such column.
        ProfileError: the errors were not measured, or the profile does not name its candidates.
    """
    if by not in COLUMNS:
        raise OptionError(f"by is {by!r}: expected one of {', '.join(COLUMNS)}")
    if not 0 <= error < math.inf:
        raise OptionError(f"error is {error!r}: expected a relative change >= 0")
    roles, errors = tried(profile, f"output_regret.{by}")
    chosen, distance = cheapest(errors, roles, profile.facts.model.chunk, error)
    names = short_names(sorted(roles, key=lambda role: frames_kept(role, profile.facts.model.chunk)))
    return Classification(
        "output_regret",
        table([names[role] for role in chosen], profile.shape[1]),
        as_margin(distance, errors).view(profile.shape),
        {name: role for role, name in names.items()},
        {"error": float(error), "by": by},
        ("output_regret",),
    )
