"""Quality over a long video: curves of a metric by frame, with bootstrap bands.

Not `scipy.stats.bootstrap`: every frame uses the same draws of videos, even if some of its values are NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headforcing.errors import ProfileError
from headforcing.measure.plots import style
from headforcing.measure.plots.tradeoff import COLOURS

STEP = 6
"""Frames per point, two chunks of the models we know."""
RESAMPLES = 1000
CONTROL = "#D55E00"

Values = Mapping[str, ArrayLike]
"""A metric by name, `[videos, frames]`, NaN if it was not measured."""
_Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def drift_curves(values: Values, trained: int, ylabel: str, ax: Any = None) -> Any:
    """Mean over the videos by frame, with its 95 % bootstrap band; at most five curves.

    Args:
        values: what was measured, by name.
        trained: frames that the model was trained on.
        ylabel: what was measured.
        ax: axes to draw on; default: those of a new figure.

    Raises:
        ProfileError: there are no curves, too many for one picture, or a value is not a table.
    """
    curves = _curves(values)
    if len(curves) > len(COLOURS):
        raise ProfileError(f"{len(curves)} curves are too many for one picture: use drift_panels")
    ax = style.axes_or_new(ax, 5.6, 2.9)
    lines = []
    for number, (name, curve) in enumerate(curves.items()):
        look = {"color": COLOURS[number], "ls": style.DASHES[number]}
        lines += _draw(ax, curve, {**look, "lw": 1.8, "label": name, "zorder": 3})
    _frame(ax, trained, _end(values))
    ax.set(xlabel="frame", ylabel=ylabel)
    style.dress(ax, grid="y")
    style.legend_above(ax, lines)
    return ax


def drift_panels(
    values: Values, trained: int, ylabel: str, controls: Values | None = None, control: str = "control"
) -> Any:
    """One panel per name: its curve with its band, the others in grey, and a control dashed.

    Args:
        values: what was measured, by name.
        trained: frames that the model was trained on.
        ylabel: what was measured.
        controls: controls by the name of their curve; not every curve requires one.
        control: name of the controls in the legend.

    Returns:
        An array of axes, one per name.

    Raises:
        ProfileError: there are no curves, a control has no curve, or a value is not a table.
    """
    curves, against = _curves(values), _curves(controls) if controls else {}
    if strangers := against.keys() - curves.keys():
        raise ProfileError(f"controls of {', '.join(sorted(strangers))}: there is no such curve")
    across = min(3, len(curves))
    down = -(-len(curves) // across)
    figure = style.new_figure(max(2.3 * across + 0.3, 3.6), 1.55 * down + 0.75)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, (name, curve) in zip(panels, curves.items(), strict=False):
        for other in curves.values():
            ax.plot(other[0], other[1][0], color=style.RULE, lw=0.9, zorder=1)
        if name in against:
            dashes = {"color": CONTROL, "lw": 1.3, "ls": style.DASHES[1], "zorder": 3}
            ax.plot(against[name][0], against[name][1][0], **dashes)
        _draw(ax, curve, {"color": COLOURS[0], "lw": 1.8, "zorder": 4})
        _frame(ax, trained, _end(values), note=ax is panels[0])
        ax.set_title(name, loc="left", fontsize=style.TEXT, color=style.INK)
        style.dress(ax, grid="y")
    for ax in panels[len(curves) :]:
        ax.set_axis_off()
    for ax in panels[max(0, len(curves) - across) : len(curves)]:
        ax.tick_params(labelbottom=True)
    figure.supxlabel("frame", fontsize=style.TEXT, color=style.INK)
    figure.supylabel(ylabel, fontsize=style.TEXT, color=style.INK)
    _legend(figure, control if against else "", len(curves) > 1)
    return panels[: len(curves)]


def _curves(values: Values) -> dict[str, _Curve]:
    """By name: the middle of every step, mean, low and high `[3, steps]`, and all videos."""
    if not values:
        raise ProfileError("there is nothing to draw: give at least one curve")
    return {name: _curve(name, np.asarray(table, dtype=np.float64)) for name, table in values.items()}


def _curve(name: str, table: NDArray[np.float64]) -> _Curve:
    if table.ndim != 2 or not table.size:
        raise ProfileError(f"{name} is {list(table.shape)}: expected [videos, frames]")
    steps = -(-table.shape[1] // STEP)
    padded = np.full((len(table), steps * STEP), np.nan)
    padded[:, : table.shape[1]] = table
    points = _nanmean(padded.reshape(len(table), steps, STEP), 2)
    picks = np.random.default_rng(0).integers(len(table), size=(RESAMPLES, len(table)))
    means = _nanmean(points[picks], 1)
    known = np.isfinite(points).any(0)
    band = np.full((3, steps), np.nan)
    band[0] = _nanmean(points, 0)
    band[1:, known] = np.nanpercentile(means[:, known], (2.5, 97.5), axis=0)
    middle = np.minimum(np.arange(steps) * STEP + (STEP - 1) / 2, table.shape[1] - 1)
    return middle, band, points


def _nanmean(x: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Mean without NaN; NaN, without a warning, if there is nothing else."""
    known = np.isfinite(x)
    count = known.sum(axis)
    total = np.where(known, x, 0.0).sum(axis)
    mean: NDArray[np.float64] = np.full(total.shape, np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return mean


def _draw(ax: Any, curve: _Curve, look: Mapping[str, Any]) -> list[Any]:
    where, band, points = curve
    if len(points) > 1:
        ax.fill_between(where, band[1], band[2], color=look["color"], alpha=0.18, lw=0, zorder=2)
    lines: list[Any] = ax.plot(where, band[0], **look)
    return lines


def _frame(ax: Any, trained: int, end: int, note: bool = True) -> None:
    """Marks the end of the trained length."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(0, end)
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    if trained >= end:
        return
    ax.axvline(trained, color=style.FAINT, lw=0.8, ls=(0, (2, 2)), zorder=1)
    if note:
        place = {"xytext": (3, -2), "textcoords": "offset points", "va": "top"}
        where = {"xycoords": ("data", "axes fraction"), **place}
        ax.annotate("trained length", (trained, 1), fontsize=style.SMALL, color=style.FAINT, **where)


def _end(values: Values) -> int:
    return max(int(np.shape(table)[1]) for table in values.values())


def _legend(figure: Any, control: str, others: bool) -> None:
    from matplotlib.lines import Line2D

    looks: dict[str, Any] = {"this one, mean and 95 % band": {"color": COLOURS[0], "lw": 1.8}}
    if control:
        looks[control] = {"color": CONTROL, "lw": 1.3, "ls": style.DASHES[1]}
    if others:
        looks["the others"] = {"color": style.RULE, "lw": 0.9}
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    size: Any = {"fontsize": style.TICK, "frameon": False, "handlelength": 2.2}
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), **size)
