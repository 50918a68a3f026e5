"""Which frames each role stores while a video grows, and at which RoPE positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headforcing.errors import RoleMapError
from headforcing.measure.plots import style
from headforcing.roles import HeadRole
from headforcing.roles.maps.role_map import RoleMap
from headforcing.stores.compressed import CompressedHistories
from headforcing.types import FrameTable, Selection

OWN = "#C9C9C9"
CHOSEN = "chosen by content"


@dataclass(frozen=True)
class Kept:
    """The frames of a role when a chunk begins.

    Attributes:
        start: first frame of the chunk.
        frames: stored frames, `None` for those selected by content.
        candidates: the frames among which content selects, `[first, last)`.
        positions: RoPE position of every stored frame, current chunk last; empty for a role that differs per
            query frame.
    """

    start: int
    frames: tuple[int | None, ...]
    candidates: tuple[int, int]
    positions: tuple[int, ...]

    @property
    def chosen(self) -> int:
        """Number of frames selected by content."""
        return self.frames.count(None)


def frames_kept(
    roles: RoleMap | Mapping[str, HeadRole], window: int, chunk: int, chunks: int, ax: Any = None
) -> Any:
    """One panel per role: the frames it stores at every chunk, and their RoPE positions at the end.

    The roles are called as a store calls them. If frames are selected by content, the candidates are hatched,
    with the number of those selected.

    Args:
        roles: a role map, or roles by name.
        window: frames the model was trained on.
        chunk: frames of a chunk.
        chunks: chunks of the video.
        ax: axes to draw on, one per role; default: those of a new figure.

    Returns:
        An array of axes, one per role.

    Raises:
        RoleMapError: there is nothing to draw, or the number of axes differs from that of roles.
        WindowError: a role does not fit the window.
    """
    named = _named(roles)
    if not named or chunks < 1:
        raise RoleMapError(f"{len(named)} roles and {chunks} chunks: expected at least one of each")
    if ax is None:
        width, height = 0.55 + 2.15 * len(named), 2.75
        panels = style.new_figure(width, height).subplots(1, len(named), sharey=True, squeeze=False)[0]
    else:
        panels = np.atleast_1d(np.asarray(ax, dtype=object))
    if panels.shape != (len(named),):
        raise RoleMapError(f"ax has {list(panels.shape)} axes: expected one for each of {', '.join(named)}")
    colours = style.role_colours(named)
    for number, (name, panel) in enumerate(zip(named, panels, strict=True)):
        role = named[name].fit(window, chunk)
        kept = list(simulate(role, window, chunk, chunks))
        _panel(panel, kept, chunk, colours[name])
        _positions(panel, kept[-1], chunk, window, colours[name])
        panel.set_title(name, loc="left", fontweight="bold", fontsize=style.TEXT, color=style.INK)
        panel.set_title(f"{len(kept[-1].frames)} at the end", loc="right", fontsize=7, color=style.FAINT)
        panel.set_xlabel("current frame")
        panel.set_ylabel("" if number else "stored frame")
        style.dress(panel)
    _name_own(panels[0], chunk * chunks)
    return panels


def simulate(role: HeadRole, window: int, chunk: int, chunks: int) -> Iterator[Kept]:
    """The stored frames of a role, chunk by chunk, without a model.

    Args:
        role: a role whose numbers are filled in.
        window: frames the model was trained on.
        chunk: frames of a chunk.
        chunks: chunks of the video.
    """
    known: tuple[int | None, ...] = ()
    compressed = CompressedHistories([role], 0)
    for start in range(0, chunk * chunks, chunk):
        table = FrameTable(known, min(chunk, start), chunk, _blank, start, gap=compressed.gap(role))
        kept = role.retain(table)
        chosen = kept if isinstance(kept, Selection) else Selection(tuple(kept))
        compressed.evicted(role, chosen, table, lambda rows: (_blank(rows), _blank(rows)), None)
        frames = chosen.frames(table)
        own = tuple(range(start, start + chunk))
        together = "query" not in role.depends_on  # otherwise positions differ per query frame
        positions = role.positions_of((*frames, *own), chunk, window) if together else ()
        yield Kept(start, frames, _between(frames, start), positions)
        known = (*frames, *own)


def _blank(rows: Sequence[int]) -> Tensor:
    """Constant keys: the number of selected frames does not depend on them, and only that is drawn."""
    return torch.ones(1, len(rows), 1, 1, 1)


def _between(frames: Sequence[int | None], start: int) -> tuple[int, int]:
    """The candidates of selected frames: between the known frames before and after them."""
    if None not in frames:
        return start, start
    first = frames.index(None)
    last = len(frames) - frames[::-1].index(None)
    before = [frame for frame in frames[:first] if frame is not None]
    after = [frame for frame in frames[last:] if frame is not None]
    return (before[-1] + 1 if before else 0), (after[0] if after else start)


def _named(roles: RoleMap | Mapping[str, HeadRole]) -> dict[str, HeadRole]:
    """Roles by name, in the order of legends."""
    if isinstance(roles, RoleMap):
        roles = roles.named()
    return {name: roles[name] for name in style.ordered(roles)}


def _panel(ax: Any, kept: Sequence[Kept], chunk: int, colour: str) -> None:
    """Time across, frames up: stored frames in colour, the current chunk grey, candidates hatched."""
    from matplotlib.collections import PolyCollection

    end = len(kept) * chunk
    cells = [_box(at.start, frame, chunk, 1) for at in kept for frame in at.frames if frame is not None]
    own = [_box(at.start, at.start, chunk, chunk) for at in kept]
    among = [
        _box(at.start, at.candidates[0], chunk, at.candidates[1] - at.candidates[0])
        for at in kept
        if at.chosen
    ]
    ax.add_collection(PolyCollection(cells, facecolor=colour, lw=0, label="stored"))
    ax.add_collection(PolyCollection(own, facecolor=OWN, lw=0, label="current chunk"))
    hatched = PolyCollection(among, facecolor=style.pale(colour, 0.85), lw=0, label=CHOSEN)
    hatched.set(hatch="////", edgecolor=style.pale(colour, 0.45))
    ax.add_collection(hatched)
    if among:
        low, high = kept[-1].candidates
        note = f"{kept[-1].chosen} of these,\n{CHOSEN}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.9}
        ax.text(
            end * 0.97,
            low + 0.2 * (high - low),
            note,
            fontsize=7,
            ha="right",
            va="center",
            color=style.INK,
            bbox=box,
        )
    ax.set(xlim=(0, end), ylim=(0, end), xticks=_quarter(end), yticks=_quarter(end))


def _name_own(ax: Any, end: int) -> None:
    """Labels the grey cells along the diagonal."""
    turned = {"rotation": 45, "rotation_mode": "anchor", "transform_rotates_text": True}
    middle = 0.36 * end
    ax.text(middle, middle + 0.07 * end, "current chunk", fontsize=7, color=style.FAINT, **turned)


def _quarter(end: int) -> list[int]:
    """About four round numbers up to the end."""
    step = style.ticks(end)[-1] // (len(style.ticks(end)) - 1) if end > 1 else 1
    return list(range(0, end + 1, step * 2 if end > 5 * step else step))


def _box(left: float, low: float, width: float, height: float) -> list[tuple[float, float]]:
    return [(left, low), (left + width, low), (left + width, low + height), (left, low + height)]


def _positions(ax: Any, last: Kept, chunk: int, window: int, colour: str) -> None:
    """A strip with the RoPE positions of the last chunk, in the empty corner of future frames."""
    from matplotlib.collections import PolyCollection

    if not last.positions:
        return
    reach = max(last.positions) + 1
    strip = ax.inset_axes((0.07, 0.84, 0.5, 0.055))
    colours = [colour if frame is not None else style.pale(colour, 0.6) for frame in last.frames]
    cells = [_box(position, 0, 1, 1) for position in last.positions]
    shown = PolyCollection(
        cells, facecolor=[*colours, *[OWN] * chunk], edgecolor="white", lw=0.3 * (reach <= 48)
    )
    shown.set_gid("positions")
    strip.add_collection(shown)
    strip.set(xlim=(0, max(window, reach)), ylim=(0, 1), yticks=[], xticks=[0, max(window, reach)])
    strip.tick_params(labelsize=7, length=1.5, width=0.5, pad=1, colors=style.FAINT)
    for spine in strip.spines.values():
        spine.set(linewidth=0.5, color=style.FAINT)
    strip.set_title("RoPE positions at the end", fontsize=7, color=style.INK, pad=2, loc="left")
    if reach > window:
        strip.axvline(window, color=style.INK, lw=0.8)
        strip.set_xticks([0, window, reach])
