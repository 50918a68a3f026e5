"""A dilated window: every n-th frame of the last ones, as in the global layers of Waypoint (world_engine)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headforcing.errors import RoleError, WindowError
from headforcing.roles.base import HeadRole
from headforcing.types import FrameTable


@dataclass(frozen=True)
class Dilated(HeadRole):
    """Those of the last `window` frames whose number is a multiple of `dilation`, and the current chunk.

    With a dilation of 1 these are the frames of `SlidingWindow(window)`. With `positions="absolute"` this is
    the ring of Waypoint's global layers, which keeps frames 0, 8, 16, ... of the last 128.

    Attributes:
        window: how far back it goes, in frames, current chunk included.
        dilation: distance of the frames that are kept.
    """

    window: int
    dilation: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.window or not self.dilation:
            raise RoleError(f"{self}: expected window and dilation of at least 1")

    def capacity(self, chunk: int) -> int | None:
        return -(-max(self.window - chunk, 0) // self.dilation)

    def retain(self, table: FrameTable) -> Sequence[int]:
        oldest = table.start + table.chunk - self.window
        return [
            row
            for row, frame in enumerate(table.frames)
            if frame is not None and frame >= oldest and frame % self.dilation == 0
        ]

    def fit(self, window: int, chunk: int) -> HeadRole:
        if self.window < chunk:
            raise WindowError(
                f"{self} has no room for a chunk of {chunk} frames: give it a window of at least {chunk}"
            )
        return super().fit(window, chunk)
