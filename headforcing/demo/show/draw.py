"""The pictures of the demo: the frames of the side-by-side video, and the contact sheet.

Pure drawing: numbers come in, pixels come out. Pillow and matplotlib are imported where they are
used, so that the module can be read without the extra `demo`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from headforcing.demo.show.plots import draw_curves
from headforcing.demo.show.story import (
    FAINT,
    INK,
    PAPER,
    ROLE_COLOURS,
    RULE,
    TRUTH,
    WINDOW,
    Held,
    Pixels,
    Story,
    Track,
)

SIZE = (1280, 720)
PANEL, TOP, LEFT, GAP = (360, 240), 112, 48, 52
CURVES = (0, 376, 1280, 344)
"""Left, top, width and height of the curves below the panels."""
CELL = (180, 120)
"""Width and height of a frame on the contact sheet."""


def draw_video(story: Story) -> Iterator[Pixels]:
    """The frames of the side-by-side video, `[720, 1280, 3]`, one by one."""
    from PIL import Image, ImageDraw

    stage = _stage(story)
    bright, dim, edges = draw_curves(story, CURVES[2:])
    for frame in range(story.frames):
        image = stage.copy()
        draw = ImageDraw.Draw(image)
        for index, track in enumerate(story.tracks):
            left = _panel_left(index)
            image.paste(enlarge(track.video[frame], PANEL), (left, TOP))
            if track.psnr is not None:
                text = "given" if frame < story.given else _decibel(track.psnr[frame])
                draw.text((left + PANEL[0] + 2, TOP - 10), text, INK, font(15, "mono"), anchor="rs")
        _counter(draw, story, frame)
        _camera(draw, story, frame)
        now = round(edges[0] + (edges[1] - edges[0]) * frame / max(story.frames - 1, 1))
        mixed = np.concatenate([bright[:, :now], dim[:, now:]], 1)
        image.paste(Image.fromarray(mixed), CURVES[:2])
        draw.line([(now, CURVES[1] + edges[2]), (now, CURVES[1] + edges[3])], INK, 2)
        yield np.asarray(image)


def draw_sheet(story: Story, columns: int = 9) -> Any:
    """The contact sheet, a Pillow image: a row per track, a column per time."""
    from PIL import Image, ImageDraw

    (cell, high), gap, left, top = CELL, 10, 208, 132
    row = high + 34
    times = np.unique(np.linspace(0, story.frames - 1, columns).round().astype(int))
    tops = [top + index * row - 22 * bool(index) for index in range(len(story.tracks))]
    image = Image.new("RGB", (left + len(times) * (cell + gap) + 22, tops[-1] + row + 10), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((32, 44), story.headline, INK, font(26, "bold"), anchor="ls")
    draw.text((32, 72), story.byline, FAINT, font(16), anchor="ls")
    for column, frame in enumerate(times):
        x = left + column * (cell + gap)
        draw.text((x, top - 12), f"{frame / story.fps:.1f} s", INK, font(17, "bold"), anchor="ls")
        draw.text((x + cell, top - 12), f"frame {frame}", FAINT, font(13), anchor="rs")
        for track, y in zip(story.tracks, tops, strict=True):
            image.paste(enlarge(track.video[frame], CELL), (x, y))
            if track.psnr is not None:
                text = "given" if frame < story.given else _decibel(track.psnr[frame])
                draw.text((x + cell, y + high + 18), text, INK, font(15, "mono"), anchor="rs")
    for track, y in zip(story.tracks, tops, strict=True):
        _row_label(draw, track, y, high)
    after = int(np.searchsorted(times, story.trained))
    if 0 < after < len(times):
        x = left + after * (cell + gap) - gap // 2
        _dashes(draw, x, top - 46, image.height - 22)
        draw.text((x + 6, top - 36), "beyond the trained length", FAINT, font(13), anchor="ls")
    return image


def draw_strip(memories: Sequence[Held], video: Pixels, title: str) -> Any:
    """The frames that one head of every role stores at the end, a Pillow image: a row of pictures each.

    Args:
        memories: one row each.
        video: `[T, 48, 72, 3]`, from which the frames are taken.
        title: the large line.
    """
    from PIL import Image, ImageDraw

    (high, wide), gap, left, top = video.shape[1:3], 6, 32, 76
    row = high + 62
    most = max(len(memory.held[-1]) for memory in memories)
    image = Image.new("RGB", (2 * left + most * (wide + gap), top + len(memories) * row), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((left, 40), title, INK, font(22, "bold"), anchor="ls")
    for number, memory in enumerate(memories):
        y = top + number * row
        colour = ROLE_COLOURS[(number - 1) % len(ROLE_COLOURS)] if number else WINDOW
        draw.text((left, y + 12), memory.name, colour, font(16, "bold"), anchor="ls")
        for place, frame in enumerate(memory.held[-1]):
            x = left + place * (wide + gap)
            image.paste(Image.fromarray(video[frame]), (x, y + 20))
            draw.text((x + wide // 2, y + high + 24), str(frame), FAINT, font(12), anchor="mt")
    return image


def enlarge(frame: Pixels, size: tuple[int, int]) -> Any:
    """A frame as a Pillow image of a width and height, pixel by pixel."""
    from PIL import Image

    return Image.fromarray(frame).resize(size, Image.Resampling.NEAREST)


def _stage(story: Story) -> Any:
    """The parts of the video that do not change: text, captions, frames of the panels."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 40), story.headline, INK, font(24, "bold"), anchor="ls")
    draw.text((LEFT, 66), story.byline, FAINT, font(15), anchor="ls")
    for index, track in enumerate(story.tracks):
        left = _panel_left(index)
        draw.rectangle([left - 3, TOP - 3, left + PANEL[0] + 2, TOP + PANEL[1] + 2], track.colour)
        draw.text((left - 2, TOP - 10), track.name, track.colour, font(15, "bold"), anchor="ls")
    return image


