"""Shares of attention per head in a triangle, and roles per layer (arXiv:2605.14487, Fig. 3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headforcing.errors import ProfileError
from headforcing.measure.plots import style
from headforcing.measure.profile import HeadProfile

PARTS = ("own", "first", "middle")
TITLES = ("current chunk", "first frame", "frames between")
CORNERS = np.array([(0.0, 0.0), (1.0, 0.0), (0.5, 3**0.5 / 2)])
GRID = (0.2, 0.4, 0.6, 0.8)


def mass_scatter(profile: HeadProfile, roles: style.Roles, ax: Any = None) -> Any:
    """One dot per head: its shares on the current chunk, the first frame and the frames between.

    The dot is the mean over the noisy passes in which all three are known; the picture says how many heads
    have no such pass.

    Args:
        profile: with the metric `attention_mass`.
        roles: a name for every head.
        ax: axes to draw on; default: those of a new figure.

    Raises:
        ProfileError: the metric was not measured, its shares do not add up to one, or the labels do not
            fit.
    """
    labels = np.array(style.fitting(profile, roles), dtype=object)
    shares = _shares(profile.noisy)
    known = np.isfinite(shares).all(-1)
    names = style.ordered(labels.flat)
    inside = ax is None and len(names) <= 4  # a new figure has space next to the tip
    ax = style.axes_or_new(ax, 3.7, 3.15 + (0 if inside else 0.07 * len(names)))
    _triangle(ax)
    handles = []
    for name, colour in style.role_colours(names).items():
        mine = labels == name
        dots = shares[mine & known] @ CORNERS
        look = {"marker": style.MARKERS[style.nth(name) % len(style.MARKERS)], "color": colour}
        drawn = ax.scatter(*dots.T, s=17, edgecolor="white", lw=0.4, alpha=0.9, zorder=3, **look)
        drawn.set_label(f"{name} ({mine.sum()})")
        handles.append(drawn)
    if inside:
        place = {"loc": "upper left", "bbox_to_anchor": (-0.16, 1.04), "handletextpad": 0.1}
        ax.legend(handles=handles, frameon=False, fontsize=style.TICK, **place)
    else:
        style.legend_above(ax, handles, 1.02)
    if not known.all():
        note = f"{(~known).sum()} of {known.size} heads\nnot measured"
        ax.text(1.08, 1, note, transform=ax.transAxes, ha="right", va="top", fontsize=7, color=style.FAINT)
    return ax


def _shares(profile: HeadProfile) -> NDArray[np.float64]:
    """Mean shares of every head, `[layers, heads, 3]` in the order of `PARTS`."""
    parts = torch.stack([profile[f"attention_mass.{name}"] for name in PARTS], -1)
    if parts.ndim != 4:
        raise ProfileError(f"attention_mass is {list(parts.shape[:-1])}: expected [S, layers, heads]")
    parts = parts.masked_fill(parts.isnan().any(-1, keepdim=True), torch.nan)
    total = parts.sum(-1)
    total = total[~total.isnan()]
    if len(total) and float((total - 1).abs().max()) > 1e-3:
        worst = float(total[(total - 1).abs().argmax()])
        raise ProfileError(f"own, first and middle add up to {worst:.4f}: expected shares that add up to 1")
    return parts.nanmean(0).numpy()


def _triangle(ax: Any) -> None:
    """The triangle: three edges, each with the scale and name of one share."""
    from matplotlib.patches import Polygon

    ax.add_patch(Polygon(CORNERS, closed=True, fc="none", ec=style.FAINT, lw=0.8, zorder=2))
    for part, title in enumerate(TITLES):
        # The share of `part` is read on the edge where it grows from `low` to its own corner.
        here, low, other = CORNERS[part], CORNERS[part - 1], CORNERS[part - 2]
        outward = (here + low) / 2 - CORNERS.mean(0)
        outward /= np.hypot(*outward)
        for share in GRID:
            start = share * here + (1 - share) * low
            end = share * here + (1 - share) * other
            ax.plot(*np.array([start, end]).T, color=style.RULE, lw=0.6, zorder=1)
            away = 11 * (start - end) / np.hypot(*(start - end))
            _text_near(ax, start, away, f"{share:.0%}", fontsize=7, color=style.FAINT)
        along = here - low
        turn = (np.degrees(np.arctan2(along[1], along[0])) + 90) % 180 - 90
        text = f"{title} \N{RIGHTWARDS ARROW}" if along[0] > 0 else f"\N{LEFTWARDS ARROW} {title}"
        look = {"fontsize": style.TEXT, "color": style.INK, "rotation": turn}
        _text_near(ax, (here + low) / 2, 27 * outward, text, **look)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 0.89), aspect="equal")
    ax.set_axis_off()


def _text_near(
    ax: Any, where: NDArray[np.float64], away: NDArray[np.float64], text: str, **look: Any
) -> None:
    """Text at a fixed distance in points."""
    ax.annotate(text, where, away, textcoords="offset points", ha="center", va="center", **look)


def roles_per_layer(roles: style.Roles, ax: Any = None) -> Any:
    """Stacked bars: heads per role, layer by layer.

    Args:
        roles: a name for every head.
        ax: axes to draw on; default: those of a new figure.

    Raises:
        RoleMapError: layers differ in length.
    """
    labels = style.labels_of(roles)
    layers, heads = len(labels), len(labels[0])
    names = style.ordered(name for row in labels for name in row)
    ax = style.axes_or_new(ax, min(6.9, max(3.4, 0.2 * layers + 0.8)), 2.3 + 0.16 * (len(names) // 5))
    base = np.zeros(layers)
    for name, colour in style.role_colours(names).items():
        counts = np.array([row.count(name) for row in labels], dtype=float)
        ax.bar(range(layers), counts, 0.86, bottom=base, color=colour, edgecolor="white", lw=0.4, label=name)
        base += counts
    ax.set(xlim=(-0.6, layers - 0.4), ylim=(0, heads), xlabel="layer", ylabel="heads")
    ax.set(xticks=style.ticks(layers), yticks=style.ticks(heads + 1))
    style.dress(ax)
    totals = {name: sum(row.count(name) for row in labels) for name in names}
    style.legend_above(ax, style.swatches(names, totals))
    return ax
