"""`headforcing roles ...`: work with role maps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from headforcing.cli import classify, compare, fit, hub, plot
from headforcing.cli.console import (
    AsJson,
    choices,
    clean_errors,
    command_of,
    examples,
    fail,
    print_json,
    print_parts,
    say,
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Role maps: which head has which role. Measure, show, check, compare and plot them.",
)

RoleFile = Annotated[Path, typer.Argument(metavar="FILE", help="A role-map file (JSON).", show_default=False)]


@app.command(epilog=examples("roles show roles.json", "roles show roles.json --json"))
def show(file: RoleFile, as_json: AsJson = False) -> None:
    """Show which head has which role, and the origin of the map.

    The origin names the model, by its class and the fingerprint of its attention weights, the measurement,
    and the stability of the labels.
    """
    with clean_errors():
        from headforcing.cli.tables import role_tables, summary
        from headforcing.roles.maps.role_map import RoleMap

        role_map = RoleMap.load(file)
    if as_json:
        print_json(summary(role_map))
    else:
        print_parts(*role_tables(role_map))


@app.command(epilog=examples("roles validate roles.json"))
def validate(file: RoleFile, as_json: AsJson = False) -> None:
    """Check a role-map file and print its hash.

    The exit code is 1 if the file is not valid.
    """
    from headforcing.cli.tables import summary
    from headforcing.errors import RoleMapError
    from headforcing.roles.maps.role_map import RoleMap

    try:
        role_map = RoleMap.load(file)
    except RoleMapError as error:
        if not as_json:
            fail(error, code=1)
        say(json.dumps({"valid": False, "error": str(error)}))
        raise typer.Exit(1) from error
    if as_json:
        print_json({"valid": True, **summary(role_map)})
    else:
        layers, heads = role_map.shape
        say(f"{file}: valid, {layers} layers x {heads} heads, {len(role_map.counts())} roles")
        say(role_map.hash)


@app.command(
    "import",
    epilog=examples(
        "roles import head_class.csv --format pyramid_forcing --out roles.json",
        "roles import heads.json --format forcing_kv --base-model ORG/NAME --out roles.json",
    ),
)
def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Label file.", show_default=False)],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help=f"Format of the file: one of {choices('headforcing.roles.maps.importers')}.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where to write the role map.")] = Path("roles.json"),
    base_model: Annotated[
        str | None, typer.Option(help="Public name of the checkpoint it is for, stored as a note.")
    ] = None,
    window: Annotated[int, typer.Option(help="Frames the model was trained on.", min=1)] = 21,
    chunk: Annotated[int, typer.Option(help="Frames of a chunk.", min=1)] = 3,
    as_json: AsJson = False,
) -> None:
    """Make a role map from the head labels of another project.

    Labels are imported exactly or not at all. They get the roles of the preset of the same name, for the
    window of the model; the notes of the map list them.
    """
    with clean_errors():
        from headforcing.cli.tables import role_tables, summary
        from headforcing.roles.maps.importers import import_roles
        from headforcing.roles.maps.origin import Origin

        role_map = import_roles(file, form, window=window, chunk=chunk)
        if base_model is not None:
            notes = {**role_map.origin.notes, "base_model": base_model}
            role_map = dataclasses.replace(role_map, origin=Origin(notes=notes))
        role_map.save(out)
    if as_json:
        print_json({**summary(role_map), "files": [str(out)]})
    else:
        print_parts(*role_tables(role_map))
        say(out)


app.command(
    "classify",
    epilog=examples(
        "roles classify profile.safetensors --out roles.json --report stability.json",
        "roles classify profile.safetensors --set anchor=0.3 --set rule=absolute",
        "roles classify profile.safetensors --control random --seed 1 --out random.json",
    ),
)(command_of(classify.classify, classify.Options))
app.command(
    "fit",
    epilog=examples(
        "roles fit profile.safetensors --frames 2160 --out roles.json",
        "roles fit profile.safetensors --bytes 2GB --tokens-per-frame 3600 --held --out roles.json",
        "roles fit ablation.safetensors --frames 2160 --by ablation.increase --json",
    ),
)(command_of(fit.fit, fit.Options))
app.command("compare", epilog=examples("roles compare a.json b.json", "roles compare a.json b.json --json"))(
    compare.compare
)
app.command(
    "plot",
    epilog=examples(
        "roles plot roles.json --out plots",
        "roles plot roles.json --profile profile.safetensors --format png",
    ),
)(plot.plot)
app.command(
    "pull", epilog=examples("roles pull ORG/NAME --revision <full hash of a commit> --out roles.json")
)(hub.pull)
app.command("push", epilog=examples("roles push roles.json ORG/NAME --report stability.json"))(hub.push)
