"""Where the base model moves the frames of a later shot on the temporal axis (LongLive 2)."""

from __future__ import annotations

from collections.abc import Sequence

from headforcing.roles.positions import TRUE, PositionScheme


class Shifts:
    """How far the base model moved the frames of a video on the temporal axis, shot by shot."""

    def __init__(self) -> None:
        self._shots: list[tuple[int, float]] = []  # first frame, shift

    def note(self, start: int, shift: float) -> None:
        """The frames from `start` on are moved by `shift`."""
        while self._shots and self._shots[-1][0] >= start:
            self._shots.pop()
        if not self.still(shift):
            self._shots.append((start, shift))

    def still(self, shift: float) -> bool:
        """Whether the last frames are moved by `shift`."""
        return shift == (self._shots[-1][1] if self._shots else 0)

    def moved(
        self, positions: Sequence[float], frames: Sequence[int | None], scheme: PositionScheme
    ) -> tuple[float, ...]:
        """Positions as the base model shifts them, for frames as it counts them; the current chunk is last.

        True positions move with their shot, adjoining ones with the chunk, others stay in range.
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
