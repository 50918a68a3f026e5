"""Total error by number of stored frames, and the result of budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headforcing.errors import ProfileError
from headforcing.measure.budget import Budget
from headforcing.measure.plots import style

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def budget_curve(budgets: Budget | Mapping[str, Budget], ax: Any = None) -> Any:
    """Total error against stored frames over all heads, as steps, with a dot for each budget.

    Args:
        budgets: one, or several by name; those with the same curve share its line.
        ax: axes to draw on; default: those of a new figure.

    Raises:
        ProfileError: there is nothing to draw.
    """
    from matplotlib.lines import Line2D

    named = {"": budgets} if isinstance(budgets, Budget) else dict(budgets)
    if not named:
        raise ProfileError("there is no budget to draw: give at least one")
    ax = style.axes_or_new(ax, 3.6, 2.7)
    curves = list(dict.fromkeys(budget.curve for budget in named.values()))
    handles = []
    for number, (name, budget) in enumerate(named.items()):
        colour = COLOURS[number % len(COLOURS)]
        first = [other.curve for other in named.values()].index(budget.curve) == number
        if first:
            line = style.FAINT if len(curves) < len(named) else colour
            ax.step(*zip(*budget.curve, strict=True), where="post", color=line, lw=1.4, zorder=2)
        shape = style.MARKERS[number % len(style.MARKERS)]
        look: dict[str, Any] = {"marker": shape, "color": colour, "mec": "white", "mew": 0.8, "ms": 7}
        ax.plot([budget.frames], [budget.error], ls="none", zorder=3, clip_on=False, **look)
        label = f"{name}: {budget.frames} frames, {budget.error:.3g}".removeprefix(": ")
        handles.append(Line2D([], [], ls="none", label=label, **look))
    ax.set(xlabel="frames kept, over all heads", ylabel=_error(named))
    ax.set_xlim(0, max(curve[-1][0] for curve in curves) * 1.02 or 1)
    ax.set_ylim(min(0.0, *(1.1 * error for curve in curves for _, error in curve)), None)
    style.dress(ax, grid="y")
    style.legend_above(ax, handles)
    return ax


def _error(named: Mapping[str, Budget]) -> str:
    """The label of the vertical axis."""
    kinds = {str(budget.found.settings["by"]) for budget in named.values()}
    return f"total {kinds.pop()}" if len(kinds) == 1 else "total error"
