"""Whether heads keep their roles when something else is measured: a stability report, drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from headforcing.errors import ProfileError
from headforcing.plots import style
from headforcing.stability_report import SURE, StabilityReport

LINE = "#0072B2"
SPLITS = {"halves": "other\nprompts", "chunks": "other\nchunks", "steps": "other\nsteps"}


def stability_curve(report: StabilityReport, ax: Any = None) -> Any:
    """Agreement of maps from disjoint sets of prompts, by prompts per set, against the target.

    Args:
        report: of a stability check.
        ax: axes to draw on; default: those of a new figure.

    Raises:
        ProfileError: the report has no curve.
    """
    if not report.curve:
        raise ProfileError(f"the report has no curve: {report.prompts} prompts are too few to split")
    ax = style.axes_or_new(ax, 3.4, 2.5)
    prompts = [point.prompts for point in report.curve]
    ax.plot(prompts, [point.kappa for point in report.curve], color=LINE, marker="o", ms=4, lw=1.6)
    _target(ax, report.target)
    ax.set(xlabel="prompts per map", ylabel="Cohen's kappa")
    ax.set_ylim(min(0, *(point.kappa for point in report.curve)), 1.02)
    ax.set_xlim(min(prompts) - 0.4, max(prompts) + 0.4)
    shown = style.ticks(max(prompts) + 1)
    ax.set_xticks([number for number in shown if number >= min(prompts)])
    style.dress(ax, grid="y")
    needed = "not reached" if report.prompts_needed is None else f"reached with {report.prompts_needed}"
    _note(ax, f"target {report.target:g}: {needed}")
    return ax


def stability_panels(report: StabilityReport) -> Any:
    """Four panels: the curve, the splits, what depth explains, and the heads on the boundary.

    A panel says so where the report could not judge it.

    Returns:
        An array of four axes.
    """
    layers, heads = len(report.labels), len(report.labels[0])
    names = style.ordered(name for row in report.labels for name in row)
    tall = heads * min(0.3, 5.9 / layers) if report.votes is not None else 0.4
    figure = style.new_figure(6.9, 2.35 + tall + 0.75)
    grid = figure.add_gridspec(
        2, 3, height_ratios=(2.1, tall + 0.55), width_ratios=(1.2, 1.15, 0.5 + 0.25 * max(3, len(names)))
    )
    panels = [figure.add_subplot(grid[0, column]) for column in range(3)] + [figure.add_subplot(grid[1, :])]
    if report.curve:
        stability_curve(report, panels[0])
    else:
        _empty(panels[0], "too few prompts\nfor a curve")
    _splits(panels[1], report)
    _depth(panels[2], report)
    _votes(panels[3], report)
    for letter, panel in zip("abcd", panels, strict=True):
        panel.set_title(letter, loc="left", fontweight="bold", fontsize=style.TEXT, color=style.INK)
    return np.array(panels, dtype=object)


def _target(ax: Any, target: float) -> None:
    ax.axhline(target, color=style.INK, lw=0.9, ls=(0, (4, 3)), zorder=1)


def _note(ax: Any, text: str) -> None:
    """A remark in the lower right corner."""
    ax.text(
        0.98, 0.04, text, transform=ax.transAxes, fontsize=7.5, color=style.FAINT, ha="right", va="bottom"
    )  # fmt: skip


def _empty(ax: Any, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=8, color=style.FAINT)
    ax.set_axis_off()


def _splits(ax: Any, report: StabilityReport) -> None:
    """Kappa between disjoint parts: the mean over the pairs, and a line down to the lowest."""
    _target(ax, report.target)
    least = 0.0
    for place, name in enumerate(SPLITS):
        line = getattr(report, name)
        if line is None:
            ax.text(place, 0.06, "not\njudged", ha="center", va="bottom", fontsize=7, color=style.FAINT)
            continue
        least = min(least, line.lowest)
        ax.plot([place, place], [line.lowest, line.kappa], color=LINE, lw=1.2)
        ax.plot([place], [line.lowest], color=LINE, marker="_", ms=7)
        ax.plot([place], [line.kappa], color=LINE, marker="o", ms=5)
        ax.annotate(
            f"{line.kappa:.2f}", (place, line.kappa), (6, 0), textcoords="offset points",
            fontsize=7.5, va="center", color=style.INK, bbox={"fc": "white", "ec": "none", "pad": 0.5},
        )  # fmt: skip
    ax.set_xticks(range(len(SPLITS)), list(SPLITS.values()))
    ax.set(xlim=(-0.5, len(SPLITS) - 0.3), ylim=(least * 1.05, 1.02), ylabel="kappa (mean, lowest)")
    style.dress(ax, grid="y")


def _depth(ax: Any, report: StabilityReport) -> None:
    """The share of a role's place that the layer explains, with what chance would give."""
    names = style.ordered(report.depth)
    colours = style.role_colours(names)
    for place, name in enumerate(names):
        value = report.depth[name]
        if value is None:
            ax.text(place, 0.02, "-", ha="center", fontsize=8, color=style.FAINT)
        else:
            ax.bar(place, value, 0.7, color=colours[name])
    if report.depth_by_chance is not None:
        ax.axhline(report.depth_by_chance, color=style.INK, lw=0.9, ls=(0, (1.5, 1.5)))
        ax.annotate(
            "chance", (1, report.depth_by_chance), (-1, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", fontsize=7.5, color=style.INK, ha="right",
        )  # fmt: skip
    crowded = sum(map(len, names)) > 8 * 3
    ax.set_xticks(
        range(len(names)), names, rotation=40 if crowded else 0, ha="right" if crowded else "center"
    )
    ax.set(xlim=(-0.6, len(names) + 0.3), ylim=(0, 1.02), ylabel="explained by depth")
    style.dress(ax, grid="y")


def _votes(ax: Any, report: StabilityReport) -> None:
    """The map; a head on the boundary is split between its label and the runner-up by its votes."""
    from matplotlib.collections import PolyCollection

    if report.votes is None:
        return _empty(ax, "no votes: the prompts could not be resampled")
    layers, heads = len(report.labels), len(report.labels[0])
    close = {(head.layer, head.head): head for head in report.boundary}
    extra = [head.runner_up for head in report.boundary]
    names = style.ordered([*(name for row in report.labels for name in row), *extra])
    colours = style.role_colours(names)
    cells, fills = [], []
    for layer, row in enumerate(report.labels):
        for head, name in enumerate(row):
            found = close.get((layer, head))
            share = found.votes if found else 1.0
            cells.append(_part(layer, head, 0.0, share))
            fills.append(colours[name] if found else style.pale(colours[name]))
            if found:
                cells.append(_part(layer, head, share, 1.0))
                fills.append(colours[found.runner_up])
    ax.add_collection(PolyCollection(cells, facecolor=fills, lw=0))
    ax.set(xlim=(-0.5, layers - 0.5), ylim=(-0.5, heads - 0.5), xlabel="layer", ylabel="head")
    ax.set(xticks=style.ticks(layers), yticks=style.ticks(heads))
    style.dress(ax)
    for spine in ax.spines.values():
        spine.set_visible(False)
    style.legend_above(ax, style.swatches(names))
    ax.get_legend().set_bbox_to_anchor((0.02, 1.0))  # beside the letter
    note = f"pale: at least {SURE:.0%} of the votes; split: votes for the label, the rest for the runner-up"
    below = {"xytext": (0, -33), "textcoords": "offset points", "va": "top"}
    ax.annotate(note, (0, 0), xycoords="axes fraction", fontsize=7.5, color=style.FAINT, **below)
    return None


def _part(layer: int, head: int, low: float, high: float) -> list[tuple[float, float]]:
    """Corners of the part of a cell between two shares of its height."""
    left, right, bottom = layer - 0.46, layer + 0.46, head - 0.46
    down, up = bottom + 0.92 * low, bottom + 0.92 * high
    return [(left, down), (right, down), (right, up), (left, up)]
