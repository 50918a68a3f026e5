"""What one choice of memories takes on one model, before either is loaded; also dense, and StreamingLLM.

What is stored is counted as `headforcing presets` counts it, frames on a real store with small tensors, and
the work of a pass on a layer of the real size that holds no numbers (`headforcing.measure.rehearsal`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from headforcing.errors import OptionError, RoleMapMismatchError, StreamShapeError
from headforcing.measure.census import Known
from headforcing.measure.footprint import ModelSize
from headforcing.measure.rehearsal import rehearse
from headforcing.measure.steady import steady
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.roles.maps.preset import Preset
from headforcing.roles.maps.role_map import RoleMap
from headforcing.types import Grid

STREAMING = "streaming_llm"


@dataclass(frozen=True)
class Setting:
    """For whom the estimate is.

    Attributes:
        size: of the model; `tokens_per_frame` is that of the grid.
        grid: height and width of a frame in patches.
        store: name of the store.
        videos: of a batch, `B`.
        branches: timelines per video that are alive at once, 2 with classifier-free guidance.

    Raises:
        OptionError: a number is less than 1, or the grid has other tokens than a frame.
    """

    size: ModelSize
    grid: Grid
    store: str = "ring"
    videos: int = 1
    branches: int = 1

    def __post_init__(self) -> None:
        for name in ("videos", "branches"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}: expected a whole number, at least 1")
        if math.prod(self.grid) != self.size.tokens_per_frame:
            raise OptionError(
                f"a grid of {self.grid[0]}x{self.grid[1]} patches has {math.prod(self.grid)} tokens, the "
                f"model {self.size.tokens_per_frame} per frame: expected the same"
            )

    @property
    def streams(self) -> int:
        """Timelines in memory."""
        return self.videos * self.branches


@dataclass(frozen=True)
class Choice:
    """Roles for the heads of a model.

    Attributes:
        name: what to call it.
        roles: a map in the right proportions; one of fewer heads stands for all of them.
        rows: layers to rehearse, each other in kind: a role for every head.
    """

    name: str
    roles: RoleMap
    rows: tuple[tuple[HeadRole, ...], ...]


@dataclass(frozen=True)
class Takes:
    """What memories take, all layers and timelines together; `None`: it grows with the video.

    Attributes:
        name: of the choice.
        stored: bytes the store holds once it is full.
        kept: bytes of keys and values that the roles keep, own chunk included.
        attended: frames that a query sees in a noisy pass, own chunk included, mean over heads.
        work: bytes that a layer makes in one pass and has alive at once, at most.
    """

    name: str
    stored: int | None
    kept: int | None
    attended: Fraction | None
    work: int | None

    @property
    def peak(self) -> int | None:
        """Bytes of what is stored and of the work of one layer."""
        return None if self.stored is None or self.work is None else self.stored + self.work


def of_preset(preset: Preset, size: ModelSize) -> Choice:
    """A preset, with the published numbers of heads; the layer that is rehearsed has whole heads.

    Raises:
        OptionError: how many heads have which label is not published.
        WindowError: a role does not fit the window.
    """
    shares = preset.shares(size.window, size.chunk)
    if shares is None:
        raise OptionError(
            f"{preset.name}: {preset.counted}, so what it takes is not known: give a role map of your model "
            "with --roles"
        )
    named = preset.roles(size.window, size.chunk)
    roles = {label: role.fit(size.window, size.chunk) for label, role in named.items()}
    counts = whole_heads(shares, size.heads)
    row = by_turns({roles[label]: count for label, count in counts.items()})
    return Choice(preset.name, published_map(preset, roles, size), (row,))


def of_map(name: str, roles: RoleMap, size: ModelSize) -> Choice:
    """A role map of the model; layers with as many heads of every role are rehearsed once.

    Raises:
        RoleMapMismatchError: it is for other layers or heads.
        WindowError: a role does not fit the window.
    """
    if roles.shape != (size.layers, size.heads):
        raise RoleMapMismatchError(
            f"{name} is for {roles.shape[0]} layers x {roles.shape[1]} heads, the model has {size.layers} x "
            f"{size.heads}: give another --model, or --layers {roles.shape[0]} --heads {roles.shape[1]}"
        )
    fitted = roles.fit(size.layers, size.heads, size.window, size.chunk)
    rows = {frozenset((role, layer.count(role)) for role in layer): layer for layer in fitted.layers}
    return Choice(name, fitted, tuple(rows.values()))


def streaming_at(frames: Fraction, size: ModelSize) -> Choice:
    """StreamingLLM that sees as many frames, to the nearest; its sink is a chunk where there is room."""
    count = min(max(round(frames), size.chunk + 1), size.window)
    role = SlidingWindow(count, sink=min(size.chunk, count - size.chunk)).fit(size.window, size.chunk)
    return of_map(f"{STREAMING}, {count} frames", RoleMap.uniform(role, size.layers, size.heads), size)


def takes(choice: Choice, setting: Setting) -> Takes:
    """What a choice takes.

    Raises:
        OptionError: there is no such store, or a role cannot merge or cut such patches.
    """
    size, counts = setting.size, choice.roles.counts()
    seen = {role: steady(role, size.window, size.chunk) for role in counts}
    if any(found is None for found in seen.values()):
        return Takes(choice.name, None, None, None, None)
    _check_grid(choice, setting.grid)
    heads = sum(counts.values())
    frames = sum((found.attended * counts[role] for role, found in seen.items() if found), Fraction())
    share = Fraction(size.count, heads) * setting.streams
    stored, kept = size.stored_bytes(setting.store, choice.roles), size.kv_bytes(choice.roles)
    assert stored is not None
    assert kept is not None  # no role grows
    known: Known = {}  # most of what layers ask of operators is alike
    done = [
        rehearse(row, size, setting.grid, videos=setting.videos, store=setting.store, known=known)
        for row in choice.rows
    ]
    work = max(one.work for one in done)
    return Takes(choice.name, math.ceil(stored * share), math.ceil(kept * share), frames / heads, work)


def dense(setting: Setting) -> Takes:
    """What the window of the model takes as it was trained: the host's own rolled cache."""
    size, held = setting.size, setting.size.window_bytes * setting.streams
    work = rehearse((), size, setting.grid, videos=setting.videos).work
    return Takes(f"dense, {size.window} frames", held, held, Fraction(size.window), work)


