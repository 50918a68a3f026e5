"""Two maps of one model, label against label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headforcing.compare import Comparison
from headforcing.plots import style

DEEP = np.array([8, 81, 156]) / 255


def compare_table(
    comparison: Comparison, ax: Any = None, *, names: tuple[str, str] = ("first", "second")
) -> Any:
    """The cross table: heads in every cell, shaded by their share of the row.

    Args:
        comparison: of two maps.
        ax: axes to draw on; default: those of a new figure.
        names: what to call the first map (rows) and the second (columns).
    """
    rows, columns = style.ordered(comparison.labels_a), style.ordered(comparison.labels_b)
    order = np.ix_(
        [comparison.labels_a.index(label) for label in rows],
        [comparison.labels_b.index(label) for label in columns],
    )
    counts = np.array(comparison.table)[order]
    widest = max(map(len, columns))
    cell = max(0.62, 0.07 * widest + 0.2)
    width = 1.0 + 0.07 * max(map(len, rows)) + cell * len(columns)
    ax = style.axes_or_new(ax, max(2.6, width), 1.2 + 0.42 * len(rows))
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(1 - share[..., None] * (1 - DEEP), aspect="auto", interpolation="nearest")
    for (row, column), count in np.ndenumerate(counts):
        ink = "white" if share[row, column] > 0.55 else style.FAINT if not count else style.INK
        ax.text(column, row, str(count), ha="center", va="center", fontsize=style.TEXT, color=ink)
    ax.set_xticks(range(len(columns)), _totals(columns, counts.sum(0)))
    ax.set_yticks(range(len(rows)), _totals(rows, counts.sum(1), " "))
    ax.set(xlabel=f"{names[1]} (heads)", ylabel=f"{names[0]} (heads)")
    style.dress(ax)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    _chips(ax, rows, columns)
    ax.set_xlabel(ax.get_xlabel(), labelpad=5)
    ax.annotate(
        _scores(comparison), (0, 0), (0, -7), xycoords="axes fraction", textcoords="offset points",
        fontsize=7.5, color=style.FAINT, va="top", ha="left",
    )  # fmt: skip
    return ax


def _totals(labels: Sequence[str], counts: Sequence[int], between: str = "\n") -> list[str]:
    return [f"{label}{between}({count})" for label, count in zip(labels, counts, strict=True)]


def _chips(ax: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    """The colour of every role, along the edges of the table."""
    colours = style.role_colours([*rows, *columns])
    left, top = ax.get_xaxis_transform(), ax.get_yaxis_transform()
    for place, label in enumerate(columns):
        ax.plot(
            [place - 0.47, place + 0.47], [1, 1], color=colours[label], lw=3, transform=left, clip_on=False
        )
    for place, label in enumerate(rows):
        ax.plot(
            [0, 0], [place - 0.45, place + 0.45], color=colours[label], lw=3, transform=top, clip_on=False
        )


def _scores(comparison: Comparison) -> str:
    """What the shades mean, and the numbers of the comparison that exist."""
    same = {"agreement": comparison.agreement, "kappa": comparison.kappa}
    alike = {"NMI": comparison.nmi, "ARI": comparison.ari}
    lines = [
        "   ".join(f"{name} {value:.2f}" for name, value in scores.items() if value is not None)
        for scores in (same, alike)
    ]
    return "\n".join([*filter(None, lines), "shade: share of the row"])
