"""What a head role is: which frames an attention head keeps and sees, and where they sit for RoPE.

A method is a subclass of `HeadRole`: its numbers are fields, and it overrides `capacity` and `retain`. All
else has a default. `headforcing.roles.windows` is the shortest example.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from headforcing.errors import RoleError, WindowError
from headforcing.roles.compressed import CompressedHistory
from headforcing.roles.positions import BOUNDED, SCHEMES, PositionScheme, scheme_positions
from headforcing.types import FrameTable, Phase, Selection, Tier


@dataclass(frozen=True)
class HeadRole(ABC):
    """The memory of one attention head.

    Subclasses are frozen dataclasses of plain numbers, in frames: hashable, comparable, storable as JSON.
    They hold no state. The current chunk is always visible and never counted. Fields that are called `sink`,
    `episodic` and `recent` are the first, the chosen and the last frames; prompt switches go by these names.

    Attributes:
        positions: where the frames sit for RoPE.
        clean_window: newest frames that the clean pass sees, current chunk included; `None`: all that noisy
            passes see. Commit Forcing (released code of October 2026, no paper): first frames are visible
            only while they are among the newest, frames chosen by content and compressed tokens not at all.
            Visible frames sit where they would without it.
    """

    positions: PositionScheme = field(default="compact", kw_only=True)
    clean_window: int | None = field(default=None, kw_only=True)
    depends_on: ClassVar[tuple[Literal["phase", "query"], ...]] = ()
    """What else decides which frames are visible, or where they sit: the phase, the frame of the query."""

    def __post_init__(self) -> None:
        if self.positions not in SCHEMES:
            raise RoleError(
                f"{type(self).__name__}.positions is {self.positions!r}: expected one of {', '.join(SCHEMES)}"
            )
        for name in self._counts():
            value = getattr(self, name)
            if value is None and self.__dataclass_fields__[name].default is None:
                continue
            if type(value) is not int or value < 0:
                raise RoleError(
                    f"{type(self).__name__}.{name} is {value!r}: expected a number of frames >= 0"
                )

    def __str__(self) -> str:
        return repr(self).replace(", clean_window=None", "")

    @abstractmethod
    def capacity(self, chunk: int) -> int | None:
        """Most frames it keeps beside a chunk of `chunk` frames; `None` is without bound."""

    @abstractmethod
    def retain(self, table: FrameTable) -> Sequence[int] | Selection:
        """Rows of the table that stay, ascending; asked once when a chunk begins."""

    def visible(self, table: FrameTable, phase: Phase) -> Sequence[int]:
        """Rows of the table that a pass sees, ascending; default all. `clean_window` is applied to them."""
        return range(len(table))

    def positions_of(
        self, frames: Sequence[int | None], chunk: int, window: int, query: int | None = None, gap: int = 0
    ) -> tuple[int, ...]:
        """Temporal RoPE position of every visible frame, current chunk last.

        Args:
            frames: the visible frames; `None` where chosen by content.
            chunk: frames of the current chunk.
            window: frames the model was trained on.
            query: the frame of the query, for roles that depend on it.
            gap: positions that compressed tokens take right after the first frames that are still stored.

        Raises:
            WindowError: a position would leave the range the model was trained on, `[0, window)`.
        """
        found = scheme_positions(self.positions, frames, chunk, window)
        if gap and self.positions == "compact":
            sink = first_frames(self)
            first = [frame is not None and frame < sink for frame in frames]
            found = tuple(rank if is_first else rank + gap for rank, is_first in enumerate(first))
        if self.positions in BOUNDED and found[-1] >= window:
            raise WindowError(
                f"{self} with a chunk of {chunk} frames reaches RoPE position {found[-1]}, but the "
                f"model was trained on {window} frames: give the role fewer frames"
            )
        return found

    def compressed(self) -> CompressedHistory | None:
        """A new and empty memory for compressed tokens: merged, averaged or selected; default none."""
        return None

    def fit(self, window: int, chunk: int) -> HeadRole:
        """The role with every number filled in for a model, checked against its window.

        Args:
            window: frames the model was trained on.
            chunk: frames of the longest chunk the model will be given.

        Raises:
            WindowError: the role with the current chunk requires more than `window` frames, or the clean pass
                would not see all of the chunk.
        """
        if self.clean_window is not None and self.clean_window < chunk:
            raise WindowError(f"{self} does not see the current chunk of {chunk} frames: raise clean_window")
        capacity = self.capacity(chunk)
        if bounded(self) and (capacity is None or capacity + chunk > window):
            kept = "every frame" if capacity is None else f"{capacity} frames"
            raise WindowError(
                f"{self} keeps {kept} beside a chunk of {chunk}, but the model was trained on {window} "
                f"frames: keep at most {window - chunk}, or use positions='absolute'"
            )
        return self

    def _counts(self) -> tuple[str, ...]:
        """Names of the fields that are numbers of frames."""
        counts = ("int", "int | None", int, int | None)
        return tuple(f.name for f in dataclasses.fields(self) if f.type in counts)


def newest_rows(role: HeadRole, table: FrameTable, rows: tuple[int, ...], phase: Phase) -> tuple[int, ...]:
    """Those of the rows that a pass sees which are in its `clean_window`, if it is a clean one."""
    if role.clean_window is None or phase == "denoise":
        return rows
    first = table.start + table.chunk - role.clean_window
    return tuple(row for row in rows if (frame := table.frames[row]) is not None and frame >= first)


def sees_compressed(role: HeadRole, phase: Phase) -> bool:
    """Whether a pass sees compressed tokens."""
    return role.clean_window is None or phase == "denoise"


def reads_phase(role: HeadRole) -> bool:
    """Whether the base model has to tell which pass is the clean one."""
    return role.clean_window is not None or "phase" in role.depends_on


def bounded(role: HeadRole) -> bool:
    """Whether positions stay in `[0, window)` for ever; unknown, so no, where a role computes its own."""
    return role.positions in BOUNDED and type(role).positions_of is HeadRole.positions_of


def first_frames(role: HeadRole) -> int:
    """How many frames a role holds because a video, or a shot, begins with them."""
    return getattr(role, "sink", 0)


def tier(role: HeadRole, frame: int | None, start: int) -> Tier:
    """Where a role holds a frame when a chunk begins at `start`; decides what outlives a prompt switch."""
    if frame is not None and frame < first_frames(role):
        return "sink"
    if not hasattr(role, "episodic") or (frame is not None and frame >= start - getattr(role, "recent", 0)):
        return "recent"
    return "episodic"


def recalled(role: HeadRole) -> tuple[Tier, ...]:
    """What comes back with a marked scene: all frames of an episodic memory, the first ones of others."""
    return ("sink", "episodic", "recent") if hasattr(role, "episodic") else ("sink",)


def ends(table: FrameTable, sink: int, recent: int) -> tuple[int, ...]:
    """The rows of the `sink` first frames and the last `recent` of the others, ascending."""
    return with_last(table, table.first(sink), recent)


def with_last(table: FrameTable, first: Sequence[int], recent: int) -> tuple[int, ...]:
    """The rows `first`, and the last `recent` of the others, ascending."""
    others = [row for row in range(len(table)) if row not in first]
    return tuple(sorted((*first, *others[max(len(others) - max(recent, 0), 0) :])))
