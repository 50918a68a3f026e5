"""Attention by the age of frames, role by role."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headforcing.errors import ProfileError
from headforcing.measure.plots import style
from headforcing.measure.profile import HeadProfile

WIDE = 30.0
"""The axis is logarithmic if the largest and the smallest median differ by more than this factor."""


def mass_by_age(profile: HeadProfile, roles: style.Roles, ax: Any = None) -> Any:
    """Share of the attention by age of the frame: one line per role, with the current chunk and frame 0.

    A head counts with its mean over the noisy passes. The line is the median over the heads of a role,
    the band their quartiles. Frame 0 has its own marker and is left out of the line; the marker of
    the current chunk is the sum over its frames.

    Args:
        profile: with the metric `attention_mass`.
        roles: a name for every head.
        ax: axes to draw on; default: those of a new figure.

    Raises:
        ProfileError: the metric was not measured, has only NaN, or the labels do not fit.
    """
    labels = np.array(style.fitting(profile, roles), dtype=object)
    profile = profile.noisy
    ages = _without_first(profile)  # [layers, heads, A], up to the oldest age measured
    own, first = (profile.mean(f"attention_mass.{name}").numpy() for name in ("own", "first"))
    if not np.isfinite(ages).any() and not np.isfinite(own).any():
        raise ProfileError("attention_mass has only NaN: measure passes with a history")
    names, last = style.ordered(labels.flat), ages.shape[-1]
    ax = style.axes_or_new(ax, 4.8, 3.0 + 0.18 * (len(names) // 5))
    lows, handles = [], []
    for number, (name, colour) in enumerate(style.role_colours(names).items()):
        mine = labels == name
        low, middle, high = _quartiles(ages[mine])
        look = style.DASHES[style.nth(name) % len(style.DASHES)]
        ax.plot(range(1, last + 1), middle, color=colour, lw=1.6, ls=look, label=name)
        ax.fill_between(range(1, last + 1), low, high, color=colour, alpha=0.2, lw=0)
        shift = 1.3 * ((number + 0.5) / len(names) - 0.5)
        marker = style.MARKERS[style.nth(name) % len(style.MARKERS)]
        handles += ax.plot([], [], color=colour, lw=1.6, ls=look, marker=marker, ms=4.5)
        handles[-1].set_label(f"{name} ({mine.sum()})")
        for place, values in ((-1.0, own[mine]), (last + 2.0, first[mine])):
            _whisker(ax, place + shift, values, colour, marker)
        lows += [middle, *(_quartiles(values[:, None])[1] for values in (own[mine], first[mine]))]
    _scale(ax, np.concatenate(lows))
    _ages_axis(ax, last)
    style.legend_above(ax, handles)
    return ax


def _without_first(profile: HeadProfile) -> NDArray[np.float64]:
    """Mean mass by age over the passes, `[layers, heads, A]`, without frame 0 and ages never measured."""
    ages = profile["attention_mass.by_age"]
    if ages.ndim != 4:
        raise ProfileError(f"attention_mass.by_age has {ages.ndim} axes: expected [S, layers, heads, ages]")
    age = torch.arange(1, ages.shape[-1] + 1)
    is_first = profile.start[:, None] == age  # frame 0 is as old as the chunk's start is late
    mean = ages.masked_fill(is_first[:, None, None, :], torch.nan).nanmean(0)
    seen = mean.isfinite().any(0).any(0).nonzero()
    return mean[..., : int(seen.max()) + 1 if len(seen) else 1].numpy()


def _quartiles(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Quartiles over the heads, `[heads, A]` -> three of `[A]`; NaN if no head has a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN stays NaN
        return tuple(np.nanquantile(values, (0.25, 0.5, 0.75), axis=0))


def _whisker(ax: Any, place: float, values: NDArray[np.float64], colour: str, marker: str) -> None:
    """Median and quartiles of one number over the heads."""
    low, middle, high = (float(part[0]) for part in _quartiles(values[:, None]))
    if np.isfinite(middle):
        spread = [[middle - low], [high - middle]]
        ax.errorbar([place], [middle], yerr=spread, fmt=marker, color=colour, ms=4.5, lw=1, capsize=0)


def _scale(ax: Any, medians: NDArray[np.float64]) -> None:
    """Logarithmic if the medians span decades, otherwise linear from 0."""
    seen = medians[np.isfinite(medians) & (medians > 0)]
    if len(seen) and seen.max() / seen.min() > WIDE:
        ax.set_yscale("log")
        ax.set_ylim(seen.min() / 2.5, 1.15)
        ax.yaxis.set_major_formatter(_plain)
    else:
        ax.set_ylim(0, min(1.05, 1.15 * (seen.max() if len(seen) else 1)))


def _plain(value: float, _: int) -> str:
    """A tick label: `0.001` and larger as plain numbers, smaller ones as powers of ten."""
    return f"{value:g}" if value >= 1e-4 else f"{value:.0e}"


def _ages_axis(ax: Any, last: int) -> None:
    """Current chunk, ages and frame 0 along x, with gaps between them."""
    step = style.ticks(last + 1)[1] if last else 1
    ages = [1, *(age for age in range(step, last + 1, step) if age > 1)]
    ax.set_xticks([-1, *ages, last + 2], ["current\nchunk\n(sum)", *map(str, ages), "frame\n0"])
    ax.set_xlim(-2, last + 3)
    for edge in (0, last + 1):
        ax.axvline(edge, color=style.RULE, lw=0.8, zorder=0)
    ax.set_xlabel("age of the frame (frames before the chunk)")
    ax.set_ylabel("share of attention")
    style.dress(ax, grid="y")
    ax.tick_params(axis="y", which="minor", length=0)
