"""Shared by the pictures: colours by role name, text sizes, and axes without global state."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headforcing.errors import HeadForcingError, ProfileError, RoleMapError
from headforcing.measure.classifiers import Classification, Labels
from headforcing.measure.profile import HeadProfile
from headforcing.roles.maps.role_map import RoleMap

Roles = RoleMap | Classification | Sequence[Sequence[str]]
"""A name for every head: a role map, a classification, or `labels[layer][head]`."""

SMALL, TICK, TEXT = 6.5, 8, 9
MARGIN = 0.65
"""Margin of a figure that a legend does not use, in inches."""
INK, FAINT, RULE = "#222222", "#6B6B6B", "#DDDDDD"

# Okabe and Ito's palette; the names of the methods we know come first, in the order of legends and stacks.
KNOWN = {
    "local": "#0072B2",
    "anchor": "#E69F00",
    "memory": "#009E73",
    "wave": "#CC79A7",
    "veil": "#999999",
    "static": "#D55E00",
    "dynamic": "#56B4E9",
    "slidingwindow": "#882255",
    "full": "#444444",
}
# Paul Tol's muted palette and its neighbours, for every other name.
OTHERS = (
    "#332288", "#DDCC77", "#44AA99", "#999933", "#AA4499", "#661100",
    "#6699CC", "#CC6677", "#117733", "#F0E442", "#88CCEE", "#B15928",
)  # fmt: skip
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "p", "h", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)))


class PlotExtraError(HeadForcingError, ImportError):
    """Matplotlib is not installed."""


def new_figure(width: float, height: float) -> Any:
    """A new figure, in inches, that is not registered with pyplot.

    Raises:
        PlotExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotExtraError("pictures need matplotlib: pip install 'headforcing[plot]'") from error
    return Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")


def axes_or_new(ax: Any, width: float, height: float) -> Any:
    """The given axes, or those of a new figure."""
    return new_figure(width, height).add_subplot() if ax is None else ax


def dress(ax: Any, *, grid: str = "") -> None:
    """Sets text sizes, spines, and optionally a grid along `x` or `y`."""
    ax.tick_params(labelsize=TICK, colors=INK, width=0.6, length=2.5)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(linewidth=0.6, color=FAINT)
    for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
        text.set(fontsize=TEXT, color=INK)
    if grid:
        ax.grid(axis=grid, color=RULE, linewidth=0.5)
        ax.set_axisbelow(True)


def legend_above(ax: Any, handles: Sequence[Any], height: float = 1.0) -> None:
    """A legend above the axes, with its lower edge at `height` times their height."""
    _legend(ax, handles, TICK, loc="lower left", bbox_to_anchor=(0.0, height))


def legend_below(ax: Any, handles: Sequence[Any], down: float) -> None:
    """A legend `down` inches below the axes, in small letters if there is little space."""
    from matplotlib.transforms import ScaledTranslation

    place = ax.transAxes + ScaledTranslation(0, -down, ax.get_figure().dpi_scale_trans)
    size = TICK if room(ax) > 3 else SMALL
    _legend(ax, handles, size, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=place, borderpad=0)


def _legend(ax: Any, handles: Sequence[Any], size: float, **place: Any) -> None:
    ax.legend(
        handles=handles,
        ncols=columns(handles, room(ax), size),
        frameon=False,
        fontsize=size,
        handlelength=1.6,
        handletextpad=0.5,
        columnspacing=1.2,
        labelspacing=0.5 if size == TICK else 0.3,
        borderaxespad=0.3,
        **place,
    )


def room(ax: Any) -> float:
    """Largest width of a legend in inches: that of the figure, or of the axes if there are several."""
    figure = ax.get_figure()
    box = ax.get_window_extent() if len(figure.axes) > 1 else figure.bbox
    width = float(box.width) / float(figure.dpi)
    if len(figure.axes) == 1:
        return width - MARGIN
    if figure.get_layout_engine() is not None:  # it will add the margins to the axes
        width *= 0.9 / float(figure.subplotpars.right - figure.subplotpars.left)
    return width


def columns(handles: Sequence[Any], width: float, size: float = TICK) -> int:
    """Number of legend columns that fit into a width in inches."""
    from matplotlib.textpath import TextPath

    texts = (TextPath((0, 0), handle.get_label(), size=size) for handle in handles)
    widths = [float(text.get_extents().width) / 72 for text in texts]
    swatch, space = 2.1 * size / 72, 1.2 * size / 72

    def taken(count: int) -> float:
        parts = np.array_split(np.array(widths), count)
        return sum(float(part.max()) + swatch + space for part in parts) - space

    return next((count for count in range(len(widths), 1, -1) if taken(count) <= width), 1)


