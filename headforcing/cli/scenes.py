"""`headforcing scenes`: many prompts in one video, with scenes that return."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from headforcing.cli.console import AsJson, clean_errors, examples, print_report, progress, require
from headforcing.cli.early import check_out, check_preset, check_prompt

EXAMPLES = examples(
    "scenes --out runs/scenes",
    'scenes --prompts "day summer balloon red car blue" --prompts "night winter calm bus yellow" '
    '--prompts "day summer balloon red car blue"',
    "scenes --preset streaming_llm --json",
)
DRAWING = ("PIL", "imageio_ffmpeg", "matplotlib")


@dataclass(frozen=True)
class Options:
    """The options of the command."""

    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help='The prompt of one scene, such as "day summer calm car blue"; repeat it for every scene. '
            "A repeated prompt is a scene that returns. [default: six scenes, A B C A D B]"
        ),
    ] = None
    chunks: Annotated[int, typer.Option(min=2, max=200, help="Chunks of 3 frames per scene.")] = 8
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0
    out: Annotated[Path, typer.Option(help="Folder for the files, made if missing.")] = Path(
        "headforcing-scenes"
    )
    roles: Annotated[Path | None, typer.Option(help="Role-map file. [default: in the package]")] = None
    preset: Annotated[
        str | None, typer.Option(help="A preset instead of a role map; `headforcing presets` lists them.")
    ] = None
    as_json: AsJson = False


def scenes(options: Options) -> None:
    """Generate one video with many prompts in every mode of prompt switching, and compare how scenes return.

    Every scene is marked at its end; when its prompt comes again, it is recalled. The same video with cut,
    smooth and continue everywhere, from the same noise, serves as comparison. Writes a video, a contact
    sheet, a timeline of the frames that heads store, and a report. Runs on the CPU in about half a minute,
    without any download.
    """
    require(DRAWING, "demo", "this command")
    with clean_errors():
        check_preset(options.preset)
        for prompt in options.prompts or ():
            check_prompt(prompt)
        check_out(options.out)
        from headforcing.demo.scenes.run import PROMPTS
        from headforcing.demo.scenes.show import Request, show_scenes

        request = Request(
            prompts=tuple(options.prompts or PROMPTS),
            chunks=options.chunks,
            seed=options.seed,
            out=options.out,
            roles=options.roles,
            preset=options.preset,
        )
        with progress(quiet=options.as_json) as tell:
            report = show_scenes(request, tell)
    print_report(report, options.as_json)
