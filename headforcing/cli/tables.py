"""Role maps as rich tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headforcing.role_map import RoleMap
    from headforcing.roles import HeadRole

COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
WIDE = 8
"""With more heads than this, the role table shows initials."""


def role_names(role_map: RoleMap) -> dict[HeadRole, str]:
    """A short name per role: its type, numbered where a type appears with several numbers."""
    kinds = [type(role).__name__.lower() for role in role_map.counts()]
    names = {}
    for index, (role, kind) in enumerate(zip(role_map.counts(), kinds, strict=True)):
        number = kinds[: index + 1].count(kind) if kinds.count(kind) > 1 else ""
        names[role] = f"{kind}{number}"
    return names


def summary(role_map: RoleMap) -> dict[str, Any]:
    """Shape, roles and origin as plain data."""
    names = role_names(role_map)
    layers, heads = role_map.shape
    return {
        "layers": layers,
        "heads": heads,
        "roles": {
            names[role]: {"heads": count, "role": str(role)} for role, count in role_map.counts().items()
        },
        "provenance": dict(role_map.provenance),
    }


def role_tables(role_map: RoleMap) -> list[Any]:
    """The map, the counts and the provenance as rich tables."""
    from rich.table import Table
    from rich.text import Text

    names = role_names(role_map)
    styles = {role: COLOURS[index % len(COLOURS)] for index, role in enumerate(names)}
    heads = role_map.shape[1]
    grid = Table(title="roles, layer by head", padding=(0, 1 if heads <= WIDE else 0), show_lines=False)
    grid.add_column("layer", justify="right")
    for head in range(heads):
        grid.add_column(str(head), justify="center")
    for layer, row in enumerate(role_map.layers):
        cells = [names[role] if heads <= WIDE else _initial(names[role]) for role in row]
        painted = [Text(cell, styles[role]) for cell, role in zip(cells, row, strict=True)]
        grid.add_row(str(layer), *painted)
    counts = Table(title="heads per role")
    for column in ("role", "heads", "what it keeps"):
        counts.add_column(column)
    for role, count in role_map.counts().items():
        shown = names[role] if heads <= WIDE else f"{_initial(names[role])} {names[role]}"
        counts.add_row(Text(shown, styles[role]), str(count), Text(str(role)))
    origin = Table(title="provenance", show_header=False)
    for key, value in role_map.provenance.items():
        origin.add_row(Text(key), Text(str(value)))
    return [grid, counts, *([origin] if role_map.provenance else [])]


def _initial(name: str) -> str:
    """`local2` -> `L2`."""
    return name[0].upper() + name[len(name.rstrip("0123456789")) :]
