"""The timeline of a video with many prompts: the frames stored by a head of every role, by scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headforcing.demo.scenes.run import Script
from headforcing.demo.show.plots import dress
from headforcing.demo.show.story import FAINT, FORCING, INK, PAPER, RULE, THIRD, WINDOW, Held
from headforcing.demo.world.camera import CHUNK

COLOURS = (FORCING, WINDOW, "#009E73", THIRD, "#F0E442", "#D55E00", "#0072B2", "#ECEEF0")
"""Okabe and Ito's palette; scenes also have a letter, and a height of their own in the picture."""
TALL, LOW, HEAD = 3.0, 1.55, 1.5
"""Height in inches of the first panel, of the others, and of the header."""
MANY = 7
"""Largest number of scenes with prompts in the ribbon."""
FEW = 6
"""Largest number of stored frames that fits into a low panel."""


def scene_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for every scene's letter, in order of appearance."""
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(dict.fromkeys(names))}


def draw_timeline(script: Script, memories: Sequence[Held], title: str, note: str, recalls: bool) -> Any:
    """A matplotlib figure: time across, stored frames up, coloured by scene.

    Args:
        script: the scenes.
        memories: one panel each; a name for its title, and the stored frames chunk by chunk.
        title: the large line.
        note: the small line.
        recalls: whether returning scenes are recalled, which is drawn as an arrow.
    """
    from matplotlib.figure import Figure

    heights = [TALL if max(map(len, memory.held)) > FEW else LOW for memory in memories]
    size = (12.4, HEAD + sum(heights) + 0.36 * len(heights) + 0.75)
    figure = Figure(figsize=size, dpi=110, facecolor=PAPER)
    figure.text(0.065, 1 - 0.36 / size[1], title, color=INK, fontsize=15, fontweight="bold", va="center")
    figure.text(0.065, 1 - 0.64 / size[1], note, color=FAINT, fontsize=10, va="center")
    grid = figure.add_gridspec(
        1 + len(heights),
        1,
        height_ratios=[0.42, *heights],
        left=0.065,
        right=0.98,
        top=1 - (HEAD - 0.02) / size[1],
        bottom=0.5 / size[1],
        hspace=0.42 * (1 + len(heights)) / (0.42 + sum(heights)),
    )
    _ribbon(figure.add_subplot(grid[0]), script, recalls)
    for number, memory in enumerate(memories, 1):
        axes = figure.add_subplot(grid[number])
        _panel(axes, script, memory)
        last = number == len(memories)
        axes.set_xlabel("current frame" if last else "")
        axes.tick_params(labelbottom=last)
    return figure


def draw_modes(script: Script, memories: Mapping[str, Held], title: str) -> Any:
    """A matplotlib figure: the frames stored by one head in every mode, side by side.

    Args:
        script: the scenes.
        memories: the head's frames, by mode.
        title: the large line.
    """
    from matplotlib.figure import Figure

    rows = (len(memories) + 1) // 2
    size = (12.4, 1.0 + 3.0 * rows)
    figure = Figure(figsize=size, dpi=110, facecolor=PAPER)
    figure.text(0.055, 1 - 0.36 / size[1], title, color=INK, fontsize=15, fontweight="bold", va="center")
    grid = figure.add_gridspec(
        rows, 2, left=0.055, right=0.98, top=1 - 0.95 / size[1], bottom=0.5 / size[1], wspace=0.1, hspace=0.2
    )
    for number, (mode, memory) in enumerate(memories.items()):
        axes = figure.add_subplot(grid[number // 2, number % 2])
        _panel(axes, script, Held(mode, memory.held))
        below = number + 2 >= len(memories)
        axes.set_xlabel("current frame" if below else "")
        axes.set_ylabel("" if number % 2 else "stored frame")
        axes.tick_params(labelbottom=below)
    return figure


def _ribbon(axes: Any, script: Script, recalls: bool) -> None:
    """The scenes with their prompts, and arrows from marks to recalls."""
    colours, length = scene_colours(script.names), script.chunks * CHUNK
    axes.set(xlim=(0, script.frames), ylim=(0, 1))
    axes.axis("off")
    for scene, (name, prompt) in enumerate(zip(script.names, script.prompts, strict=True)):
        left = scene * length
        axes.axvspan(left + 0.15, left + length - 0.15, color=colours[name], lw=0)
        middle = left + length / 2
        axes.text(middle, 0.70, name, color=PAPER, fontsize=12, fontweight="bold", ha="center", va="center")
        text = prompt if len(script.prompts) <= MANY else ""
        axes.text(middle, 0.27, text, color=PAPER, fontsize=8, ha="center", va="center")
    ended: dict[str, int] = {}
    for scene, name in enumerate(script.names):
        if recalls and scene in script.returns:
            span, level = (ended[name] * length, scene * length), list(script.returns).index(scene) % 2
            _arrow(axes, span, 1.55 + 0.35 * level, name, colours[name])
        ended[name] = scene + 1


def _arrow(axes: Any, span: tuple[int, int], high: float, name: str, colour: str) -> None:
    """From a mark to where it is recalled, above the scenes."""
    start, end = span
    axes.plot([start, start, end], [1.0, high, high], color=colour, lw=1.6, clip_on=False)
    arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (end, 1.0), (end, high), arrowprops=arrow, annotation_clip=False)
    axes.text(start, 1.12, f"  mark {name}", color=colour, fontsize=9, va="bottom")
    axes.text(end, 1.12, f"recall {name}  ", color=colour, fontsize=9, ha="right", va="bottom")


def _panel(axes: Any, script: Script, memory: Held) -> None:
    """One head: a mark per frame and chunk, in the colour of its scene, at the height of its number."""
    from matplotlib.collections import PolyCollection

    colours, length = scene_colours(script.names), script.chunks * CHUNK
    for scene, name in enumerate(script.names):
        low = scene * length
        axes.axhspan(low, low + length, color=colours[name], alpha=0.07, lw=0)
        axes.text(-0.006 * script.frames, low + length / 2, name, color=colours[name], fontsize=10,
                  fontweight="bold", ha="right", va="center")  # fmt: skip
        if scene:
            axes.axvline(low, color=FAINT, lw=0.9, ls=(0, (3, 3)), zorder=1.5)
    own = [_cell(chunk, chunk * CHUNK, CHUNK) for chunk in range(len(memory.held))]
    axes.add_collection(PolyCollection(own, facecolor=RULE, lw=0))
    held = [(chunk, frame) for chunk, frames in enumerate(memory.held) for frame in frames]
    tints = [colours[script.names[script.scene_at(frame)]] for _, frame in held]
    cells = [_cell(chunk, frame, 1) for chunk, frame in held]
    marks = PolyCollection(cells, facecolor=tints, edgecolor=tints, lw=0.2, zorder=2)
    marks.set_gid("stored")
    axes.add_collection(marks)
    axes.set(xlim=(0, script.frames), ylim=(0, script.frames), yticks=[])
    axes.set_title(memory.name, color=INK, fontsize=11.5, loc="left", pad=5)
    axes.set_ylabel("stored frame", labelpad=18)
    dress(axes)
    axes.grid(visible=False)
    axes.set_xticks(range(0, script.frames + 1, length))


def _cell(chunk: int, low: int, height: int) -> list[tuple[float, float]]:
    left, right = chunk * CHUNK, (chunk + 1) * CHUNK
    return [(left, low), (right, low), (right, low + height), (left, low + height)]
