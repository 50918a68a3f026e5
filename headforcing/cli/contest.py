"""`headforcing compare`: compare presets and role maps on the demo model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headforcing.cli.console import (
    AsJson,
    clean_errors,
    examples,
    print_json,
    print_parts,
    progress,
    require,
    say,
)
from headforcing.cli.demo import Camera
from headforcing.cli.early import check_entrant, check_out

if TYPE_CHECKING:
    from headforcing.demo.contest.contest import Contest, Result
    from headforcing.demo.contest.intervals import Interval

EXAMPLES = examples(
    "compare streaming_llm head_forcing memrope",
    "compare sliding_window my_roles.json --seeds 16 --camera still",
    "compare pyramid_forcing forcing_kv --equal-bytes --out contest",
)
DRAWING = ("PIL", "matplotlib")
NOTES = (
    "95 % bootstrap intervals; differences are paired by video, bold if significant. Frames are those a head "
    "stores and attends to in a long video, current chunk included; MB are of one video, from the tensors."
)
SAME = {
    "as many attended": "attended",
    "as many bytes": "bytes",
    "as many attended and bytes": "attended, bytes",
    "shuffled": "roles",
}
"""What a control has in common with its entrant."""
NO_DIFFERENCE = "no significant difference"
BEYOND = "\n* its positions leave the range that the model was trained on."


@dataclass(frozen=True)
class Options:
    """The options of the command."""

    names: Annotated[
        list[str],
        typer.Argument(
            metavar="PRESET...",
            help="Names of presets (see `headforcing presets`), or role-map files; the others are compared "
            "with the first.",
            show_default=False,
        ),
    ]
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of videos; scenes and noise are the same for all entrants.")
    ] = 8
    first_seed: Annotated[int, typer.Option(min=0, help="First seed; the others follow.")] = 0
    seconds: Annotated[float, typer.Option(min=0.0, max=600.0, help="Length at 16 frames per second.")] = 15.0
    camera: Annotated[Camera, typer.Option(help="Whether the camera moves.")] = Camera.pan
    equal_bytes: Annotated[
        bool,
        typer.Option(
            "--equal-bytes",
            help="Add controls for each: first and last frames for all heads (StreamingLLM), with as many "
            "attended frames and with as many stored bytes; and its own roles shuffled in each layer.",
        ),
    ] = False
    out: Annotated[Path, typer.Option(help="Folder for the files, made if missing.")] = Path(
        "headforcing-compare"
    )
    as_json: AsJson = False


def contest(options: Options) -> None:
    """Let presets and role maps continue the same videos on the demo model, and compare the results.

    Presets with several roles get labels measured on the demo model. Writes compare.json, the drift over time
    (compare-drift.png) and frames of the first video (compare-sheet.png); existing files are replaced.
    Runs on the CPU: 8 videos of 15 seconds take about half a minute per preset, and per control.
    """
    require(DRAWING, "demo", "comparing")
    with clean_errors():
        for name in options.names:
            check_entrant(name)
        check_out(options.out)
        from headforcing.demo import demo_model
        from headforcing.demo.contest.contest import Setting, compete
        from headforcing.demo.contest.entrants import entrant

        model = demo_model()
        entrants = [entrant(name, model.config) for name in options.names]
        seeds = tuple(range(options.first_seed, options.first_seed + options.seeds))
        setting = Setting(seeds, options.seconds, options.camera.value)
        options.out.mkdir(parents=True, exist_ok=True)
        with progress(quiet=options.as_json) as tell:
            found = compete(model, entrants, setting, with_controls=options.equal_bytes, progress=tell)
        files = _write(found, options.out)
    if options.as_json:
        print_json({**found.to_dict(), "files": files})
        return
    print_parts(*_tables(found), _reading(found))
    say("\n".join(files))


def _write(found: Contest, out: Path) -> list[str]:
    from headforcing.demo.contest.pictures import drift, sheet
    from headforcing.demo.show.files import replace_file

    paths = [out / name for name in ("compare.json", "compare-drift.png", "compare-sheet.png")]
    text = json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n"
    replace_file(paths[0], lambda path: path.write_text(text, "utf-8"))
    replace_file(paths[1], lambda path: drift(found).savefig(path))
    replace_file(paths[2], lambda path: sheet(found).save(path))
    return [str(path.resolve()) for path in paths]


def _tables(found: Contest) -> list[Any]:
    """The entrants, and their controls, if they were requested."""
    first, videos = found.entrants[0], len(found.setting.seeds)
    span = f"frames {found.late[0]}-{found.late[1]}, {videos} videos, camera {found.setting.camera}"
    title = f"late background PSNR in dB, {span}"
    main = _table(title, "stored, attended", "MB", "late", f"minus {first.entrant.name}")
    for result in found.entrants:
        name = result.entrant.name + ("" if result.entrant.bounded else " *")
        paired = "" if result is first else _difference(found.ahead(result, first))
        main.add_row(name, _frames(found, result), _megabytes(result), _late(found, result), paired)
    beyond = any(not result.entrant.bounded for result in found.entrants)
    parts: list[Any] = [main, NOTES + BEYOND * beyond]
    if len(found.results) > len(found.entrants):
        parts.append(_controls(found))
    return parts


def _controls(found: Contest) -> Any:
    """Every entrant with its controls below it."""
    table = _table("controls", "same", "MB", "late", "preset minus control")
    for result in found.entrants:
        if not found.controls_of(result):
            continue
        table.add_row(result.entrant.name, "", _megabytes(result), _late(found, result), "", style="bold")
        for control in found.controls_of(result):
            name = "  " + control.entrant.name.removeprefix(f"{result.entrant.name}, ")
            paired = _difference(found.ahead(result, control))
            table.add_row(
                name, SAME[control.entrant.kind], _megabytes(control), _late(found, control), paired
            )
        table.add_section()
    return table


def _table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _frames(found: Contest, result: Result) -> str:
    frames = (result.stored, result.attended)
    return ", ".join(f"{found.frames if count is None else count:.1f}" for count in frames)


def _megabytes(result: Result) -> str:
    return f"{result.stored_bytes / 1e6:.2f}"


def _late(found: Contest, result: Result) -> str:
    late = found.ended(result)
    return f"{late.mean:.1f} [{late.low:.1f}, {late.high:.1f}]" if late.count else "-"


def _difference(found: Interval) -> Any:
    """The difference, bold if it is significant."""
    from rich.text import Text

    from headforcing.demo.contest.contest import decided

    text = f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]" if found.count else "-"
    return Text(text, "bold" if decided(found) else "")


def _reading(found: Contest) -> str:
    """Which entrants are better or worse than the first, and the limits of that."""
    from headforcing.demo.contest.contest import ENOUGH, decided

    first, *others = found.entrants
    limits = "One small model in a synthetic world; intervals are over videos and uncorrected."
    if len(found.setting.seeds) < ENOUGH:
        return f"{len(found.setting.seeds)} videos are too few for a verdict: use {ENOUGH} or more. {limits}"
    groups: dict[str, list[str]] = {}
    for result in others:
        difference = found.ahead(result, first)
        word = "better" if difference.mean > 0 else "worse"
        groups.setdefault(word if decided(difference) else NO_DIFFERENCE, []).append(result.entrant.name)
    said = "; ".join(
        f"{word}: {', '.join(groups[word])}" for word in ("better", "worse", NO_DIFFERENCE) if word in groups
    )
    return f"{f'Compared with {first.entrant.name} by late PSNR: {said}. ' if said else ''}{limits}"
