"""`headforcing roles ...`: look at role maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from headforcing.cli.console import AsJson, clean_errors, examples, fail, print_json, print_parts

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Role maps: which head of which layer keeps what. Find, read, check, compare and draw them.",
)

RoleFile = Annotated[Path, typer.Argument(metavar="FILE", help="A role-map file (JSON).", show_default=False)]


@app.command(epilog=examples("roles show roles.json", "roles show roles.json --json"))
def show(file: RoleFile, as_json: AsJson = False) -> None:
    """Show which head has which role, and where that comes from.

    The origin names the model by its class and the fingerprint of its attention weights, the measurement,
    and what is known of its stability.
    """
    with clean_errors():
        from headforcing.cli.tables import role_tables, summary
        from headforcing.role_map import RoleMap

        role_map = RoleMap.load(file)
    if as_json:
        print_json(summary(role_map))
    else:
        print_parts(*role_tables(role_map))


@app.command(epilog=examples("roles validate roles.json"))
def validate(file: RoleFile, as_json: AsJson = False) -> None:
    """Check a role-map file and print its hash.

    The exit code is 1 where the file is not valid.
    """
    from headforcing.cli.tables import summary
    from headforcing.errors import RoleMapError
    from headforcing.role_map import RoleMap

    try:
        role_map = RoleMap.load(file)
    except RoleMapError as error:
        if not as_json:
            fail(error, code=1)
        typer.echo(json.dumps({"valid": False, "error": str(error)}))
        raise typer.Exit(1) from error
    if as_json:
        print_json({"valid": True, **summary(role_map)})
    else:
        layers, heads = role_map.shape
        typer.echo(f"{file}: valid, {layers} layers x {heads} heads, {len(role_map.counts())} roles")
        typer.echo(role_map.hash)
