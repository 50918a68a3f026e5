"""Rows of `attention.py` for the presets: one layer with as many heads of every role as its source has.

Heads per label are the published shares, rounded so that they fill the layer. Where a share is not known, the
labels that are left over share what is left over evenly. `full` has no row: it grows, and never settles.
"""

from __future__ import annotations

import math
import random

from headforcing.measure.memory import steady
from headforcing.roles import HeadRole
from headforcing.roles.maps.presets import PRESETS, Preset


def preset_rows(heads: int, window: int, chunk: int, contiguous: bool) -> dict[str, list[HeadRole]]:
    """A role for every head of a layer, by a name that says how many of each there are."""
    rows: dict[str, list[HeadRole]] = {}
    for preset in PRESETS.values():
        roles = {label: role.fit(window, chunk) for label, role in preset.roles(window, chunk).items()}
        if any(role.capacity(chunk) is None for role in roles.values()):
            continue
        counts = heads_per_label(preset, heads, window, chunk)
        row = [roles[label] for label, count in counts.items() for _ in range(count)]
        if not contiguous:  # roles of a trained model are scattered over the heads
            random.Random(0).shuffle(row)  # noqa: S311 - a fixed order, no secret
        told = ", ".join(f"{label} {count}" for label, count in counts.items())
        rows[preset.name if len(counts) == 1 else f"{preset.name}: {told}"] = row
    return rows


def heads_per_label(preset: Preset, heads: int, window: int, chunk: int) -> dict[str, int]:
    """Published shares of a number of heads, largest remainders first."""
    labels = tuple(preset.roles(window, chunk))
    if len(labels) == 1:
        return {labels[0]: heads}
    of = sum(preset.published.values())
    if open_labels := [label for label in labels if label not in preset.published]:
        of = 360  # the heads of Wan2.1 1.3B, which the numbers are for
        rest = (of - sum(preset.published.values())) / len(open_labels)
        shares = {label: preset.published.get(label, rest) for label in labels}
    else:
        shares = {label: preset.published[label] for label in labels}
    exact = {label: heads * share / of for label, share in shares.items()}
    counts = {label: math.floor(count) for label, count in exact.items()}
    left = sorted(labels, key=lambda label: counts[label] - exact[label])
    for label in left[: heads - sum(counts.values())]:
        counts[label] += 1
    return counts


def cycle_of(roles: list[HeadRole], window: int, chunk: int) -> int:
    """Chunks after which what the roles see repeats."""
    found = [steady(role.fit(window, chunk), window, chunk) for role in dict.fromkeys(roles)]
    return math.lcm(*(1 if one is None else one.cycle for one in found)) if found else 1
