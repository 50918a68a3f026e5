"""Roles of Pyramid Forcing (arXiv:2605.13111): waves read by the phase of the query, strided heads do not.

Budgets and positions are those of its released configuration (code). Two edges that its two execution
paths leave open are our choice: the last frames are counted once per chunk, not per query frame, and a
chunk is committed when the next one begins, so the clean pass sees what the denoising passes see.

What it calls anchor is `Strided` here: `Anchor` is a role of Head Forcing. Its veil heads, which merge
blocks of frames, are not built yet.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headforcing.errors import RoleError
from headforcing.roles import HeadRole
from headforcing.types import FrameTable, Phase


@dataclass(frozen=True)
class _Pyramid(HeadRole):
    """First frames, some of the middle, last frames; far frames all at one distance.

    The `window_clamp` of Pyramid Forcing: for the query frame `q`, everything but the last frames sits
    at `q - clamp(q, near, far)`, at least 0, in space where it was, its order in time given up; the last
    frames and the own chunk keep their true distance. RoPE feels differences only, so all of it is moved
    to begin at 0: positions stay below `far + chunk`, for any number of frames.

    Attributes:
        sink: first frames of the video.
        period: the cycle, in frames.
        cap: frames of the middle that are read.
        recent: last frames.
        near: distance of the far frames until the video is that long.
        far: their distance after that. 21 is one more than a model with 21 frames was trained on.
    """

    sink: int
    period: int = 6
    cap: int = 4
    recent: int = 1
    near: int = 18
    far: int = 21
    reads_per_query: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "compact":
            raise RoleError(f"{self}: positions follow near and far, leave positions alone")
        if self.period < 1 or not self.near <= self.far:
            raise RoleError(f"{self}: expected a period of at least 1, and near <= far")

    @property
    def bounded(self) -> bool:
        """False: `far` frames and the own chunk go beyond the trained range by as much, see the class."""
        return False

    def place(
        self, frames: Sequence[int | None], chunk: int, window: int, query: int | None = None
    ) -> tuple[int, ...]:
        """See the class."""
        known = [frame for frame in frames if frame is not None]
        if query is None or len(known) < len(frames):
            raise RoleError(f"{type(self).__name__} reads per query frame: it needs to know every frame")
        own = known[len(known) - chunk]
        far = max(0, query - min(max(query, self.near), self.far))
        return tuple(frame - far if frame >= own - self.recent else 0 for frame in known)

    def attend(self, table: FrameTable, phase: Phase) -> Sequence[int]:
        """Sinks, the middle of this query frame, and the last frames."""
        query = table.start if table.query is None else table.query
        sinks, recents = self._ends(table)
        middle = self._middle(table, query % self.period)
        return sorted({*sinks, *middle[max(0, len(middle) - self.cap) :], *recents})

    @abstractmethod
    def _phase(self, phase: int) -> int:
        """The phase of the middle frames that a query frame of some phase reads."""

    def _middle(self, table: FrameTable, phase: int) -> list[int]:
        """Rows between the ends that a query of this phase may read, oldest first."""
        sinks, recents = self._ends(table)
        ends = {*sinks, *recents}
        wanted = self._phase(phase)
        return [
            row
            for row, frame in enumerate(table.frames)
            if row not in ends and _at(frame, self.period) == wanted
        ]

    def _ends(self, table: FrameTable) -> tuple[list[int], list[int]]:
        sinks = [row for row, frame in enumerate(table.frames) if frame is not None and frame < self.sink]
        last = table.start - self.recent
        return sinks, [row for row, frame in enumerate(table.frames) if frame is not None and frame >= last]

    def _keep(self, table: FrameTable, phases: Sequence[int]) -> Sequence[int]:
        sinks, recents = self._ends(table)
        kept = {*sinks, *recents}
        for phase in phases:
            middle = self._middle(table, phase)
            kept |= set(middle[max(0, len(middle) - self.cap) :])
        return sorted(kept)


@dataclass(frozen=True)
class Wave(_Pyramid):
    """Looks back by whole cycles: a query at `t` reads `t - 6`, `t - 12`, `t - 18`, `t - 24`.

    Reads 1 + 4 + 1 frames beside the own chunk, and keeps cycles of every phase: 1 + 6 * 4 + 1.
    """

    sink: int = 1

    def capacity(self, chunk: int) -> int | None:
        """Frames kept; more than are read."""
        return self.sink + self.period * self.cap + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        """Sinks, the last of every phase, the last frames."""
        return self._keep(table, range(self.period))

    def _phase(self, phase: int) -> int:
        return phase


@dataclass(frozen=True)
class Strided(_Pyramid):
    """The anchor head of Pyramid Forcing: first frames, every sixth frame, last frames; 3 + 4 + 1."""

    sink: int = 3

    def capacity(self, chunk: int) -> int | None:
        """Frames kept, all of them read."""
        return self.sink + self.cap + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        """What every query frame of the chunk reads."""
        return self._keep(table, (0,))

    def _phase(self, phase: int) -> int:
        return 0


def _at(frame: int | None, period: int) -> int | None:
    return None if frame is None else frame % period
