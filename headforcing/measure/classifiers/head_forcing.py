"""Head Forcing (arXiv:2605.14487): local, anchor and memory heads by their attention mass.

Documented: the three roles, and that heads differ by their attention on the first frame, on the current chunk
and in between. Third party: the shares, 25 % anchors and then 20 % of the rest local. Inferred: that heads
are ranked over all layers together, and that the first frame is one latent frame. Our choice: the rule
`absolute`, in case the paper's thresholds are masses and not shares, and ties to the lower index.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headforcing.errors import OptionError
from headforcing.measure.classifiers import Classification, as_margin, measured, share, table
from headforcing.measure.profile import HeadProfile
from headforcing.roles import Anchor, Local, Memory

NAMES = ("anchor", "local", "memory")
RULES = ("quantile", "absolute")


def classify(
    profile: HeadProfile, *, anchor: float = 0.25, local: float = 0.20, rule: str = "quantile"
) -> Classification:
    """Labels `anchor`, `local` or `memory` from `attention_mass`, over the noisy passes.

    Args:
        profile: with the metric `attention_mass`.
        anchor: share of all heads, rounded up, that are anchors, by mass on the first frame; for `absolute`
            the smallest mass of an anchor.
        local: share of the rest, rounded up, that are local, by mass on the current chunk; for `absolute` the
            smallest mass of a local head.
        rule: `quantile` ranks heads, `absolute` compares masses.

    Raises:
        OptionError: a share is outside [0, 1], or there is no such rule.
        ProfileError: the masses were not measured.
    """
    if rule not in RULES:
        raise OptionError(f"rule is {rule!r}: expected one of {', '.join(RULES)}")
    shares = {"anchor": share("anchor", anchor), "local": share("local", local)}
    noisy = profile.noisy
    first = measured(noisy, "attention_mass.first").flatten()
    own = measured(noisy, "attention_mass.own").flatten()
    everything = torch.ones_like(first, dtype=torch.bool)
    choose = _ranked if rule == "quantile" else _above
    anchors, to_anchor = choose(first, everything, anchor)
    locals_, to_local = choose(own, ~anchors, local)
    code = torch.where(anchors, 0, torch.where(locals_, 1, 2)).tolist()
    margin = as_margin(to_anchor, first)
    margin = torch.where(anchors, margin, torch.minimum(margin, as_margin(to_local, own)))
    return Classification(
        "head_forcing",
        table([NAMES[number] for number in code], profile.shape[1]),
        margin.view(profile.shape),
        {"anchor": Anchor(), "local": Local(), "memory": Memory()},
        {**shares, "rule": rule},
        ("attention_mass",),
    )


def _ranked(score: Tensor, among: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """The top `part` of the heads `among`, rounded up, and the distance of every head from the cut."""
    rows = among.nonzero()[:, 0]
    order = rows[score[rows].argsort(descending=True, stable=True)]
    count = math.ceil(part * len(rows) - 1e-9)  # 0.07 * 100 is a little more than 7
    top = torch.zeros_like(among)
    top[order[:count]] = True
    if count in (0, len(rows)):
        return top, torch.full_like(score, torch.inf)  # no score changes the result
    enter, leave = score[order[count - 1]], score[order[count]]
    return top, torch.where(top, score - leave, enter - score)


def _above(score: Tensor, among: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """The heads `among` with a score of at least `least`, and the distance of every head from it."""
    return among & (score >= least), (score - least).abs()
