"""Many prompts in one video, from prompts to files: every mode, the numbers and the pictures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from headforcing.demo.model.model import DemoModel
from headforcing.demo.scenes.draw import SIZE, Tale, draw_sheet, draw_video
from headforcing.demo.scenes.run import (
    MODES,
    PROMPTS,
    Found,
    Played,
    Script,
    alike,
    background,
    measure,
    play,
)
from headforcing.demo.scenes.timeline import draw_modes, draw_timeline
from headforcing.demo.show import show
from headforcing.demo.show.files import check_folder, replace_file, write_mp4
from headforcing.demo.show.report import RoleRow, describe
from headforcing.demo.show.story import Held, Pixels, pixels
from headforcing.roles.maps.role_map import RoleMap

REPORT = "scenes.json"
FILES = ("scenes.mp4", "scenes_sheet.png", "timeline.png", "modes.png", REPORT)
MADE_BY = "headforcing scenes"


@dataclass(frozen=True)
class Request:
    """The options of the command.

    Attributes:
        prompts: one per scene.
        chunks: of each scene.
        seed: of the noise.
        out: folder for the files, created if missing.
        roles: role-map file; `None`: the one in the package.
        preset: name of a preset instead of a role map.
    """

    prompts: tuple[str, ...] = PROMPTS
    chunks: int = 8
    seed: int = 0
    out: Path = Path("headforcing-scenes")
    roles: Path | None = None
    preset: str | None = None


@dataclass(frozen=True)
class ModeRow:
    """The metrics of one mode; `None` if there is nothing to measure.

    Attributes:
        mode: the prompt switch between scenes.
        stored_bytes: keys, values and marks stored at the end.
        returned: correlation of a returning scene's town with its first appearance, mean; see `alike`.
        leaked: the same between scenes of different prompts, mean over all pairs.
        distance: returned minus leaked.
        halves: the same between the two halves of a scene, mean.
        actors: share of what should fly and drive that is recognised.
        at_once: the same in the first chunk of every scene but the first.
    """

    mode: str
    stored_bytes: int
    returned: float | None
    leaked: float | None
    distance: float | None
    halves: float | None
    actors: float | None
    at_once: float | None


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        prompts: one per scene.
        names: a letter per scene, the same for the same prompt.
        chunks: of each scene.
        frames: of each video.
        seed: of the noise.
        roles: stored frames, by role.
        modes: one row per mode.
        files: absolute paths of what was written.
    """

    prompts: tuple[str, ...]
    names: tuple[str, ...]
    chunks: int
    frames: int
    seed: int
    roles: tuple[RoleRow, ...]
    modes: tuple[ModeRow, ...]
    files: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def reading(self) -> str:
        """A summary of the numbers, with their limits."""
        known = [row for row in self.modes if row.distance is not None]
        found = "; ".join(
            f"{row.mode} {number(row.returned)} (return), {number(row.leaked)} (leak)" for row in known
        )
        return (
            f"Correlation of towns: {found or 'no scene returns, so nothing to compare'}. 1 is "
            "the same town, 0 an unrelated one. This is one video; docs/scenes-results.md has 16."
        )

    def table(self) -> Any:
        """The rows as a rich table."""
        from rich.table import Table

        title = f"{len(self.prompts)} scenes: {' '.join(self.names)}, {self.frames} frames, seed {self.seed}"
        table = Table(title=title, title_style="bold")
        for column in ("", "return", "leak", "distance", "within", "actors", "at once", "stored"):
            table.add_column(column, justify="right" if column else "left")
        for row in self.modes:
            values = (row.returned, row.leaked, row.distance, row.halves, row.actors, row.at_once)
            table.add_row(row.mode, *map(number, values), f"{row.stored_bytes / 1e6:.2f} MB")
        return table


def show_scenes(request: Request, progress: show.Progress = lambda *_: None) -> Report:
    """Generates the video in every mode, writes the files and returns the report.

    Raises:
        ValueError: a prompt, the length or a file is invalid.
        FileExistsError: the folder contains files of the same names that this command did not write.
    """
    script = Script(request.prompts, request.chunks)
    model = show.load_model(None)
    roles = show.find_roles(show.Request(roles=request.roles, preset=request.preset), model.config)
    check_folder(request.out, FILES, REPORT, MADE_BY)
    played = play_all(model, roles, script, request.seed, progress)
    found = [measure(each.video, script) for each in played]
    fitted = roles.fit(model.config.layers, model.config.heads, model.config.window, model.config.chunk)
    report = Report(
        prompts=script.prompts,
        names=script.names,
        chunks=script.chunks,
        frames=script.frames,
        seed=request.seed,
        roles=describe(fitted, model.config.chunk),
        modes=tuple(mode_row(*pair) for pair in zip(played, found, strict=True)),
        files=tuple(str((request.out / name).resolve()) for name in FILES),
    )
    who = "the demo's role map" if request.roles is None else request.roles.name
    write(request, report, played, f"preset {request.preset}" if request.preset else who, progress)
    return report


