"""`headforcing roles fit`: from a profile and a budget to a role map, without the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headforcing.cli.amounts import itemsize, parse_bytes
from headforcing.cli.classify import check_files
from headforcing.cli.console import AsJson, clean_errors, print_json, print_parts, say
from headforcing.errors import OptionError
from headforcing.measure.sizes import ITEMSIZES

if TYPE_CHECKING:
    from headforcing.measure.budget import Budget
    from headforcing.measure.profile import HeadProfile
    from headforcing.roles.maps.role_map import RoleMap

ROWS = 12
"""Points of the curve that are printed."""


@dataclass(frozen=True)
class Options:
    """The options of the command."""

    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="A profile (.safetensors).", show_default=False)
    ]
    frames: Annotated[
        int | None, typer.Option(help="Stored frames, current chunk excluded, summed over all heads.")
    ] = None
    amount: Annotated[
        str | None,
        typer.Option("--bytes", metavar="2GB", help="Keys and values of one stream, current chunk included."),
    ] = None
    tokens_per_frame: Annotated[int | None, typer.Option(help="Patches of one frame, with --bytes.")] = None
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Dtype of keys and values, with --bytes: {', '.join(ITEMSIZES)}. [default: bf16]"),
    ] = None
    held: Annotated[
        bool, typer.Option("--held", help="--bytes are those of the ring store, which include rotated keys.")
    ] = False
    by: Annotated[str, typer.Option(help="output_regret.p95, output_regret.mean or ablation.increase.")] = (
        "output_regret.p95"
    )
    groups: Annotated[
        Path | None, typer.Option(help="A role map: heads with the same label there get the same role.")
    ] = None
    out: Annotated[Path | None, typer.Option(help="Where to write the role map. [default: show it only]")] = (
        None
    )
    as_json: AsJson = False


def fit(options: Options) -> None:
    """Distribute one budget of frames or bytes over the heads, where it reduces the measured error most.

    Requires a profile with output_regret, or one made by ablate_heads. The curve shows the smallest error for
    every budget. Errors of single heads are added up: interactions of heads are not measured.
    """
    with clean_errors():
        from headforcing.measure.budget import fit_budget
        from headforcing.measure.profile import HeadProfile
        from headforcing.roles.maps.role_map import RoleMap

        spend = _spend(options)
        check_files(options.profile, {"--out": options.out})
        profile = HeadProfile.load(options.profile)
        groups = None if options.groups is None else RoleMap.load(options.groups)
        found = fit_budget(profile, by=options.by, groups=groups, **spend)
        role_map = found.role_map()
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            role_map.save(options.out)
    if options.as_json:
        print_json(_json(options, found, role_map))
    else:
        _print(options, found, role_map, profile)


def _spend(options: Options) -> dict[str, Any]:
    """The budget as keyword arguments.

    Raises:
        OptionError: not exactly one budget is given, or an option that does not fit it.
    """
    if (options.frames is None) == (options.amount is None):
        raise OptionError("give either --frames or --bytes")
    if options.frames is not None:
        given = {"--tokens-per-frame": options.tokens_per_frame, "--dtype": options.dtype}
        for name, value in {**given, "--held": options.held or None}.items():
            if value is not None:
                raise OptionError(f"{name} works with --bytes only: leave it out")
        return {"frames": options.frames}
    if options.tokens_per_frame is None:
        raise OptionError("--bytes requires --tokens-per-frame, the patches of one frame")
    return {
        "bytes": parse_bytes(options.amount or "", "--bytes"),
        "tokens_per_frame": options.tokens_per_frame,
        "itemsize": itemsize(options.dtype or "bf16"),
        "held": options.held,
    }


def _json(options: Options, found: Budget, role_map: RoleMap) -> dict[str, Any]:
    return {
        "settings": dict(found.found.settings),
        "frames": found.frames,
        "left": found.left,
        "error": found.error,
        "errors": [list(row) for row in found.errors],
        "counts": found.found.counts(),
        "labels": [list(row) for row in found.labels],
        "curve": [{"frames": frames, "error": error} for frames, error in found.curve],
        "hash": role_map.hash,
        "files": [] if options.out is None else [str(options.out)],
    }


def _print(options: Options, found: Budget, role_map: RoleMap, profile: HeadProfile) -> None:
    from headforcing.cli.tables import facts_table, label_tables

    meaning = {name: str(role) for name, role in found.roles.items()}
    facts = {
        "stored frames": found.frames,
        "unused frames": found.left,
        f"total {options.by}": found.error,
        "settings": dict(found.found.settings),
    }
    tables = label_tables(found.labels, meaning)
    print_parts(_curve(found, profile), *tables, facts_table("budget", facts))
    if options.out is not None:
        say(options.out)
        say(f"next: headforcing roles show {options.out}")


def _curve(found: Budget, profile: HeadProfile) -> Any:
    """Some points of the curve, evenly spaced, and the result."""
    from rich.table import Table

    heads = profile.facts.model.layers * profile.facts.model.heads
    last = len(found.curve) - 1
    shown = {round(number * last / (ROWS - 1)) for number in range(ROWS)}
    rows = {point: "" for number, point in enumerate(found.curve) if number in shown}
    rows[found.frames, found.error] = "this budget"
    table = Table(title="total error by stored frames, over all heads")
    for column in ("frames", "per head", "total error", ""):
        table.add_column(column, justify="right")
    for (frames, error), note in sorted(rows.items()):
        table.add_row(str(frames), f"{frames / heads:.1f}", f"{error:.4g}", note)
    return table
