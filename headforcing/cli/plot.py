"""`headforcing roles plot`: pictures of role maps and profiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headforcing.cli.console import AsJson, clean_errors, print_json, require, say
from headforcing.errors import OptionError

if TYPE_CHECKING:
    from headforcing.measure.profile import HeadProfile
    from headforcing.roles.maps.role_map import RoleMap

DRAWING = ("matplotlib",)
PROFILE = ".safetensors"


class Kind(str, Enum):
    """File formats."""

    svg = "svg"
    png = "png"


def plot(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Role maps (JSON) or profiles (.safetensors).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pictures, created if missing.")] = Path("plots"),
    kind: Annotated[Kind, typer.Option("--format", help="File format.")] = Kind.svg,
    profile: Annotated[
        Path | None, typer.Option(help="A profile: plot what the heads of every role attend to.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Plot role maps: the heads, the layers, and the stored frames.

    With a profile, also attention by age of the frame, and its three shares. Pictures are named after their
    input file; existing ones of the same name are replaced.
    """
    require(DRAWING, "plot", "drawing")
    with clean_errors():
        names = [file.stem for file in files]
        if len(set(names)) < len(names):
            raise OptionError(
                f"two files have the same name: {', '.join(sorted(names))}; plot them one by one"
            )
        from headforcing.measure.profile import HeadProfile

        measured = None if profile is None else HeadProfile.load(profile)
        pictures = {
            f"{file.stem}-{name}": picture for file in files for name, picture in _pictures(file, measured)
        }
        out.mkdir(parents=True, exist_ok=True)
        written = [_save(picture, out / f"{name}.{kind.value}") for name, picture in pictures.items()]
    if as_json:
        print_json({"files": written})
    else:
        say("\n".join(written))


def _pictures(file: Path, profile: HeadProfile | None) -> Iterator[tuple[str, Any]]:
    """Every picture of a role map or of a profile, by name."""
    from headforcing.measure.profile import HeadProfile
    from headforcing.roles.maps.role_map import RoleMap

    if file.suffix != PROFILE:
        yield from _of_map(RoleMap.load(file), profile)
        return
    found = HeadProfile.load(file)
    layers, heads = found.shape
    yield from _of_profile(found, (("all heads",) * heads,) * layers)


def _of_map(role_map: RoleMap, profile: HeadProfile | None) -> Iterator[tuple[str, Any]]:
    from headforcing.measure import plots

    yield "head-map", plots.head_map(role_map)
    yield "roles-per-layer", plots.roles_per_layer(role_map)
    model = role_map.origin.model if profile is None else profile.facts.model
    if model is None:
        say("stored frames: not plotted, the map does not name its model; pass --profile", err=True)
    else:
        chunks = 2 * model.window // model.chunk
        yield "frames-kept", plots.frames_kept(role_map, model.window, model.chunk, chunks)[0]
    if profile is not None:
        yield from _of_profile(profile, role_map)


def _of_profile(profile: HeadProfile, roles: Any) -> Iterator[tuple[str, Any]]:
    from headforcing.measure import plots

    yield "mass-by-age", plots.mass_by_age(profile, roles)
    yield "mass-scatter", plots.mass_scatter(profile, roles)


def _save(picture: Any, path: Path) -> str:
    """Saves a picture without a date, so that the same data gives the same file."""
    dated = {"Date": None} if path.suffix == ".svg" else None
    picture.figure.savefig(path, metadata=dated)
    return os.fspath(path)
