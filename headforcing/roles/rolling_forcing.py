"""Rolling Forcing (arXiv:2509.25161): first frames that always sit right before the recent ones.

Read in its released code. Five chunks are denoised at once, each at its own noise level; noisy passes see the
first chunk, then the last frames that the window leaves beside all five. The clean pass runs on the first of
the five alone and sees the last frames of the window, the first ones only while they are among them.
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
    """The first `sink` and the last frames, `window` in all, own chunk included; first ones not when clean.

    Attributes:
        window: frames seen, own chunk included.
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
        """The clean pass runs on fewer frames than the noisy ones, and sees more of the past."""
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
