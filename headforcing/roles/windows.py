"""Roles that treat all heads alike: the growing dense cache, and a sliding window over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headforcing.errors import RoleError, WindowError
from headforcing.roles.base import HeadRole, with_last
from headforcing.roles.positions import PositionScheme
from headforcing.types import FrameTable, Pin


@dataclass(frozen=True)
class Full(HeadRole):
    """Every frame at its true position: the growing dense cache."""

    positions: PositionScheme = field(default="absolute", kw_only=True)

    def capacity(self, chunk: int) -> int | None:
        return None

    def retain(self, table: FrameTable) -> Sequence[int]:
        return range(len(table))


@dataclass(frozen=True)
class SlidingWindow(HeadRole):
    """The first `sink` and the last frames, `window` in all, current chunk included.

    With `positions="absolute"` this is the rolled cache of Self Forcing and its descendants; with
    `positions="compact"` it is StreamingLLM (arXiv:2309.17453) on frames.

    Attributes:
        window: frames attended to, current chunk included.
        sink: first frames of the video that are never evicted.
    """

    window: int
    sink: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink >= self.window:
            raise RoleError(f"{self}: sink must be smaller than window")

    def capacity(self, chunk: int) -> int | None:
        return self.window - chunk

    def retain(self, table: FrameTable) -> Sequence[int]:
        first = sorted({*table.first(self.sink), *table.always(self.sink)})
        return with_last(table, first, self.window - table.chunk - len(first))

    def fit(self, window: int, chunk: int) -> HeadRole:
        check_sink(self, self.window, self.sink, chunk)
        return super().fit(window, chunk)


def check_sink(role: HeadRole, window: int, sink: int, chunk: int) -> None:
    """Refuses a role whose window has no room for its first frames and a chunk.

    Raises:
        WindowError: it has none.
    """
    if window < sink + chunk:
        raise WindowError(
            f"{role} has no room for its sink and a chunk of {chunk} frames: give it a window of at least "
            f"{sink + chunk}"
        )


def check_pin(role: HeadRole, pin: Pin, chunk: int) -> None:
    """Refuses first frames of a later shot that do not fit beside those of the video and a chunk.

    Raises:
        WindowError: they do not. Other roles than `SlidingWindow` keep no more than before.
    """
    if not isinstance(role, SlidingWindow):
        return
    first = min(role.sink, pin.frames) + min(role.sink, pin.always)
    if role.window < first + chunk:
        raise WindowError(
            f"{role} has no room for a chunk of {chunk} frames beside {first} first ones, of the video and "
            f"of the shot that begins at frame {pin.begin}: give it at least {first + chunk}"
        )
