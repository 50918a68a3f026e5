"""Time against frames attended, a panel per case: whatever lies on the line costs what its frames ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headforcing.measure.plots import style
from headforcing.measure.plots.tradeoff import COLOURS

COLUMNS = 3
SIZE_OF_DOT, SIZE_OF_NAME = 4, 6
"""In points."""
GAP = 1.0
"""Between a name and what is in its way, in points."""
ROOM = 1.15
"""Height of a panel over its highest point, for names."""


def draw_ratios(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """A PNG of time ratios over attended frames.

    Args:
        cases: reports of cases, each with rows of which the first is dense.
        path: where it goes.
    """
    down = -(-len(cases) // COLUMNS)
    figure = style.new_figure(3.4 * min(len(cases), COLUMNS), 3.0 * down)
    panels = list(figure.subplots(down, min(len(cases), COLUMNS), squeeze=False).flat)
    for ax in panels[len(cases) :]:
        ax.set_axis_off()
    for ax, found in zip(panels, cases, strict=False):
        rows = found["rows"]
        window = rows[0]["frames"]
        ax.plot([0, window], [0, 1], color="#999999", lw=1.0, ls="--")
        for row in rows:
            ax.plot(row["frames"], row["best_wall_ratio"], "o", ms=SIZE_OF_DOT, color=_colour(_kind(row)))
        highest = max(row["best_wall_ratio"] for row in rows)
        ax.set(xlim=(0, 1.3 * window), ylim=(0, ROOM * highest))
        ax.set_title(found["case"], fontsize=7, loc="left", wrap=True)
        ax.set(xlabel="frames attended", ylabel="time over dense")
        style.dress(ax, grid="y")
    figure.draw_without_rendering()  # now panels are as large as they will be
    for ax, found in zip(panels, cases, strict=False):
        label(ax, [(_kind(row), row["frames"], row["best_wall_ratio"]) for row in found["rows"]])
    figure.savefig(path, dpi=150)


def label(ax: Any, points: Sequence[tuple[str, float, float]]) -> list[Any]:
    """Names points, each to the right of its own and above the names and points that are in its way.

    Call it when nothing moves any more: what is in the way hangs on limits and on the size of the panel.

    Args:
        ax: axes.
        points: name, and where it is in data.

    Returns:
        The texts, lowest point first.
    """
    pixel = ax.figure.dpi / 72
    taken = [_around(*ax.transData.transform((x, y)), SIZE_OF_DOT / 2 * pixel) for _, x, y in points]
    texts: list[Any] = []
    for name, x, y in sorted(points, key=lambda point: (point[2], point[1], point[0])):
        text = ax.annotate(name, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=SIZE_OF_NAME)
        text.set_in_layout(False)  # or the panel makes room, and other names are in the way
        box = text.get_window_extent()
        while in_the_way := [other.y1 for other in taken if box.overlaps(other)]:
            box = box.translated(0, max(in_the_way) - box.y0 + GAP * pixel)
        text.xyann = (3, 3 + (box.y0 - text.get_window_extent().y0) / pixel)
        taken.append(box)
        texts.append(text)
    return texts


def _around(x: float, y: float, by: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox([[x - by, y - by], [x + by, y + by]])


def _kind(row: dict[str, Any]) -> str:
    kind: str = row["variant"].partition(":")[0].partition(",")[0]
    return kind


def _colour(kind: str) -> str:
    return COLOURS[0] if kind == "dense" else COLOURS[2] if kind == "StreamingLLM" else COLOURS[1]
