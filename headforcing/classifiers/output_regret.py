"""Ours: every head gets the cheapest memory that hardly changes what it puts out.

The metric shows each head what each candidate role would keep and measures how much its output changes.
No number here is from a paper: the error that is allowed, the 95th percentile over queries, and the mean
over passes are our choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headforcing.classifiers import Classification, as_margin, measured, short_names, table
from headforcing.errors import OptionError, ProfileError, RoleMapError
from headforcing.profile import HeadProfile
from headforcing.role_json import decode_role
from headforcing.roles import HeadRole

COLUMNS = ("p95", "mean")


def classify(profile: HeadProfile, *, error: float = 0.1, by: str = "p95") -> Classification:
    """Labels by role, such as `local3` or `memory3+12+3`, from `output_regret`, over the noisy passes.

    Candidates are tried from the fewest frames to the most; of equal ones the first in the profile's
    list. A head that no candidate satisfies gets the one with the smallest error.

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
    roles = _candidates(profile)
    errors = measured(profile.noisy, f"output_regret.{by}").flatten(0, 1)  # [heads in all, R]
    if errors.shape[1:] != (len(roles),):
        raise ProfileError(
            f"output_regret.{by} has {list(errors.shape[1:])} columns, the profile names "
            f"{len(roles)} roles: they must be as many; profile again"
        )
    chunk = profile.facts.model.chunk
    order = sorted(range(len(roles)), key=lambda r: _cost(roles[r], chunk))
    errors, roles = errors[:, order], [roles[r] for r in order]
    fits = errors <= error
    none = ~fits.any(1)
    chosen = torch.where(none, _first(errors == errors.amin(1, keepdim=True)), _first(fits))
    names = short_names(roles)
    return Classification(
        "output_regret",
        table([names[roles[r]] for r in chosen.tolist()], profile.shape[1]),
        as_margin(_distance(errors, chosen, none, error), errors).view(profile.shape),
        {name: role for role, name in names.items()},
        {"error": float(error), "by": by},
        ("output_regret",),
    )


def _candidates(profile: HeadProfile) -> list[HeadRole]:
    """The roles that the metric tried, in the order of its columns."""
    written = profile.facts.metrics.get("output_regret", {}).get("roles")
    if not isinstance(written, Sequence) or isinstance(written, str) or not written:
        raise ProfileError(
            "the profile does not name the roles of output_regret: profile again with "
            "metrics=[..., 'output_regret']"
        )
    try:
        roles = [decode_role(dict(role), f"output_regret/roles/{i}") for i, role in enumerate(written)]
    except (RoleMapError, TypeError, ValueError) as error:
        raise ProfileError(f"the profile's candidate roles are malformed: {error}") from error
    if len(set(roles)) < len(roles):
        raise ProfileError(f"output_regret tried a role twice: {', '.join(map(str, roles))}")
    return roles


def _cost(role: HeadRole, chunk: int) -> float:
    """Frames kept beside a chunk; infinite without bound."""
    kept = role.capacity(chunk)
    return math.inf if kept is None else float(kept)


def _first(mask: Tensor) -> Tensor:
    """Index of the first true column, `[n, R] -> [n]`."""
    column = torch.arange(mask.shape[1])
    return torch.where(mask, column, mask.shape[1]).amin(1)


def _distance(errors: Tensor, chosen: Tensor, none: Tensor, error: float) -> Tensor:
    """How far some error of each head is from where another role would be chosen, `[n]`.

    A head that is satisfied: until its role's error exceeds `error`, or a cheaper one's comes down to it.
    Another: until some role's error comes down to `error`, or another role's is the smallest.
    """
    column = torch.arange(errors.shape[1])
    own = errors.gather(1, chosen[:, None])[:, 0]
    cheaper = torch.where(column < chosen[:, None], errors - error, torch.inf).amin(1)
    others = torch.where(column != chosen[:, None], errors - own[:, None], torch.inf).amin(1)
    return torch.where(none, torch.minimum(own - error, others), torch.minimum(error - own, cheaper))
