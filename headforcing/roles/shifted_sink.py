"""The window of SANA-WM's second stage: first frames that always sit right before the recent ones.

Read in the pipeline of diffusers, which calls it `rf_shifted_sink`: one first frame and the last ten, beside
whatever the block has. Where frames are left out between them, the first ones move up to the oldest that is
held; all others sit at their true positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headforcing.errors import RoleError
from headforcing.positions import PositionScheme
from headforcing.role import HeadRole
from headforcing.types import FrameTable


@dataclass(frozen=True)
class ShiftedSink(HeadRole):
    """The first `sink` and the last `recent` frames beside the own chunk, the first ones moved up.

    Attributes:
        recent: last frames kept.
        sink: first frames kept, seen right before the oldest of the others.
    """

    recent: int = 10
    sink: int = 1
    positions: PositionScheme = field(default="absolute", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "absolute":
            raise RoleError(f"{self}: only positions='absolute' say where the first frames sit")

    def capacity(self, chunk: int) -> int | None:
        return self.sink + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        first = min(self.sink, len(table))
        return (*range(first), *range(max(first, len(table) - self.recent), len(table)))

    def place(
        self,
        frames: Sequence[int | None],
        chunk: int,
        window: int,
        query: int | None = None,
        digested: int = 0,
    ) -> tuple[int, ...]:
        """True positions, but first frames sit right before the others."""
        placed = super().place(frames, chunk, window, query, digested)
        first = sum(position < self.sink for position in placed[: len(placed) - chunk])
        return (*range(placed[first] - first, placed[first]), *placed[first:])
