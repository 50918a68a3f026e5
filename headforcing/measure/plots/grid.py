"""The head map: which head of which layer has which role, with margins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headforcing.measure.classifiers import Labels
from headforcing.measure.plots import style

LEAST, MOST = 0.18, 0.92
"""Side of the square of a head on the boundary, and of the head with the largest margin, in cells."""
BAR, GAP = 0.5, 0.07
"""Height of the bars and their distance from the map, in inches."""
BELOW, KEY = 0.4, 0.19
"""Height of ticks and label below the map, and of the line that explains margins, in inches."""


def head_map(
    roles: style.Roles,
    margin: ArrayLike | None = None,
    ax: Any = None,
    *,
    per_layer: bool = True,
    per_head: bool = False,
) -> Any:
    """Roles by layer (across) and head (up), with counts as bars at the sides.

    Args:
        roles: a name for every head.
        margin: `[layers, heads]`, margin of every head. Cells are then pale, and the full square inside grows
            with the margin; a cross is a head without a margin.
        ax: axes to draw on, with the legend below them; default: those of a new figure, with it above.
        per_layer: bars of heads per layer, above.
        per_head: bars of layers per head number, to the right.

    Returns:
        The axes of the map; the bars are its `child_axes`.

    Raises:
        RoleMapError: layers differ in length.
        ProfileError: margins and labels differ in shape.
    """
    labels = style.labels_of(roles)
    layers, heads = len(labels), len(labels[0])
    margins = None if margin is None else style.numbers(margin, (layers, heads), "margin")
    names = style.ordered(name for row in labels for name in row)
    counts = {name: sum(row.count(name) for row in labels) for name in names}
    handles = style.swatches(names, counts)
    own = ax is None
    if own:
        ax = _own_axes((layers, heads), handles, BAR * per_layer, BAR * per_head, margins is not None)
    for name, colour in style.role_colours(names).items():
        _cells(ax, _where(labels, name), colour, name, margins)
    ax.set(xlim=(-0.5, layers - 0.5), ylim=(-0.5, heads - 0.5), xlabel="layer", ylabel="head")
    ax.set(xticks=style.ticks(layers), yticks=style.ticks(heads))
    style.dress(ax)
    for spine in ax.spines.values():
        spine.set_visible(False)
    inches = ax.get_window_extent().size / ax.get_figure().dpi
    if per_layer:
        _bars(ax.inset_axes((0, 1 + GAP / inches[1], 1, BAR / inches[1]), sharex=ax), labels, across=True)
    if per_head:
        aside = ax.inset_axes((1 + GAP / inches[0], 0, BAR / inches[0], 1), sharey=ax)
        _bars(aside, tuple(zip(*labels, strict=True)), across=False)
    if own:
        style.legend_above(ax, handles, 1 + (GAP + BAR) * per_layer / inches[1])
    else:
        style.legend_below(ax, handles, BELOW + KEY * (margins is not None))
    if margins is not None:
        below = {"xytext": (0, -33), "textcoords": "offset points", "va": "top"}
        ax.annotate(_key(margins), (0, 0), xycoords="axes fraction", fontsize=7.5, color=style.FAINT, **below)
    return ax


def _own_axes(shape: tuple[int, int], handles: list[Any], above: float, aside: float, key: bool) -> Any:
    """Axes in a new figure, laid out in inches so that cells are square."""
    layers, heads = shape
    cell = min(0.45, max(0.155, 6.0 / max(shape)))
    left, low, right = 0.52, 0.46 + 0.16 * key, 0.1 + (aside + GAP + 0.1 if aside else 0.0)
    width = max(3.4, left + layers * cell + right)
    legend = 0.12 + 0.17 * -(-len(handles) // style.columns(handles, width - style.MARGIN))
    height = low + heads * cell + (above + GAP if above else 0.0) + legend
    figure = style.new_figure(width, height)
    figure.set_layout_engine("none")
    return figure.add_axes((left / width, low / height, layers * cell / width, heads * cell / height))


def _where(labels: Labels, name: str) -> NDArray[np.int64]:
    """Layer and head of every head of this name, `[n, 2]`."""
    return np.argwhere(np.array(labels, dtype=object) == name)


def _cells(
    ax: Any, where: NDArray[np.int64], colour: str, name: str, margins: NDArray[np.float64] | None
) -> None:
    """The cells of one role, and in them squares by margin."""
    from matplotlib.collections import PolyCollection

    whole = np.full(len(where), MOST)
    shown = colour if margins is None else style.pale(colour)
    ax.add_collection(PolyCollection(_squares(where, whole), facecolor=shown, lw=0, label=name))
    if margins is None:
        return
    of_role = margins[where[:, 0], where[:, 1]]
    known = np.isfinite(of_role)
    side = LEAST + (MOST - LEAST) * np.sqrt(np.clip(of_role[known] / _largest(margins), 0, 1))
    squares = PolyCollection(_squares(where[known], side), facecolor=colour, lw=0)
    squares.set_gid(f"margin:{name}")
    ax.add_collection(squares)
    ax.plot(*where[~known].T, ls="", marker="x", ms=3, mew=0.7, color=style.FAINT)


def _squares(where: NDArray[np.int64], side: NDArray[np.float64]) -> Any:
    """Corners of squares around cells, `[n, 4, 2]`."""
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    return where[:, None, :] + corners * side[:, None, None]


def _largest(margins: NDArray[np.float64]) -> float:
    """The margin whose square fills its cell."""
    known = margins[np.isfinite(margins)]
    return float(known.max()) if len(known) and known.max() > 0 else 1.0


def _key(margins: NDArray[np.float64]) -> str:
    """The explanation of squares and crosses."""
    known = np.isfinite(margins)
    text = f"filled share of a cell: margin, full at {_largest(margins):.2g}" if known.any() else ""
    return "; ".join([text] * bool(text) + ["\N{MULTIPLICATION SIGN}: none"] * (not known.all()))


def _bars(ax: Any, rows: Labels, *, across: bool) -> None:
    """Stacked counts per row of labels: bars above the map, or at its side."""
    names = style.ordered(name for row in rows for name in row)
    base = np.zeros(len(rows))
    for name, colour in style.role_colours(names).items():
        counts = np.array([row.count(name) for row in rows], dtype=float)
        if across:
            ax.bar(range(len(rows)), counts, MOST, bottom=base, color=colour, lw=0, label=name)
        else:
            ax.barh(range(len(rows)), counts, MOST, left=base, color=colour, lw=0, label=name)
        base += counts
    style.dress(ax)
    size, most = ("y", len(rows[0])) if across else ("x", len(rows[0]))
    ax.set(**{f"{size}lim": (0, most), f"{size}ticks": [0, most]})
    ax.set(**{f"{size}label": "heads" if across else "layers"})
    ax.tick_params(**{"labelbottom" if across else "labelleft": False})
    ax.tick_params(axis="x" if across else "y", length=0)
    ax.spines["bottom" if across else "left"].set_visible(False)
