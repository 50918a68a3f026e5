"""The roles of Pyramid Forcing (arXiv:2605.13111): wave, strided and veil heads.

Numbers and positions are those of its released configuration (code). Two details are our choice. The last
frames are counted once per chunk and not per query frame, where its two execution paths differ. A chunk is
committed when the next one begins, so the clean pass attends to what noisy passes attend to; in its code, to
what is left after the commit, one frame of a full cycle less. Strided heads are called anchor there, which
here is a role of Head Forcing.
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
    """First frames, something between, last frames; all but the last at one distance.

    The `window_clamp` of Pyramid Forcing: seen from the query frame `q`, first frames and those between sit
    at the time `q - clamp(q, near, far)`, at least 0, and their order in time is given up. The last frames,
    the current chunk and merged blocks keep their true distance. RoPE depends on differences only, so time
    is counted from where the first query frame of the chunk sees the far frames: positions begin at 0 and
    stay below `far + chunk`, for any number of frames, and only the far frames move with the query frame.

    Attributes:
        sink: first frames of the video.
        recent: last frames.
        near: distance of the far frames until the video is that long.
        far: their distance after that, at most the window; 21 is one more than a model of 21 frames was
            trained on.
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
        """The role, if far frames are within the window, and no frame at its true distance is further back.

        Raises:
            WindowError: the far frames are not, or last frames or blocks are.
        """
        if self.far > window:
            raise WindowError(
                f"{self} puts old frames at a distance of {self.far}, but the model was trained on {window} "
                f"frames: lower near and far to at most {window}, or make the map for this window, such as "
                f"headforcing.roles.maps.presets.pyramid_forcing(labels, window={window})"
            )
        if self._reach(chunk) > self.far:
            raise WindowError(
                f"{self} attends to frames {self._reach(chunk)} before a query of a chunk of {chunk} at "
                f"their true distance, but all older than {self.far} frames have one position: raise far, or "
                "give it fewer frames"
            )
        return super().fit(window, chunk)

    def _reach(self, chunk: int) -> int:
        """Distance of the oldest frame that keeps its true one, from the last query frame of a chunk."""
        return self.recent + chunk - 1

    def positions_of(
        self, frames: Sequence[int | None], chunk: int, window: int, query: int | None = None, gap: int = 0
    ) -> tuple[int, ...]:
        known = [frame for frame in frames if frame is not None]
        if query is None or len(known) < len(frames):
            raise RoleError(f"{type(self).__name__} requires the index of every frame, and the query frame")
        start = known[len(known) - chunk]
        origin, far = self._far(start), self._far(query) - self._far(start)
        return tuple(frame - origin if frame >= start - self.recent else far for frame in known)

    def _far(self, query: int) -> int:
        """The time of the far frames, seen from a query frame; for the first one of a chunk, position 0."""
        return max(0, query - min(max(query, self.near), self.far))

    def _ends(self, table: FrameTable) -> tuple[list[int], list[int]]:
        """Rows of the first and of the last frames."""
        known = [(row, frame) for row, frame in enumerate(table.frames) if frame is not None]
        last = table.start - self.recent
        return [row for row, frame in known if frame < self.sink], [row for row, f in known if f >= last]


@dataclass(frozen=True)
class _Cyclic(_Clamped):
    """Frames between the first and the last ones, by their phase in a cycle.

    Attributes:
        period: length of the cycle in frames.
        cap: frames between that a query attends to.
    """

    period: int = 6
    cap: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period < 1:
            raise RoleError(f"{self}: expected a period of at least 1")

    def visible(self, table: FrameTable, phase: Phase) -> Sequence[int]:
        """First frames, those between for this query frame, and last frames."""
        query = table.start if table.query is None else table.query
        return self._rows(table, [query % self.period])

    @abstractmethod
    def _phase(self, phase: int) -> int:
        """The phase of the frames between that a query frame of some phase attends to."""

    def _rows(self, table: FrameTable, phases: Sequence[int]) -> Sequence[int]:
        """First and last frames, and what queries of these phases attend to between them."""
        sinks, recents = self._ends(table)
        kept = {*sinks, *recents}
        between = [(row, f) for row, f in enumerate(table.frames) if row not in kept and f is not None]
        for phase in phases:
            middle = [row for row, frame in between if frame % self.period == self._phase(phase)]
            kept |= set(middle[max(0, len(middle) - self.cap) :])
        return sorted(kept)


@dataclass(frozen=True)
class Wave(_Cyclic):
    """Whole cycles back: a query at `t` attends to `t - 6`, `t - 12`, `t - 18`, `t - 24`.

    It attends to 1 + 4 + 1 frames beside the current chunk, and stores cycles of every phase: 1 + 6 * 4 + 1.
    """

    sink: int = 1

    def capacity(self, chunk: int) -> int | None:
        """More than one query attends to."""
        return self.sink + self.period * self.cap + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        return self._rows(table, sorted({frame % self.period for frame in table.frames if frame is not None}))

    def _phase(self, phase: int) -> int:
        return phase


@dataclass(frozen=True)
class Strided(_Cyclic):
    """First frames, every sixth frame, last frames: 3 + 4 + 1."""

    sink: int = 3

    def capacity(self, chunk: int) -> int | None:
        """Every query attends to all of them."""
        return self.sink + self.cap + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        """What every query frame of the chunk attends to."""
        return self._rows(table, [0])

    def _phase(self, phase: int) -> int:
        return 0


@dataclass(frozen=True)
class Veil(_Clamped):
    """First frames, blocks of the past merged in time and space, last frames: 3 + 4 blocks + 1.

    A block is four frames, counted from the first one of the video, whose squares of 2 x 2 patches are
    averaged into a quarter of a frame. It sits at the lower median of its frames in time, and at the top left
    of its squares. Of the last `blocks` complete ones, those that overlap the last frames are not visible.
    The first block contains first frames, too, as in the released code; where a prompt switch restarts time,
    these are the frames that it kept.

    Attributes:
        blocks: merged blocks stored.
        block: frames of a block.
        patch: side of the squares of patches that are averaged.
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
        """Whole frames; merged blocks come on top, `blocks / patch ** 2` frames in size."""
        return self.sink + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        sinks, recents = self._ends(table)
        return sorted({*sinks, *recents})

    def _reach(self, chunk: int) -> int:
        if not self.blocks:
            return super()._reach(chunk)
        unfinished, middle = self.block - 1, (self.block - 1) // 2
        return max(super()._reach(chunk), self.block * self.blocks + unfinished - middle + chunk - 1)

    def compressed(self) -> CompressedHistory | None:
        if not self.blocks:
            return None
        return Blocks(self.blocks, self.block, self.patch, self.recent, self._far)
