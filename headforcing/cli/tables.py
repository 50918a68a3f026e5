"""Role maps and facts as rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import ascii_lowercase, digits
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headforcing.roles.maps.role_map import RoleMap

COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
WIDE = 8
"""With more heads than this, the role table shows letters."""
SPACED = 30
"""With more heads than this, it shows letters without spaces."""


def summary(role_map: RoleMap) -> dict[str, Any]:
    """Shape, roles, hash and origin as plain data."""
    layers, heads = role_map.shape
    flat = [label for row in role_map.labels for label in row]
    return {
        "layers": layers,
        "heads": heads,
        "roles": {
            label: {"heads": flat.count(label), "role": str(role)} for label, role in role_map.named().items()
        },
        "hash": role_map.hash,
        "origin": role_map.origin.model_dump(mode="json"),
    }


def role_tables(role_map: RoleMap) -> list[Any]:
    """The map, the counts, and its origin."""
    meaning = {label: str(role) for label, role in role_map.named().items()}
    origin = {"hash": role_map.hash, **role_map.origin.model_dump(mode="json")}
    return [*label_tables(role_map.labels, meaning), facts_table("origin", origin)]


def label_tables(labels: Sequence[Sequence[str]], meaning: Mapping[str, str]) -> list[Any]:
    """A table of names `labels[layer][head]`, and how many heads have each.

    Args:
        labels: the names.
        meaning: the role of every name, in the order to list them.
    """
    from rich.table import Table
    from rich.text import Text

    styles = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(meaning)}
    heads = len(labels[0])
    short = _letters(meaning) if heads > WIDE else {name: name for name in meaning}
    grid = Table(title="roles, layer by head")
    grid.add_column("layer", justify="right")
    if heads <= WIDE:
        for head in range(heads):
            grid.add_column(str(head), justify="center")
        for layer, row in enumerate(labels):
            grid.add_row(str(layer), *(Text(name, styles[name]) for name in row))
    else:
        gap = " " if heads <= SPACED else ""
        grid.add_column(_ruler(heads, 1 + len(gap)), no_wrap=True)
        for layer, row in enumerate(labels):
            grid.add_row(str(layer), Text(gap).join(Text(short[name], styles[name]) for name in row))
    counts = Table(title="heads per role")
    for column in ("role", "heads", "definition"):
        counts.add_column(column)
    for name, role in meaning.items():
        shown = name if heads <= WIDE else f"{short[name]} {name}"
        count = sum(list(row).count(name) for row in labels)
        counts.add_row(Text(shown, styles[name]), str(count), Text(role))
    return [grid, counts]


def facts_table(title: str, facts: Mapping[str, Any]) -> Any:
    """Nested facts as a table of two columns, without empty ones."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_header=False)
    for key, value in _flat(facts):
        table.add_row(Text(key), Text(value, overflow="fold"))
    return table


def _flat(facts: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{above}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}: ")
        elif isinstance(value, (list, tuple)):
            if value:
                yield name, ", ".join(map(str, value))
        elif value is not None and value != "":
            yield name, f"{value:.4g}" if isinstance(value, float) else str(value)


def _letters(names: Iterable[str]) -> dict[str, str]:
    """One letter per name: its initial, or, if several names share it, `1`, `2`, ... in order."""
    known = list(names)
    initials = [name[:1].upper() for name in known]
    others = iter([*digits[1:], *ascii_lowercase, *(f"({number})" for number in range(len(known)))])
    return {
        name: initial if initial.isalpha() and initials.count(initial) == 1 else next(others)
        for name, initial in zip(known, initials, strict=True)
    }


def _ruler(heads: int, width: int) -> str:
    """The number of every fifth head above it."""
    return "".join(str(head).ljust(5 * width) for head in range(0, heads, 5)).rstrip()
