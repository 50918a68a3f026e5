"""Classifiers: from a saved profile to a role for every head, without the model.

One file each, with one function `classify(profile, **thresholds) -> Classification`, found by listing the
folder. The order of heads matters only between heads with equal scores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from headforcing.errors import OptionError, ProfileError, RoleMapError, named_module
from headforcing.measure.profile import HeadProfile
from headforcing.roles import HeadRole, Memory
from headforcing.roles.episodic import MaxMin
from headforcing.roles.maps.file import decode_role
from headforcing.roles.maps.origin import ModelFacts, Scalar

Labels = tuple[tuple[str, ...], ...]
"""Names `labels[layer][head]`, for `RoleMap.from_labels`."""


@dataclass(frozen=True)
class Classification:
    """The result of a classifier.

    Attributes:
        method: name of the classifier.
        labels: name of the role of every head, `labels[layer][head]`.
        margin: `[layers, heads]` float64 in [0, 1]: distance of the score of a head from the nearest value
            at which its label would change, as a share of the range of that score over all heads; 0 is on
            the boundary, 1 is a range away or more, NaN if there is no margin.
        roles: role of every label.
        settings: the thresholds.
        metrics: metrics that were used.
    """

    method: str
    labels: Labels
    margin: Tensor = field(compare=False)
    roles: Mapping[str, HeadRole]
    settings: Mapping[str, Scalar]
    metrics: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Heads per label, for every label of the method."""
        flat = [label for row in self.labels for label in row]
        return {name: flat.count(name) for name in self.roles}


Classify = Callable[..., Classification]


def find_classifier(name: str) -> Classify:
    """The `classify` of the module `headforcing.measure.classifiers.<name>`.

    Raises:
        OptionError: there is no such module; the message lists the folder.
    """
    return cast(Classify, named_module(__name__, name).classify)


def table(flat: list[str], heads: int) -> Labels:
    """A flat list of labels as `labels[layer][head]`."""
    return tuple(tuple(flat[first : first + heads]) for first in range(0, len(flat), heads))


_TO_HAVE = {
    "attention_mass": "profile chunks whose history contains the first frame",
    "mass_ratio": "profile chunks with frames between the sink and the recent ones",
}
"""How to get a value of a metric that is not always defined."""


def measured(profile: HeadProfile, name: str) -> Tensor:
    """Mean of a column over its passes, `[layers, heads, ...]` float64, defined for every head.

    Raises:
        ProfileError: there is no such column, or a head without a value.
    """
    mean = profile.mean(name)
    missing = (~mean.isfinite()).nonzero()
    if len(missing):
        layer, head = missing[0, :2].tolist()
        raise ProfileError(
            f"{name} was never measured for layer {layer}, head {head} ({len(missing)} values are missing): "
            f"{_TO_HAVE.get(name.partition('.')[0], 'measure it again, for every head')}"
        )
    return mean


def share(name: str, value: float) -> float:
    """Checks a threshold that is a share.

    Raises:
        OptionError: it is outside [0, 1].
    """
    if not 0 <= value <= 1:
        raise OptionError(f"{name} is {value!r}: expected a share in [0, 1]")
    return float(value)


def as_margin(distance: Tensor, score: Tensor) -> Tensor:
    """Distances to a boundary as shares of the range of a score, at most 1.

    If all heads have the same score, a head off the boundary has a margin of 1.
    """
    score = score[score.isfinite()]
    span = float(score.max() - score.min()) if len(score) else 0.0
    if span == 0:
        return (distance > 0).double()
    return (distance / span).clamp(max=1.0)


def short_names(roles: Iterable[HeadRole]) -> dict[HeadRole, str]:
    """A short, unique name per role: its kind and frames, oldest first, such as `memory3+12+3`.

    A 0 that is the default is left out. Positions, update rules and other values that differ from their
    default follow the numbers; equal names are numbered.
    """
    names: dict[HeadRole, str] = {}
    for role in roles:
        if role in names:
            continue
        name, alike = _short_name(role), list(names.values())
        number = 2
        unique = name
        while unique in alike:
            unique, number = f"{name}#{number}", number + 1
        names[role] = unique
    return names


_TIMES = ("sink", "episodic", "recent", "window")


