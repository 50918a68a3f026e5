"""How many heads of each role every layer has (Head Forcing, arXiv:2605.14487, Fig. 3b)."""

from __future__ import annotations

from typing import Any

import numpy as np

from headforcing.plots import style


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
