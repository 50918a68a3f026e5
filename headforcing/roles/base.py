"""What a head role is: what a head keeps, what it sees, and where that sits for RoPE.

A role is a frozen dataclass of plain numbers, in frames. It holds no state: once per chunk it is shown a
table of what is still there and names the rows that stay. The roles themselves are in `headforcing.roles`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from headforcing.errors import RoleError, WindowError
from headforcing.roles.compressed import Digest
from headforcing.roles.positions import BOUNDED, SCHEMES, PositionScheme, place
from headforcing.types import FrameTable, Phase, Pin, Selection, Tier


@dataclass(frozen=True)
class HeadRole(ABC):
    """What one attention head remembers.

    Subclasses are frozen dataclasses: hashable, comparable, storable as JSON. The own chunk is always
    visible and is never counted. A new role is one subclass, in any module.
    """

    positions: PositionScheme = field(default="compact", kw_only=True)
    uses_phase: ClassVar[bool] = False
    """Whether `attend` depends on the phase; such a role needs a host that tells it."""

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

    @abstractmethod
    def capacity(self, chunk: int) -> int | None:
        """Most frames it keeps beside a chunk of `chunk` frames; `None` is without bound."""

    @abstractmethod
    def retain(self, table: FrameTable) -> Sequence[int] | Selection:
        """Rows of the table that stay, ascending; asked once when a chunk begins."""

    def attend(self, table: FrameTable, phase: Phase) -> Sequence[int]:
        """Rows of the history that are visible in this pass, ascending; default all."""
        return range(len(table))

    def place(
        self,
        frames: Sequence[int | None],
        chunk: int,
        window: int,
        query: int | None = None,
        digested: int = 0,
    ) -> tuple[int, ...]:
        """Temporal RoPE position of every visible frame, own chunk last.

        Args:
            frames: the frames in view; `None` where chosen by content.
            chunk: frames of the own chunk.
            window: frames the model was trained on.
            query: the frame that looks, for roles that read per query frame.
            digested: places that a digest takes behind the first frames, for roles that have one.

        Raises:
            WindowError: a position would leave the range the model was trained on, `[0, window)`.
        """
        placed = place(self.positions, frames, chunk, window)
        if digested and self.positions == "compact":
            first = self.first_frames
            placed = (*placed[:first], *(position + digested for position in placed[first:]))
        if self.bounded and placed[-1] >= window:
            raise WindowError(
                f"{self} with a chunk of {chunk} frames reaches RoPE position {placed[-1]}, but the "
                f"model was trained on {window} frames: give the role fewer frames"
            )
        return placed

    def follow(self, pin: Pin, chunk: int) -> None:  # noqa: B027 - others hold no more than they did
        """Looks whether there is room when the first frames of a shot become the sink.

        Raises:
            WindowError: there is none.
        """

    @property
    def bounded(self) -> bool:
        """Whether positions stay in `[0, window)` for ever."""
        return self.positions in BOUNDED

    @property
    def scheme(self) -> PositionScheme:
        """Where its whole frames sit."""
        return self.positions

    @property
    def first_frames(self) -> int:
        """How many frames it holds because a video, or a shot, begins with them."""
        return getattr(self, "sink", 0)

    @property
    def reads_per_query(self) -> bool:
        """Whether what is visible, or where it sits, depends on the frame of the query; default no."""
        return False

    @property
    def recalls(self) -> tuple[Tier, ...]:
        """Tiers that come back when a marked scene is recalled; default the first frames."""
        return ("sink",)

    def tier(self, frame: int | None, start: int) -> Tier:
        """Where it holds a frame when a chunk begins at `start`; decides what outlives a scene."""
        return "sink" if frame is not None and frame < self.first_frames else "recent"

    def digest(self) -> Digest | None:
        """What it keeps beside whole frames, as a new and empty memory; default nothing."""
        return None

    def sees_digest(self, phase: Phase) -> bool:
        """Whether a pass sees what is kept beside whole frames; default every one."""
        return True

    def fit(self, window: int, chunk: int) -> HeadRole:
        """The role with every number filled in for a model, checked against its window.

        Args:
            window: frames the model was trained on.
            chunk: frames of the longest chunk the model will be given.

        Raises:
            WindowError: the role with the own chunk needs more than `window` frames.
        """
        capacity = self.capacity(chunk)
        if self.bounded and (capacity is None or capacity + chunk > window):
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


def ends(table: FrameTable, sink: int, recent: int) -> tuple[int, ...]:
    """The rows of the `sink` first frames and the last `recent` of the others, ascending."""
    return with_last(table, table.first(sink), recent)


def with_last(table: FrameTable, first: Sequence[int], recent: int) -> tuple[int, ...]:
    """The rows `first`, and the last `recent` of the others, ascending."""
    others = [row for row in range(len(table)) if row not in first]
    return tuple(sorted((*first, *others[max(len(others) - max(recent, 0), 0) :])))
