"""`headforcing roles compare`: two role maps of one model, head by head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headforcing.cli.console import AsJson, clean_errors, print_json, print_parts

if TYPE_CHECKING:
    from headforcing.measure.compare import Comparison


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A role-map file.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare two role maps, head by head.

    Agreement, kappa and Jaccard need common labels, that is, roles that are equal in every number. NMI and
    ARI compare only which heads are grouped together.
    """
    with clean_errors():
        from headforcing.measure.compare import compare_maps
        from headforcing.roles.maps.role_map import RoleMap

        found = compare_maps(RoleMap.load(a), RoleMap.load(b))
    if as_json:
        print_json(found.to_dict())
    else:
        print_parts(*_tables(found, a, b))


def _tables(found: Comparison, a: Path, b: Path) -> list[Any]:
    from rich.table import Table
    from rich.text import Text

    cross = Table(title=Text(f"heads by role: rows {a}, columns {b}"))
    cross.add_column("")
    for label in found.labels_b:
        cross.add_column(Text(label), justify="right")
    for label, row in zip(found.labels_a, found.table, strict=True):
        cross.add_row(Text(label), *map(str, row))
    numbers = Table(title="agreement", show_header=False)
    shared = {"agreement": found.agreement, "kappa": found.kappa}
    everything = {**shared, "NMI": found.nmi, "ARI": found.ari}
    everything |= {f"Jaccard of {label}": value for label, value in found.jaccard.items()}
    for name, value in everything.items():
        numbers.add_row(Text(name), "no common label" if value is None else f"{value:.3f}")
    return [cross, numbers]