def swatches(names: Sequence[str], counts: dict[str, int] | None = None) -> list[Any]:
    """A coloured square per role for a legend, with its number of heads if given."""
    from matplotlib.patches import Patch

    colours = role_colours(names)
    note = {name: f" ({counts[name]})" if counts else "" for name in names}
    return [Patch(facecolor=colours[name], edgecolor="none", label=name + note[name]) for name in names]


def labels_of(roles: Roles) -> Labels:
    """The name of every head's role, `labels[layer][head]`.

    Raises:
        RoleMapError: there are no heads, or layers differ in length.
    """
    rows: Any = roles
    if isinstance(roles, RoleMap | Classification):
        rows = roles.labels
    elif isinstance(roles, str) or any(isinstance(row, str) for row in roles):
        raise RoleMapError(f"{roles!r} is not labels[layer][head]: pass one sequence of names per layer")
    table = tuple(tuple(row) for row in rows)
    widths = sorted({len(row) for row in table})
    if len(widths) != 1 or not widths[0]:
        raise RoleMapError(f"layers name {widths or 'no'} heads: expected the same number, at least 1")
    return table


def fitting(profile: HeadProfile, roles: Roles) -> Labels:
    """The labels, checked against the shape of the profile.

    Raises:
        ProfileError: they are for other layers or heads.
    """
    labels = labels_of(roles)
    shape = len(labels), len(labels[0])
    if shape != profile.shape:
        raise ProfileError(
            f"the labels are for {shape[0]} layers x {shape[1]} heads, the profile for "
            f"{profile.shape[0]} x {profile.shape[1]}: use labels made from this profile"
        )
    return labels


def numbers(values: ArrayLike, shape: tuple[int, ...], name: str) -> NDArray[np.float64]:
    """An array of this shape.

    Raises:
        ProfileError: it has another shape.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape:
        raise ProfileError(f"{name} is {list(array.shape)}: expected {list(shape)}, like the labels")
    return array


def ordered(names: Iterable[str]) -> list[str]:
    """Each name once: known roles first, then by name, independent of the order of heads."""
    known = list(KNOWN)
    places = {name: known.index(_base(name)) if _base(name) in KNOWN else len(known) for name in names}
    return sorted(places, key=lambda name: (places[name], _natural(name), name))


def role_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour per role name, independent of the order.

    Known roles have a colour of their own; variants such as `memory1+8+9` share it, in shades where one
    picture has several. Another name has a colour by its hash; where two in one picture would share it,
    the later in the alphabet moves on.
    """
    names = ordered(names)
    found: dict[str, str] = {}
    taken: list[int] = []
    for name in names:
        base = _base(name)
        if base in KNOWN:
            variants = [other for other in names if _base(other) == base]
            found[name] = _shade(KNOWN[base], variants.index(name), len(variants))
            continue
        lap = len(taken) // len(OTHERS)
        place = zlib.crc32(name.encode()) % len(OTHERS)
        while place in taken[lap * len(OTHERS) :]:
            place = (place + 1) % len(OTHERS)
        taken.append(place)
        found[name] = pale(OTHERS[place], 1 - 0.6**lap)
    return found


def nth(name: str) -> int:
    """A number derived from a role's name, for markers and dashes."""
    known = list(KNOWN)
    return known.index(_base(name)) if _base(name) in KNOWN else zlib.crc32(name.encode())


def pale(colour: str, share: float = 0.72) -> str:
    """A colour mixed with this share of white."""
    mixed = [round(part + (255 - part) * share) for part in bytes.fromhex(colour[1:])]
    return "#" + bytes(mixed).hex().upper()


def ticks(count: int) -> list[int]:
    """About eight round numbers from 0 to below `count`."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, *range(100, count + 200, 100)) if count <= 8 * step)
    return list(range(0, count, step))


def _base(name: str) -> str:
    """The letters a name begins with: `memory` of `memory1+8+9`."""
    found = re.match(r"[A-Za-z_]*", name)
    return found.group().lower() if found else ""


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that puts `local3` before `local12`."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _shade(colour: str, number: int, count: int) -> str:
    """One of `count` shades of a colour, dark to light; the colour itself if there is only one."""
    change = 0.0 if count == 1 else -0.4 + 0.85 * number / (count - 1)
    if change >= 0:
        return pale(colour, change)
    return "#" + bytes(round(part * (1 + change)) for part in bytes.fromhex(colour[1:])).hex().upper()