def _counter(draw: Any, story: Story, frame: int) -> None:
    right = SIZE[0] - LEFT
    time = f"{frame / story.fps:5.1f} s   frame {frame:3d}"
    draw.text((right, 40), time, INK, font(22, "mono"), anchor="rs")
    if frame < story.given:
        note = "given frames"
    elif frame < story.trained:
        note = "inside the trained length"
    else:
        note = f"{(frame + 1) / story.trained:.1f} × the trained length"
    draw.text((right, 66), note, FAINT, font(15), anchor="rs")


def _camera(draw: Any, story: Story, frame: int) -> None:
    """The position of the view in the town, above the ground truth."""
    if story.camera is None:
        return
    width, height = 120, 10
    left, top = _panel_left(0) + PANEL[0] + 2 - width, TOP - 21
    draw.text((left - 8, top + height), "view", FAINT, font(13), anchor="rs")
    draw.rectangle([left, top, left + width, top + height], outline=RULE)
    start = left + round(width * float(story.camera[frame]))
    draw.rectangle([start, top, start + round(width * story.view), top + height], TRUTH)


def _panel_left(index: int) -> int:
    return LEFT + index * (PANEL[0] + GAP)


def _row_label(draw: Any, track: Track, top: int, high: int) -> None:
    words, lines = track.name.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 14:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    for number, line in enumerate(lines):
        y = top + high // 2 + 22 * number - 11 * len(lines) + 16
        draw.text((32, y), line, track.colour, font(17, "bold"), anchor="ls")


def _dashes(draw: Any, x: int, top: int, bottom: int) -> None:
    for y in range(top, bottom, 10):
        draw.line([(x, y), (x, min(y + 5, bottom))], FAINT, 1)


def _decibel(value: float) -> str:
    return f"{value:.1f} dB" if np.isfinite(value) else "not measured"


@cache
def font(size: int, face: str = "plain") -> Any:
    """DejaVu Sans in a size, from matplotlib's copy."""
    import matplotlib
    from PIL import ImageFont

    file = {"plain": "DejaVuSans", "bold": "DejaVuSans-Bold", "mono": "DejaVuSansMono-Bold"}[face]
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{file}.ttf")), size)
