"""Dummy Forcing (arXiv:2601.20499): sink, neighbour and dummy heads by their attention mass.

What is known of its rule (its code, through our notes): take the softmax mass of a head on the first frame,
and on the frames between it and the current chunk, each as a share of the mass of all heads there. The larger
of the two shares is the stake of the head. The half of all heads with the smallest stakes are dummies; of the
rest, those whose first-frame share is at least the other one are sinks, the others neighbours. This
assignment keeps the largest total, if a sink keeps its first share, a neighbour its other share and
a dummy neither.

Our choices: shares by the sum over heads; means over all noisy passes of a profile (the project measures in
every video, in the clean pass of an early chunk); ties go to the lower index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headforcing.errors import OptionError
from headforcing.measure.classifiers import Classification, as_margin, measured, table
from headforcing.measure.profile import HeadProfile
from headforcing.roles.maps.presets import PRESETS

NAMES = ("sink", "neighbour", "dummy")


def classify(profile: HeadProfile, *, num_dummy: int | None = None) -> Classification:
    """Labels `sink`, `neighbour` or `dummy` from `attention_mass`, over the noisy passes.

    Args:
        profile: with the metric `attention_mass`.
        num_dummy: number of dummies; `None`: half of all heads, rounded down.

    Raises:
        OptionError: there are fewer heads.
        ProfileError: the masses were not measured.
    """
    noisy = profile.noisy
    first = _shares(measured(noisy, "attention_mass.first").flatten())
    middle = _shares(measured(noisy, "attention_mass.middle").flatten())
    count = _count(num_dummy, len(first))
    stake = torch.maximum(first, middle)
    dummy = torch.zeros_like(stake, dtype=torch.bool)
    order = stake.argsort(stable=True)
    dummy[order[:count]] = True
    code = torch.where(dummy, 2, torch.where(first >= middle, 0, 1)).tolist()
    lead = first - middle
    margin = as_margin(_to_cut(stake, order, dummy), stake)
    margin = torch.where(dummy, margin, torch.minimum(margin, as_margin(lead.abs(), lead)))
    model = profile.facts.model
    return Classification(
        "dummy_forcing",
        table([NAMES[number] for number in code], profile.shape[1]),
        margin.view(profile.shape),
        PRESETS["dummy_forcing"].roles(model.window, model.chunk),
        {"num_dummy": count},
        ("attention_mass",),
    )


def _count(num_dummy: int | None, heads: int) -> int:
    count = heads // 2 if num_dummy is None else num_dummy
    if type(count) is not int or not 0 <= count <= heads:
        raise OptionError(f"num_dummy is {num_dummy!r}: expected a number of heads, at most all {heads}")
    return count


def _shares(mass: Tensor) -> Tensor:
    """Masses as shares of their sum; zeros if the sum is zero."""
    total = mass.sum()
    return mass / total if total > 0 else torch.zeros_like(mass)


def _to_cut(stake: Tensor, order: Tensor, dummy: Tensor) -> Tensor:
    """Distance of every head's stake from the value at which it would become, or stop being, a dummy."""
    count = int(dummy.sum())
    if count in (0, len(order)):
        return torch.full_like(stake, torch.inf)  # no stake changes who is a dummy
    leave, enter = stake[order[count]], stake[order[count - 1]]
    return torch.where(dummy, leave - stake, stake - enter)
