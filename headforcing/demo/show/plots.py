"""The demo's plots: the curves below the video, and the frames stored by each role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headforcing.demo.show.story import (
    FAINT,
    INK,
    PANEL,
    PAPER,
    ROLE_COLOURS,
    RULE,
    WINDOW,
    Held,
    Pixels,
    Story,
)


def draw_curves(
    story: Story, size: tuple[int, int]
) -> tuple[Pixels, Pixels, tuple[float, float, float, float]]:
    """The curves in full and in dim colour, and the edges of their axes: left, right, top, bottom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures, edges = [], (0.0, 0.0, 0.0, 0.0)
    for strength in (1.0, 0.28):
        figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.0664, 0.20, 0.8961, 0.685))
        _plot_psnr(axes, story, strength)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        box = axes.get_window_extent()
        edges = (box.x0, box.x1, size[1] - box.y1, size[1] - box.y0)
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


def draw_memory(memories: Sequence[Held], chunk: int, title: str) -> Any:
    """A matplotlib figure: per role, the frames stored at every time."""
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
        axes.set(xlim=(0, end), ylim=(-0.025 * end, end), xlabel="current frame")
        axes.set_title(memory.name, color=colour, fontsize=11.5, loc="left", pad=8)
        dress(axes)
    panels[0].set_ylabel("stored frames")
    figure.subplots_adjust(left=0.62 / figure.get_figwidth(), right=0.985, top=0.78, bottom=0.14, wspace=0.08)
    return figure
