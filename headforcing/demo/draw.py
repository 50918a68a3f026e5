"""The pictures of the demo: video frames, contact sheet, curves and memory strips.

Pure drawing: numbers come in, pixels come out. Pillow and matplotlib are imported where they are
used, so that the module can be read without the extra `demo`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

# Okabe and Ito's palette, safe for colour-blind readers; the curves differ in dash as well.
TRUTH, WINDOW, FORCING, THIRD = "#E8E6DF", "#E69F00", "#56B4E9", "#CC79A7"
ROLE_COLOURS = (FORCING, "#009E73", THIRD, "#F0E442", "#D55E00", "#0072B2")
PAPER, PANEL, INK, FAINT, RULE = "#11151A", "#171C23", "#ECEEF0", "#98A1AC", "#343C47"

SIZE = (1280, 720)
SIDE, TOP, LEFT, GAP = 360, 112, 48, 52
CURVES = (0, 478, 1280, 242)
"""Left, top, width and height of the curves below the panels."""


@dataclass(frozen=True)
class Track:
    """One video of the comparison.

    Attributes:
        name: its caption.
        colour: of caption, frame and curve.
        video: `[T, 24, 24, 3]`.
        psnr: dB per frame, NaN where nothing is measured; `None` for the truth.
    """

    name: str
    colour: str
    video: Pixels
    psnr: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Story:
    """What the pictures tell: the tracks, and what they have in common.

    Attributes:
        tracks: the true world, then the policies.
        headline: the large line.
        byline: the small line.
        fps: frames per second.
        trained: frames of the training videos.
        given: first frames that every policy is shown.
    """

    tracks: tuple[Track, ...]
    headline: str
    byline: str
    fps: int
    trained: int
    given: int

    @property
    def frames(self) -> int:
        """Frames of the videos."""
        return len(self.tracks[0].video)


@dataclass(frozen=True)
class Memory:
    """What one head of a role holds over time.

    Attributes:
        name: the panel's title.
        held: per chunk, the frame numbers held when the chunk is made.
    """

    name: str
    held: tuple[tuple[int, ...], ...]


def draw_video(story: Story) -> Iterator[Pixels]:
    """The frames of the side-by-side video, `[720, 1280, 3]`, one by one."""
    from PIL import Image, ImageDraw

    stage = _stage(story)
    bright, dim, edges = _curves(story)
    for frame in range(story.frames):
        image = stage.copy()
        draw = ImageDraw.Draw(image)
        for index, track in enumerate(story.tracks):
            left = _panel_left(index)
            image.paste(enlarge(track.video[frame], SIDE), (left, TOP))
            if track.psnr is not None:
                text = "given" if frame < story.given else _decibel(track.psnr[frame])
                draw.text((left + SIDE + 2, TOP - 10), text, INK, _font(15, "mono"), anchor="rs")
        _counter(draw, story, frame)
        now = round(edges[0] + (edges[1] - edges[0]) * frame / max(story.frames - 1, 1))
        mixed = np.concatenate([bright[:, :now], dim[:, now:]], 1)
        image.paste(Image.fromarray(mixed), CURVES[:2])
        draw.line([(now, CURVES[1] + edges[2]), (now, CURVES[1] + edges[3])], INK, 2)
        yield np.asarray(image)


def draw_sheet(story: Story, columns: int = 12) -> Any:
    """The contact sheet, a Pillow image: a row per track, a column per time."""
    from PIL import Image, ImageDraw

    cell, gap, left, top, row = 132, 10, 208, 132, 166
    times = np.unique(np.linspace(0, story.frames - 1, columns).round().astype(int))
    tops = [top + index * row - 22 * bool(index) for index in range(len(story.tracks))]
    image = Image.new("RGB", (left + len(times) * (cell + gap) + 22, tops[-1] + row + 10), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((32, 44), story.headline, INK, _font(26, "bold"), anchor="ls")
    draw.text((32, 72), story.byline, FAINT, _font(16), anchor="ls")
    for column, frame in enumerate(times):
        x = left + column * (cell + gap)
        draw.text((x, top - 12), f"{frame / story.fps:.1f} s", INK, _font(17, "bold"), anchor="ls")
        draw.text((x + cell, top - 12), f"frame {frame}", FAINT, _font(13), anchor="rs")
        for track, y in zip(story.tracks, tops, strict=True):
            image.paste(enlarge(track.video[frame], cell), (x, y))
            if track.psnr is not None:
                text = "given" if frame < story.given else _decibel(track.psnr[frame])
                draw.text((x + cell, y + cell + 18), text, INK, _font(15, "mono"), anchor="rs")
    for track, y in zip(story.tracks, tops, strict=True):
        _row_label(draw, track, y, cell)
    after = int(np.searchsorted(times, story.trained))
    if 0 < after < len(times):
        x = left + after * (cell + gap) - gap // 2
        _dashes(draw, x, top - 46, image.height - 22)
        draw.text((x + 6, top - 36), "beyond the trained length", FAINT, _font(13), anchor="ls")
    return image


def enlarge(frame: Pixels, side: int) -> Any:
    """A frame as a square Pillow image, smoothly enlarged."""
    from PIL import Image

    return Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)


def _stage(story: Story) -> Any:
    """What never changes in the video: lines of text, captions, frames of the panels."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 40), story.headline, INK, _font(24, "bold"), anchor="ls")
    draw.text((LEFT, 66), story.byline, FAINT, _font(15), anchor="ls")
    for index, track in enumerate(story.tracks):
        left = _panel_left(index)
        draw.rectangle([left - 3, TOP - 3, left + SIDE + 2, TOP + SIDE + 2], track.colour)
        draw.text((left - 2, TOP - 10), track.name, track.colour, _font(15, "bold"), anchor="ls")
    return image


