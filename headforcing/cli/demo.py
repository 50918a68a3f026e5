"""`headforcing demo`: one long video twice, compared."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from headforcing.cli.console import AsJson, clean_errors, examples, print_report, progress, require
from headforcing.cli.early import check_out, check_preset, check_prompt

EXAMPLES = examples(
    "demo --seconds 60",
    'demo --prompt "night winter balloon red bus blue" --camera still --out still',
    "demo --preset pyramid_forcing --out preset",
)
DRAWING = ("PIL", "imageio_ffmpeg", "matplotlib")


class Camera(str, Enum):
    """Cameras of the demo world."""

    still = "still"
    pan = "pan"


@dataclass(frozen=True)
class Options:
    """The options of the command."""

    prompt: Annotated[
        str | None, typer.Option(help='Such as "night winter calm bus blue". [default: drawn from the seed]')
    ] = None
    seconds: Annotated[float, typer.Option(min=0.0, max=600.0, help="Length at 16 frames per second.")] = 15.0
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scene and the noise.")] = 0
    camera: Annotated[Camera, typer.Option(help="Whether the camera moves.")] = Camera.pan
    out: Annotated[Path, typer.Option(help="Folder for the files, made if missing.")] = Path(
        "headforcing-demo"
    )
    weights: Annotated[
        Path | None, typer.Option(help="Weights of the demo model. [default: in the package]")
    ] = None
    roles: Annotated[
        Path | None, typer.Option(help="Role-map file for these weights. [default: in the package]")
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(
            help="A preset instead of a role map; `headforcing presets` lists them. A preset with several "
            "roles gets labels measured on the demo model."
        ),
    ] = None
    as_json: AsJson = False


def demo(options: Options) -> None:
    """Generate one long video twice, with a sliding window and with Head Forcing, and compare.

    With --preset, the preset replaces the measured role map. Runs on the CPU in well under a minute, without
    any download.
    """
    require(DRAWING, "demo", "the demo")
    with clean_errors():
        check_preset(options.preset)
        if options.prompt is not None:
            check_prompt(options.prompt)
        check_out(options.out)
        from headforcing.demo.show.show import Request, show

        request = Request(
            prompt=options.prompt,
            seconds=options.seconds,
            seed=options.seed,
            camera=options.camera.value,
            out=options.out,
            weights=options.weights,
            roles=options.roles,
            preset=options.preset,
        )
        with progress(quiet=options.as_json) as tell:
            report = show(request, tell)
    print_report(report, options.as_json)