def _short_name(role: HeadRole) -> str:
    fields = {f.name: f for f in dataclasses.fields(role)}
    order = [name for name in _TIMES if name in fields]
    numbers = [
        "?" if getattr(role, name) is None else str(getattr(role, name))
        for name in order
        if getattr(role, name) != 0 or fields[name].default != 0
    ]
    extras = []
    for name, entry in fields.items():
        value = getattr(role, name)
        if name in order or value in (entry.default, MaxMin()):
            continue
        plain = isinstance(value, str | int | float)
        extras.append(f"@{value if plain else type(value).__name__.lower()}")
    return type(role).__name__.lower() + "+".join(numbers) + "".join(extras)


def candidates(profile: HeadProfile, metric: str) -> list[HeadRole]:
    """The candidate roles of a metric, in the order of its columns.

    Raises:
        ProfileError: the profile does not name them.
    """
    written = profile.facts.metrics.get(metric, {}).get("roles")
    if not isinstance(written, Sequence) or isinstance(written, str) or not written:
        raise ProfileError(
            f"the profile does not name the roles of {metric}: profile again with metrics=[..., {metric!r}]"
        )
    try:
        roles = [decode_role(dict(role), f"{metric}/roles/{i}") for i, role in enumerate(written)]
    except (RoleMapError, TypeError, ValueError) as error:
        raise ProfileError(f"the profile's candidate roles are malformed: {error}") from error
    if len(set(roles)) < len(roles):
        raise ProfileError(f"{metric} tried a role twice: {', '.join(map(str, roles))}")
    return roles


def tried(profile: HeadProfile, column: str) -> tuple[list[HeadRole], Tensor]:
    """The candidate roles of a metric, and their mean errors over the noisy passes, `[all heads, R]`.

    Raises:
        ProfileError: they were not measured, or the numbers of errors and roles differ.
    """
    roles = candidates(profile, column.partition(".")[0])
    errors = measured(profile.noisy, column).flatten(0, 1)
    if errors.shape[1:] != (len(roles),):
        raise ProfileError(
            f"{column} has {list(errors.shape[1:])} columns, but the profile names {len(roles)} roles: "
            "measure again"
        )
    return roles, errors


def cheapest(
    errors: Tensor, roles: Sequence[HeadRole], chunk: int, error: float
) -> tuple[list[HeadRole], Tensor]:
    """The role with the fewest frames whose error is allowed, or the one with the smallest error.

    Args:
        errors: `[all heads, R]`.
        roles: `R` candidates; of equally cheap ones the first is preferred.
        chunk: frames of a chunk.
        error: the allowed error.

    Returns:
        A role per head, and the distance of its errors from values that would change the role, `[heads]`.
    """
    order = sorted(range(len(roles)), key=lambda r: frames_kept(roles[r], chunk))
    errors, ordered = errors[:, order], [roles[r] for r in order]
    fits = errors <= error
    none = ~fits.any(1)
    chosen = torch.where(none, _first(errors == errors.amin(1, keepdim=True)), _first(fits))
    return [ordered[r] for r in chosen.tolist()], _distance(errors, chosen, none, error)


def frames_kept(role: HeadRole, chunk: int) -> float:
    """Stored frames, current chunk excluded; infinite if unbounded."""
    kept = role.capacity(chunk)
    return math.inf if kept is None else float(kept)


def unrestricted(model: ModelFacts) -> HeadRole:
    """The largest role the window allows, for heads for which no candidate of an ablation is good enough."""
    sink = min(model.chunk, model.window - model.chunk)
    recent = min(sink, model.window - model.chunk - sink)
    return Memory(sink, recent=recent).fit(model.window, model.chunk)


def _first(mask: Tensor) -> Tensor:
    """Index of the first true column, `[n, R] -> [n]`."""
    column = torch.arange(mask.shape[1])
    return torch.where(mask, column, mask.shape[1]).amin(1)


def _distance(errors: Tensor, chosen: Tensor, none: Tensor, error: float) -> Tensor:
    """Distance of each head's errors from values at which another role would be chosen, `[n]`.

    If a role was allowed: until its error exceeds `error`, or the error of a cheaper role falls to `error`.
    Otherwise: until some error falls to `error`, or another role has the smallest error.
    """
    column = torch.arange(errors.shape[1])
    own = errors.gather(1, chosen[:, None])[:, 0]
    cheaper = torch.where(column < chosen[:, None], errors - error, torch.inf).amin(1)
    others = torch.where(column != chosen[:, None], errors - own[:, None], torch.inf).amin(1)
    return torch.where(none, torch.minimum(own - error, others), torch.minimum(error - own, cheaper))