def _counter(draw: Any, story: Story, frame: int) -> None:
    right = SIZE[0] - LEFT
    time = f"{frame / story.fps:5.1f} s   frame {frame:3d}"
    draw.text((right, 40), time, INK, _font(22, "mono"), anchor="rs")
    if frame < story.given:
        note = "given to every model"
    elif frame < story.trained:
        note = "inside the trained length"
    else:
        note = f"{(frame + 1) / story.trained:.1f} x the trained length"
    draw.text((right, 66), note, FAINT, _font(15), anchor="rs")


def _curves(story: Story) -> tuple[Pixels, Pixels, tuple[float, float, float, float]]:
    """The curves in full and in dim colour, and the edges of their axes: left, right, top, bottom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures, edges = [], (0.0, 0.0, 0.0, 0.0)
    for strength in (1.0, 0.28):
        figure = Figure(figsize=(CURVES[2] / 100, CURVES[3] / 100), dpi=100, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.0664, 0.20, 0.8961, 0.685))
        _plot_psnr(axes, story, strength)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        box = axes.get_window_extent()
        edges = (box.x0, box.x1, CURVES[3] - box.y1, CURVES[3] - box.y0)
    return pictures[0], pictures[1], edges


def _plot_psnr(axes: Any, story: Story, strength: float) -> None:
    tracks = [track for track in story.tracks if track.psnr is not None]
    values = np.concatenate([np.asarray(track.psnr)[story.given :] for track in tracks])
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if len(known) else (10.0, 40.0)
    axes.set_ylim(5 * np.floor((low - 1) / 5), 5 * np.ceil((high + 2) / 5))
    axes.set_xlim(0, max(story.frames - 1, 1))
    axes.axvspan(0, story.trained, color="#FFFFFF", alpha=0.06, lw=0)
    axes.axvline(story.trained, color=FAINT, lw=1.2, ls=(0, (4, 3)))
    axes.annotate(
        f"trained length ends ({story.trained} frames)",
        (story.trained, axes.get_ylim()[0]),
        (6, 6),
        textcoords="offset points",
        color=FAINT,
        fontsize=10.5,
    )
    for index, track in enumerate(tracks):
        shown = np.where(np.arange(story.frames) < story.given, np.nan, np.asarray(track.psnr))
        style = "-" if index else (0, (5, 1.2))
        axes.plot(shown, color=track.colour, lw=2.4, ls=style, alpha=strength)
        axes.plot([], [], color=track.colour, lw=2.4, ls=style, label=track.name)
    axes.set_xlabel(f"frame ({story.fps} per second)", labelpad=2)
    axes.set_ylabel("background PSNR (dB)")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.005, 0.97), ncols=2, frameon=False, labelcolor=INK, fontsize=10
    )
    dress(axes)


def dress(axes: Any) -> None:
    """Gives axes the look of the demo."""
    axes.set_facecolor(PANEL)
    axes.grid(color=RULE, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=10, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=FAINT, fontsize=10.5)


def draw_memory(memories: Sequence[Memory], chunk: int, title: str) -> Any:
    """Who remembers what, a matplotlib figure: per role, the frames held at every time."""
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    count = len(memories)
    figure = Figure(figsize=(1.2 + 3.1 * count, 4.2), dpi=110, facecolor=PAPER)
    figure.text(0.012, 0.93, title, color=INK, fontsize=14, fontweight="bold")
    end = max(len(memory.held) for memory in memories) * chunk
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for index, (axes, memory) in enumerate(zip(panels, memories, strict=True)):
        colour = WINDOW if index == 0 else ROLE_COLOURS[(index - 1) % len(ROLE_COLOURS)]
        cells = [
            [(time * chunk, frame), (time * chunk, frame + 1), (left, frame + 1), (left, frame)]
            for time, held in enumerate(memory.held)
            for left in [(time + 1) * chunk]
            for frame in held
        ]
        axes.add_collection(PolyCollection(cells, facecolor=colour, edgecolor=colour, lw=0.6))
        axes.plot([0, end], [0, end], color=FAINT, lw=1, ls=(0, (2, 2)))
        axes.set(xlim=(0, end), ylim=(-0.025 * end, end), xlabel="frame being made")
        axes.set_title(memory.name, color=colour, fontsize=11.5, loc="left", pad=8)
        dress(axes)
    panels[0].set_ylabel("frames remembered")
    figure.subplots_adjust(left=0.62 / figure.get_figwidth(), right=0.985, top=0.78, bottom=0.14, wspace=0.08)
    return figure


def _panel_left(index: int) -> int:
    return LEFT + index * (SIDE + GAP)


def _row_label(draw: Any, track: Track, top: int, cell: int) -> None:
    words, lines = track.name.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 14:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    for number, line in enumerate(lines):
        y = top + cell // 2 + 22 * number - 11 * len(lines) + 16
        draw.text((32, y), line, track.colour, _font(17, "bold"), anchor="ls")


def _dashes(draw: Any, x: int, top: int, bottom: int) -> None:
    for y in range(top, bottom, 10):
        draw.line([(x, y), (x, min(y + 5, bottom))], FAINT, 1)


def _decibel(value: float) -> str:
    return f"{value:.1f} dB" if np.isfinite(value) else "no measure"


@cache
def _font(size: int, face: str = "plain") -> Any:
    """DejaVu Sans in a size, from the copy that matplotlib brings along."""
    import matplotlib
    from PIL import ImageFont

    file = {"plain": "DejaVuSans", "bold": "DejaVuSans-Bold", "mono": "DejaVuSansMono-Bold"}[face]
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{file}.ttf")), size)
