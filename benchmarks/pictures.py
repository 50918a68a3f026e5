"""Time against frames attended, a panel per case: whatever lies on the line costs what its frames ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headforcing.plots import style
from headforcing.plots.tradeoff import COLOURS

COLUMNS = 3


def draw_ratios(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """A PNG of time ratios over attended frames.

    Args:
        cases: reports of cases, each with rows of which the first is dense.
        path: where it goes.
    """
    down = -(-len(cases) // COLUMNS)
    figure = style.new_figure(3.4 * min(len(cases), COLUMNS), 3.0 * down)
    panels = figure.subplots(down, min(len(cases), COLUMNS), squeeze=False).flat
    for ax in panels[len(cases) :]:
        ax.set_axis_off()
    for ax, found in zip(panels, cases, strict=False):
        rows = found["rows"]
        window = rows[0]["frames"]
        ax.plot([0, window], [0, 1], color="#999999", lw=1.0, ls="--")
        for row in rows:
            kind = row["variant"].partition(":")[0].partition(",")[0]
            colour = COLOURS[0] if kind == "dense" else COLOURS[2] if kind == "StreamingLLM" else COLOURS[1]
            ax.plot(row["frames"], row["best_wall_ratio"], "o", ms=4, color=colour)
            place = (row["frames"], row["best_wall_ratio"])
            ax.annotate(kind, place, xytext=(3, 3), textcoords="offset points", fontsize=6)
        ax.set(xlim=(0, 1.3 * window), ylim=(0, None))
        ax.set_title(found["case"], fontsize=7, loc="left", wrap=True)
        ax.set(xlabel="frames attended", ylabel="time over dense")
        style.dress(ax, grid="y")
    figure.savefig(path, dpi=150)