def _check_grid(choice: Choice, grid: Grid) -> None:
    """Looks whether what roles keep beside whole frames can be made of frames of this grid."""
    for role in choice.roles.counts():
        if (history := role.compressed()) is None:
            continue
        try:
            history.check(grid)
        except StreamShapeError as error:
            raise OptionError(
                f"{choice.name}, {role}: {error}: give a --grid of other sides, or another choice"
            ) from error


def published_map(preset: Preset, roles: Mapping[str, HeadRole], size: ModelSize) -> RoleMap:
    """A map with the published numbers of heads, as one layer; of the model, where all heads are alike."""
    if not preset.labels_needed(size.window, size.chunk):
        (role,) = roles.values()
        return RoleMap.uniform(role, size.layers, size.heads)
    row = [role for label, role in roles.items() for _ in range(preset.published[label])]
    return RoleMap((tuple(row),))


def whole_heads(shares: Mapping[str, float], heads: int) -> dict[str, int]:
    """Shares of a number of heads in whole ones, largest remainders first."""
    counts = {label: math.floor(heads * share) for label, share in shares.items()}
    left = sorted(shares, key=lambda label: counts[label] - heads * shares[label])
    for label in left[: heads - sum(counts.values())]:
        counts[label] += 1
    return counts


def by_turns(counts: Mapping[HeadRole, int]) -> tuple[HeadRole, ...]:
    """A row of heads in which the heads of every role lie apart, as in a measured map."""
    spread = [((turn + 0.5) / count, role) for role, count in counts.items() for turn in range(count)]
    return tuple(role for _, role in sorted(spread, key=lambda one: one[0]))
