"""What hosts with several shots per video do to their caches and positions.

Read in the released code of LongLive 2: behind a scene cut the first frames of the new shot take the place of
the sink, the cache may be emptied first, and frames of a later shot sit further away in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headforcing.positions import TRUE, PositionScheme
from headforcing.types import Pin


@dataclass(frozen=True)
class Truncation:
    """The host emptied its cache before it runs the pending chunk again.

    Attributes:
        keep: first frames of the video that it left.
    """

    keep: int = 0


Edit = Pin | Truncation
"""What a host did to its cache between two calls, in our words."""


class Shifts:
    """How far the host moved the frames of a video on the temporal axis, shot by shot."""

    def __init__(self) -> None:
        self._shots: list[tuple[int, float]] = []  # first frame, shift

    def note(self, start: int, shift: float) -> None:
        """The frames from `start` on are moved by `shift`."""
        while self._shots and self._shots[-1][0] >= start:
            self._shots.pop()
        if shift != (self._shots[-1][1] if self._shots else 0):
            self._shots.append((start, shift))

    def moved(
        self, positions: Sequence[float], frames: Sequence[int | None], scheme: PositionScheme
    ) -> tuple[float, ...]:
        """Positions of frames, as the host counts these, where the host puts them; the own chunk comes last.

        True ones move with their shot, adjoining ones with the chunk, others stay in range.
        """
        if not self._shots or scheme not in TRUE:
            return tuple(positions)
        shifts = [self._of(frame if scheme == "absolute" else frames[-1]) for frame in frames]
        return tuple(position + shift for position, shift in zip(positions, shifts, strict=True))

    def clear(self) -> None:
        """A new video."""
        self._shots.clear()

    def _of(self, frame: int | None) -> float:
        return next((s for start, s in reversed(self._shots) if frame is not None and frame >= start), 0)
