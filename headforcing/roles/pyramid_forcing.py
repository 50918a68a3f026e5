"""Roles of Pyramid Forcing (arXiv:2605.13111): wave, strided (which it calls anchor) and veil heads.

Budgets and positions are those of its released configuration (code). Two edges are our choice. The last
frames are counted once per chunk, not per query frame: its two execution paths differ there, and a chunk
sees one past in all its frames. A chunk is committed when the next one begins, so the clean pass sees what
the denoising passes see; there it sees what committing leaves, one frame of a full cycle less.
`Anchor` is a role of Head Forcing, therefore `Strided`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from headforcing.errors import RoleError, WindowError
from headforcing.roles.base import HeadRole
from headforcing.roles.blocks import Blocks
from headforcing.roles.compressed import CompressedHistory
from headforcing.types import FrameTable, Phase


@dataclass(frozen=True)
class _Clamped(HeadRole):
    """First frames, something between, last frames; far frames all at one distance.

    The `window_clamp` of Pyramid Forcing: for the query frame `q`, everything but the last frames sits
    at `q - clamp(q, near, far)`, at least 0, in space where it was, its order in time given up; the last
    frames, the own chunk and merged blocks keep their true distance. RoPE feels differences only, so all
    of it is moved to begin at 0: positions stay below `far + chunk`, for any number of frames.

    Attributes:
        sink: first frames of the video.
        recent: last frames.
        near: distance of the far frames until the video is that long.
        far: their distance after that. 21 is one more than a model with 21 frames was trained on.
    """

    sink: int
    recent: int = 1
    near: int = 18
    far: int = 21
    depends_on = ("query",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "compact":
            raise RoleError(f"{self}: positions follow near and far, leave positions alone")
        if self.near > self.far:
            raise RoleError(f"{self}: expected near <= far")

    def fit(self, window: int, chunk: int) -> HeadRole:
        """The role, if no frame that it sees can be older than what sits at position 0.

        Raises:
            WindowError: its last frames, or its blocks, reach further back than `far`.
        """
        if self._reach(chunk) > self.far:
            raise WindowError(
                f"{self} sees frames {self._reach(chunk)} before a query of a chunk of {chunk}, at their own "
                f"distance, but everything older than {self.far} frames sits at one place: raise far"
            )
        return super().fit(window, chunk)

    def _reach(self, chunk: int) -> int:
        """Distance of the oldest frame that keeps its own, from the last query frame of a chunk."""
        return self.recent + chunk - 1

    def positions_of(
        self,
        frames: Sequence[int | None],
        chunk: int,
        window: int,
        query: int | None = None,
        gap: int = 0,
    ) -> tuple[int, ...]:
        """See the class."""
        known = [frame for frame in frames if frame is not None]
        if query is None or len(known) < len(frames):
            raise RoleError(f"{type(self).__name__} reads per query frame: it needs to know every frame")
        near, origin = known[len(known) - chunk] - self.recent, self._origin(query)
        return tuple(frame - origin if frame >= near else 0 for frame in known)

    def _origin(self, query: int) -> int:
        """The frame that a query frame sees at position 0."""
        return max(0, query - min(max(query, self.near), self.far))

    def _ends(self, table: FrameTable) -> tuple[list[int], list[int]]:
        """Rows of the first and of the last frames."""
        known = [(row, frame) for row, frame in enumerate(table.frames) if frame is not None]
        last = table.start - self.recent
        return [row for row, frame in known if frame < self.sink], [row for row, f in known if f >= last]


@dataclass(frozen=True)
class _Cyclic(_Clamped):
    """Frames of the middle by their phase in a cycle.

    Attributes:
        period: the cycle, in frames.
        cap: frames of the middle that are read.
    """

    period: int = 6
    cap: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period < 1:
            raise RoleError(f"{self}: expected a period of at least 1")

    def visible(self, table: FrameTable, phase: Phase) -> Sequence[int]:
        """First frames, the middle of this query frame, and the last frames."""
        query = table.start if table.query is None else table.query
        return self._rows(table, [query % self.period])

    @abstractmethod
    def _phase(self, phase: int) -> int:
        """The phase of the middle frames that a query frame of some phase reads."""

    def _rows(self, table: FrameTable, phases: Sequence[int]) -> Sequence[int]:
        """First and last frames, and what queries of these phases read between them."""
        sinks, recents = self._ends(table)
        kept = {*sinks, *recents}
        between = [(row, f) for row, f in enumerate(table.frames) if row not in kept and f is not None]
        for phase in phases:
            middle = [row for row, frame in between if frame % self.period == self._phase(phase)]
            kept |= set(middle[max(0, len(middle) - self.cap) :])
        return sorted(kept)


@dataclass(frozen=True)
class Wave(_Cyclic):
    """Looks back by whole cycles: a query at `t` reads `t - 6`, `t - 12`, `t - 18`, `t - 24`.

    Reads 1 + 4 + 1 frames beside the own chunk, and keeps cycles of every phase: 1 + 6 * 4 + 1.
    """

    sink: int = 1

    def capacity(self, chunk: int) -> int | None:
        """Frames kept; more than are read."""
        return self.sink + self.period * self.cap + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        """First frames, the last of every phase, the last frames."""
        return self._rows(table, range(self.period))

    def _phase(self, phase: int) -> int:
        return phase


@dataclass(frozen=True)
class Strided(_Cyclic):
    """The anchor head of Pyramid Forcing: first frames, every sixth frame, last frames; 3 + 4 + 1."""

    sink: int = 3

    def capacity(self, chunk: int) -> int | None:
        """Frames kept, all of them read."""
        return self.sink + self.cap + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        """What every query frame of the chunk reads."""
        return self._rows(table, [0])

    def _phase(self, phase: int) -> int:
        return 0


@dataclass(frozen=True)
class Veil(_Clamped):
    """First frames, blocks of the past merged in time and space, last frames; 3 + 4 blocks + 1.

    A block is four frames, aligned to the first one of the video, averaged with their 2 x 2 patches into
    a quarter of a frame; it sits at its own time, the lower median of its frames, and at the top left of
    its patches. Of the last `blocks` complete ones, those that touch the last frames are hidden. Frames of
    the sink are in the first block, too, as in the released code.

    Attributes:
        blocks: merged blocks kept.
        block: frames of a block.
        patch: patches of a side that are averaged.
    """

    sink: int = 3
    blocks: int = 4
    block: int = 4
    patch: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or self.patch < 1:
            raise RoleError(f"{self}: expected block and patch of at least 1")

    def capacity(self, chunk: int) -> int | None:
        """Whole frames kept; merged blocks come on top, `blocks / patch ** 2` frames in size."""
        return self.sink + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        """First and last frames."""
        sinks, recents = self._ends(table)
        return sorted({*sinks, *recents})

    def _reach(self, chunk: int) -> int:
        if not self.blocks:
            return super()._reach(chunk)
        unfinished, middle = self.block - 1, (self.block - 1) // 2
        return max(super()._reach(chunk), self.block * self.blocks + unfinished - middle + chunk - 1)

    def compressed(self) -> CompressedHistory | None:
        """See the class."""
        if not self.blocks:
            return None
        return Blocks(self.blocks, self.block, self.patch, self.recent, self._origin)
