"""Rolling Forcing (arXiv:2509.25161): first frames at the positions right before the recent ones.

From its released code. Five chunks are denoised at once, each at its own noise level. Noisy passes attend to
the first chunk and to the last frames that fit into the window beside all five. The clean pass runs on the
first of the five alone and attends to the last frames of the window, and to first ones only among these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headforcing.errors import RoleError, WindowError
from headforcing.roles.base import HeadRole, ends
from headforcing.roles.positions import PositionScheme
from headforcing.types import FrameTable, Phase


@dataclass(frozen=True)
class Rolling(HeadRole):
    """The first `sink` and the last frames, `window` in all, current chunk included; see the module.

    Attributes:
        window: frames attended to, current chunk included.
        sink: first frames of the video.
    """

    window: int
    sink: int = 3
    positions: PositionScheme = field(default="adjoining", kw_only=True)
    depends_on = ("phase",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink >= self.window:
            raise RoleError(f"{self}: sink must be smaller than window")

    def capacity(self, chunk: int) -> int | None:
        """Not less the chunk: the clean pass runs on fewer frames, and attends to more of the past."""
        return self.window

    def retain(self, table: FrameTable) -> Sequence[int]:
        return ends(table, self.sink, self.window - self.sink)

    def visible(self, table: FrameTable, phase: Phase) -> Sequence[int]:
        recent = self.window - table.chunk
        if phase == "denoise":
            return ends(table, self.sink, recent - self.sink)
        first = table.start - recent
        return [row for row, frame in enumerate(table.frames) if frame is not None and frame >= first]

    def fit(self, window: int, chunk: int) -> HeadRole:
        if self.window < self.sink + chunk:
            raise WindowError(
                f"{self} has no room for its first frames and {chunk} frames that are denoised at once: give "
                f"it a window of at least {self.sink + chunk}"
            )
        return super().fit(window, chunk)