def play_all(
    model: DemoModel, roles: RoleMap, script: Script, seed: int, progress: show.Progress
) -> list[Played]:
    """The script in every mode, from the same noise."""
    total = len(script.prompts) * script.chunks
    played = []
    for mode in MODES:

        def tell(index: int, _: Tensor, mode: str = mode) -> None:
            progress(mode, index + 1, total)

        played.append(play(model, roles, script, mode, [seed], tell))
    return played


def mode_row(played: Played, found: Found) -> ModeRow:
    """Means over the videos of a mode."""
    values = (found.returned, found.leaked, found.distance, found.halves, found.actors, found.at_once)
    means = [None if math.isnan(value) else value for value in (float(each.mean()) for each in values)]
    return ModeRow(played.mode, played.stored_bytes, *means)


def by_size(memories: Sequence[Held]) -> list[Held]:
    """The memories by size, the largest first."""
    return sorted(memories, key=lambda memory: -max(map(len, memory.held)))


def tale(report: Report, script: Script, played: Sequence[Played], who: str) -> Tale:
    """The content of the pictures."""
    found = {}
    for each in played:
        scenes = [background(each.video[:, :, script.judged(n)]) for n in range(len(script.prompts))]
        found[each.mode] = {n: float(alike(scenes[n], scenes[m])[0]) for n, m in script.returns.items()}
    return Tale(
        script,
        videos={each.mode: pixels(each.video[0]) for each in played},
        held={each.mode: by_size(each.memories)[0] for each in played},
        alike=found,
        summary={
            row.mode: f"return  {number(row.returned)}\nleak  {number(row.leaked)}" for row in report.modes
        },
        headline=f"{len(script.prompts)} prompts in one video",
        byline=f"{who} · seed {report.seed} · every mode from the same noise · 72 × 48 pixels, enlarged",
        fps=show.FPS,
    )


def summary(row: ModeRow) -> str:
    """The metrics of one mode as text, for the sheet."""
    return f"return {number(row.returned)}\nleak {number(row.leaked)}\nwithin {number(row.halves)}"


def timeline(script: Script, played: Played, who: str) -> Any:
    """The timeline of one mode, a matplotlib figure."""
    note = f"{who} · coloured by scene: stored frames; grey: current chunk"
    return draw_timeline(
        script,
        by_size(played.memories),
        f"Stored frames by role: mode {played.mode}",
        note,
        recalls=played.mode == "recall",
    )


def modes(script: Script, played: Sequence[Played]) -> Any:
    """The frames stored by the head with the largest memory in every mode, a matplotlib figure."""
    held = {f"mode {each.mode}": by_size(each.memories)[0] for each in played}
    who = by_size(played[0].memories)[0].name
    return draw_modes(script, held, f"Stored frames of one head in every mode: {who}")


def write(
    request: Request, report: Report, played: Sequence[Played], who: str, progress: show.Progress
) -> None:
    """Writes the files; the JSON report also has the stored frames, chunk by chunk."""
    script = Script(request.prompts, request.chunks)
    story, paths = tale(report, script, played, who), {name: request.out / name for name in FILES}
    held = {each.mode: {memory.name: memory.held for memory in each.memories} for each in played}
    document = json.dumps({"made_by": MADE_BY, **report.to_dict(), "stored_frames": held})

    def drawn() -> Iterable[Pixels]:
        for index, frame in enumerate(draw_video(story)):
            progress("drawing", index + 1, script.frames)
            yield frame

    replace_file(paths[REPORT], lambda path: path.write_text(document + "\n", "utf-8"))
    replace_file(paths["scenes.mp4"], lambda path: write_mp4(path, drawn(), SIZE, show.FPS))
    replace_file(paths["scenes_sheet.png"], lambda path: draw_sheet(story).save(path))
    replace_file(paths["timeline.png"], lambda path: timeline(script, played[0], who).savefig(path))
    replace_file(paths["modes.png"], lambda path: modes(script, played).savefig(path))


def number(value: float | None) -> str:
    """A number with two digits, or a dash."""
    return "-" if value is None else f"{value:.2f}".replace("-0.00", "0.00")
