"""The pictures of a video with many prompts: two modes side by side, and a contact sheet of all modes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from headforcing.demo.scenes.run import Script
from headforcing.demo.scenes.timeline import scene_colours
from headforcing.demo.show.draw import enlarge, font
from headforcing.demo.show.story import FAINT, INK, PANEL, PAPER, RULE, Held, Pixels
from headforcing.demo.world.camera import CHUNK

SIZE = (1280, 720)
FRAME, TOP, LEFT, GAP = (360, 240), 112, 48, 52
BANDS = (640, 44)
"""Top and height of the row of scenes below the panels."""
CELL, SPACE, SHEET_LEFT, SHEET_TOP = (144, 96), 10, 224, 172
ROW = CELL[1] + 40
MANY = 7
"""With more scenes than this, the sheet has one column per scene instead of two."""
LIKENESS = "correlation of the town with the scene's first appearance; 1: the same, 0: unrelated"


@dataclass(frozen=True)
class Tale:
    """The content of the pictures.

    Attributes:
        script: the scenes.
        videos: `[T, 48, 72, 3]` by mode; the first two are shown side by side.
        held: frames stored by the head with the largest memory, by mode.
        alike: correlation of every returning scene with its first appearance, by mode.
        summary: the metrics as text, by mode.
        headline: the large line.
        byline: the small line.
        fps: frames per second.
    """

    script: Script
    videos: Mapping[str, Pixels]
    held: Mapping[str, Held]
    alike: Mapping[str, Mapping[int, float]]
    summary: Mapping[str, str]
    headline: str
    byline: str
    fps: int


def how_begun(script: Script, scene: int, mode: str) -> str:
    """The prompt switch at the beginning of a scene, as text."""
    if scene == 0:
        return "begins"
    if mode != "recall":
        return mode
    return f"recall {script.names[scene]}" if scene in script.returns else "cut"


def draw_video(tale: Tale) -> Iterator[Pixels]:
    """The frames of the video, `[720, 1280, 3]`: the first time, and the first two modes."""
    from PIL import ImageDraw

    script, modes = tale.script, list(tale.videos)[:2]
    stage, length = _stage(tale, modes), script.chunks * CHUNK
    colours = scene_colours(script.names)
    for frame in range(script.frames):
        image = stage.copy()
        draw, scene = ImageDraw.Draw(image), script.scene_at(frame)
        name, left = script.names[scene], LEFT
        colour = colours[name]
        if scene in script.returns:
            first = frame + (script.returns[scene] - scene) * length
            image.paste(enlarge(tale.videos[modes[0]][first], FRAME), (LEFT, TOP))
            draw.text(
                (LEFT, TOP + FRAME[1] + 24),
                f"scene {script.returns[scene] + 1}, frame {first}",
                FAINT,
                font(15),
                anchor="ls",
            )
        else:
            draw.rectangle([LEFT, TOP, LEFT + FRAME[0] - 1, TOP + FRAME[1] - 1], PANEL)
            centre = (LEFT + FRAME[0] // 2, TOP + FRAME[1] // 2)
            draw.text(centre, f"{name} is new", FAINT, font(20), anchor="mm")
        for mode in modes:
            left += FRAME[0] + GAP
            image.paste(enlarge(tale.videos[mode][frame], FRAME), (left, TOP))
            draw.rectangle(
                [left - 3, TOP - 3, left + FRAME[0] + 2, TOP + FRAME[1] + 2], outline=colour, width=3
            )
            _memory(draw, tale, mode, frame, left)
            begun = how_begun(script, scene, mode)
            draw.text((left + FRAME[0], TOP - 10), begun, colour, font(15, "bold"), anchor="rs")
        draw.text((LEFT, 610), name, colour, font(40, "bold"), anchor="ls")
        draw.text((LEFT + 44, 608), f"“{script.prompts[scene]}”", INK, font(24), anchor="ls")
        time = f"{frame / tale.fps:5.1f} s   frame {frame:3d}"
        draw.text((SIZE[0] - LEFT, 40), time, INK, font(22, "mono"), anchor="rs")
        now = LEFT + round((SIZE[0] - 2 * LEFT) * frame / (script.frames - 1))
        draw.line([(now, BANDS[0] - 8), (now, sum(BANDS) + 8)], INK, 3)
        yield np.asarray(image)


def draw_sheet(tale: Tale) -> Any:
    """The contact sheet, a Pillow image: a row per mode, one or two columns per scene."""
    from PIL import Image, ImageDraw

    script, length = tale.script, tale.script.chunks * CHUNK
    parts = (0.25, 0.92) if len(script.prompts) <= MANY else (0.92,)
    wide = len(parts) * (CELL[0] + SPACE)
    size = (SHEET_LEFT + len(script.prompts) * wide + 22, SHEET_TOP + len(tale.videos) * ROW + 30)
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((32, 44), tale.headline, INK, font(26, "bold"), anchor="ls")
    draw.text((32, 72), tale.byline, FAINT, font(16), anchor="ls")
    draw.text((32, size[1] - 16), LIKENESS, FAINT, font(14), anchor="ls")
    colours = scene_colours(script.names)
    for scene, name in enumerate(script.names):
        x, y = SHEET_LEFT + scene * wide, SHEET_TOP - 72
        draw.rectangle([x, y, x + wide - SPACE - 1, y + 52], colours[name])
        draw.text((x + 10, y + 26), name, PAPER, font(30, "bold"), anchor="lm")
        for number, words in enumerate(_lines(script.prompts[scene], len(parts))):
            draw.text((x + 44, y + 17 + 19 * number), words, PAPER, font(15), anchor="lm")
        for row, (mode, video) in enumerate(tale.videos.items()):
            top = SHEET_TOP + row * ROW
            for column, part in enumerate(parts):
                shown = video[scene * length + round(part * (length - 1))]
                image.paste(enlarge(shown, CELL), (x + column * (CELL[0] + SPACE), top))
            begun = how_begun(script, scene, mode)
            draw.text((x, top + CELL[1] + 18), begun, colours[name], font(14), anchor="ls")
            if scene in script.returns:
                text = f"corr. {tale.alike[mode][scene]:.2f}"
                right = x + wide - SPACE
                draw.text((right, top + CELL[1] + 18), text, INK, font(14, "mono"), anchor="rs")
    for row, mode in enumerate(tale.videos):
        top = SHEET_TOP + row * ROW
        draw.text((32, top + 36), mode, INK, font(20, "bold"), anchor="ls")
        for number, line in enumerate(tale.summary[mode].split("\n")):
            draw.text((32, top + 62 + 20 * number), line, FAINT, font(14), anchor="ls")
    return image


def _stage(tale: Tale, modes: list[str]) -> Any:
    """The parts of the video that do not change."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 40), tale.headline, INK, font(24, "bold"), anchor="ls")
    draw.text((LEFT, 66), tale.byline, FAINT, font(15), anchor="ls")
    for number, text in enumerate(("the first time", *(f"mode {mode}" for mode in modes))):
        left = LEFT + number * (FRAME[0] + GAP)
        draw.text((left - 2, TOP - 10), text, INK, font(16, "bold"), anchor="ls")
    colours, width = scene_colours(tale.script.names), SIZE[0] - 2 * LEFT
    each = width / len(tale.script.names)
    for scene, name in enumerate(tale.script.names):
        start = LEFT + scene * each
        draw.rectangle([start + 1, BANDS[0], start + each - 2, sum(BANDS)], colours[name])
        middle = (start + each / 2, BANDS[0] + BANDS[1] / 2)
        draw.text(middle, name, PAPER, font(22, "bold"), anchor="mm")
        draw.text((start + 8, BANDS[0] + 4), f"{scene + 1}", PAPER, font(14, "bold"), anchor="lt")
    return image


def _memory(draw: Any, tale: Tale, mode: str, frame: int, left: int) -> None:
    """The frames that one head stores now: a square per frame, with the number of its scene."""
    held, top = tale.held[mode], TOP + FRAME[1] + 36
    frames, colours = held.held[frame // CHUNK], scene_colours(tale.script.names)
    draw.text((left, top - 12), f"{held.name}: stored frames by scene", FAINT, font(15), anchor="ls")
    step = min(20.0, FRAME[0] / max(len(frames), 1))
    draw.rectangle([left, top, left + FRAME[0], top + 19], outline=RULE)
    for place, number in enumerate(frames):
        scene = tale.script.scene_at(number)
        x = left + place * step
        colour = colours[tale.script.names[scene]]
        draw.rectangle([x + (step > 4), top, x + step - 1, top + 19], colour)
        if step > 12:
            draw.text((x + step / 2, top + 10), f"{scene + 1}", PAPER, font(13, "bold"), anchor="mm")


def _lines(words: str, columns: int) -> list[str]:
    """A prompt in two lines, or none if there is no space."""
    parts = words.split()
    return [" ".join(parts[:2]), " ".join(parts[2:])] if columns > 1 else []
