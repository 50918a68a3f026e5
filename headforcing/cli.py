"""The command line: `headforcing demo`, `headforcing roles show`, `headforcing roles validate`.

Torch and the drawing libraries are imported inside the commands. Exit codes: 0 fine, 1 a file is not a
valid role map, 2 the command could not be carried out.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headforcing.errors import HeadForcingError

if TYPE_CHECKING:
    from headforcing.demo.report import Report
    from headforcing.demo.show import Request
    from headforcing.role_map import RoleMap
    from headforcing.roles import HeadRole

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
roles_app = typer.Typer(no_args_is_help=True, help="Look at role maps.")
app.add_typer(roles_app, name="roles")

DRAWING = ("PIL", "imageio_ffmpeg", "matplotlib")
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
WIDE = 8
"""With more heads than this, the role table shows initials."""

RoleFile = Annotated[Path, typer.Argument(metavar="FILE", help="A role-map file (JSON).", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


class Camera(str, Enum):
    """Cameras of the demo world."""

    still = "still"
    pan = "pan"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("headforcing"))
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Give every attention head of an autoregressive video model its own KV memory."""


@app.command()
def demo(
    prompt: Annotated[
        str | None,
        typer.Option(help='For example "sea clear fast disc red". [default: drawn from the seed]'),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, max=600.0, help="Length at 16 frames per second.")
    ] = 15.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the scene and the noise.")] = 0,
    camera: Annotated[Camera, typer.Option(help="Whether the camera moves.")] = Camera.pan,
    out: Annotated[Path, typer.Option(help="Folder for the files, made if missing.")] = Path(
        "headforcing-demo"
    ),
    weights: Annotated[
        Path | None, typer.Option(help="Weights of the demo model. [default: in the package]")
    ] = None,
    roles: Annotated[
        Path | None, typer.Option(help="Role-map file for them. [default: in the package]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make one long video twice, with a sliding window and with Head Forcing, and compare.

    Runs on the CPU in well under a minute, without any download.
    """
    _require_drawing()
    with _clean_errors():
        from headforcing.demo.show import Request

        request = Request(prompt, seconds, seed, camera.value, out, weights, roles)
        report = _run(request, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(report.table())
    console.print(report.reading(), markup=False, highlight=False, soft_wrap=True)
    for file in report.files:
        typer.echo(file)


@roles_app.command("show")
def show_roles(file: RoleFile, as_json: AsJson = False) -> None:
    """Show which head has which role, how many heads each role has, and where the map comes from."""
    with _clean_errors():
        from headforcing.role_map import RoleMap

        role_map = RoleMap.load(file)
    names = _names(role_map)
    if as_json:
        typer.echo(json.dumps(_summary(role_map, names), indent=2))
        return
    from rich.console import Console

    console = Console()
    for part in _role_tables(role_map, names):
        console.print(part)


@roles_app.command("validate")
def validate_roles(file: RoleFile, as_json: AsJson = False) -> None:
    """Check a role-map file; the exit code is 1 where it is not valid."""
    from headforcing.errors import RoleMapError
    from headforcing.role_map import RoleMap

    try:
        role_map = RoleMap.load(file)
    except RoleMapError as error:
        if as_json:
            typer.echo(json.dumps({"valid": False, "error": str(error)}))
        else:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps({"valid": True, **_summary(role_map, _names(role_map))}))
    else:
        layers, heads = role_map.shape
        typer.echo(f"{file}: valid, {layers} layers x {heads} heads, {len(role_map.counts())} roles")


def _require_drawing() -> None:
    missing = [name for name in DRAWING if importlib.util.find_spec(name) is None]
    if missing:
        typer.echo(f"error: the demo needs {', '.join(missing)}: pip install 'headforcing[demo]'", err=True)
        raise typer.Exit(2)


@contextmanager
def _clean_errors() -> Iterator[None]:
    """One message and exit code 2 instead of a traceback, for what a user can put right."""
    try:
        yield
    except (HeadForcingError, ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _run(request: Request, *, quiet: bool) -> Report:
    """The demo, with a progress bar on a terminal, plain lines in a pipe, or nothing."""
    from headforcing.demo.show import show

    if quiet:
        return show(request)
    if not sys.stderr.isatty():
        return show(request, _plain_lines())
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        return show(request, tell)


def _plain_lines() -> Callable[[str, int, int], None]:
    """Progress as four lines per stage."""

    def tell(stage: str, done: int, total: int) -> None:
        if done * 4 // total > (done - 1) * 4 // total:
            typer.echo(f"{stage}: {done}/{total}", err=True)

    return tell


def _names(role_map: RoleMap) -> dict[HeadRole, str]:
    """A short name per role: its type, numbered where a type appears with several numbers."""
    kinds = [type(role).__name__.lower() for role in role_map.counts()]
    names = {}
    for index, (role, kind) in enumerate(zip(role_map.counts(), kinds, strict=True)):
        number = kinds[: index + 1].count(kind) if kinds.count(kind) > 1 else ""
        names[role] = f"{kind}{number}"
    return names


def _summary(role_map: RoleMap, names: dict[HeadRole, str]) -> dict[str, Any]:
    layers, heads = role_map.shape
    return {
        "layers": layers,
        "heads": heads,
        "roles": {
            names[role]: {"heads": count, "role": str(role)} for role, count in role_map.counts().items()
        },
        "provenance": dict(role_map.provenance),
    }


def _role_tables(role_map: RoleMap, names: dict[HeadRole, str]) -> list[Any]:
    """The map, the counts and the provenance as rich tables."""
    from rich.table import Table
    from rich.text import Text

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


if __name__ == "__main__":
    app()
