"""Commit Forcing: the clean pass that writes the cache reads the last frames only.

Read in its released code (October 2026, no paper yet): denoising passes see what they always see; the clean
pass sees the newest frames, own chunk included, and the first frames only while they are among them.
Distances between the frames in view do not change, and there is no pass more. There it is one number for all
heads; here it is a role around any other, so that every head can have its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headforcing.errors import RoleError, WindowError
from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import Digest
from headforcing.roles.positions import PositionScheme
from headforcing.types import FrameTable, Phase, Pin, Selection, Tier


@dataclass(frozen=True)
class CommitForcing(HeadRole):
    """Another role, which sees less in the clean pass.

    Frames chosen by content and what is kept beside whole frames are not seen in the clean pass.

    Attributes:
        role: what is kept, and what denoising passes see.
        window: newest frames that the clean pass sees, own chunk included.
    """

    role: HeadRole
    window: int
    uses_phase: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.role, HeadRole) or isinstance(self.role, CommitForcing):
            raise RoleError(f"CommitForcing.role is {self.role!r}: expected a role of another kind")
        if self.positions != "compact":
            raise RoleError(f"{self}: positions are those of the role inside, leave them alone here")

    def fit(self, window: int, chunk: int) -> HeadRole:
        """The role with the numbers of the one inside filled in.

        Raises:
            WindowError: the clean pass would not see the own chunk, or the role inside does not fit.
        """
        if self.window < chunk:
            raise WindowError(f"{self} does not see the own chunk of {chunk} frames: raise window")
        return dataclasses.replace(self, role=self.role.fit(window, chunk))

    def attend(self, table: FrameTable, phase: Phase) -> Sequence[int]:
        """In the clean pass, only what is among the newest frames."""
        rows = self.role.attend(table, phase)
        if phase == "denoise":
            return rows
        first = table.start + table.chunk - self.window
        return [row for row in rows if (frame := table.frames[row]) is not None and frame >= first]

    def sees_digest(self, phase: Phase) -> bool:
        """Not in the clean pass."""
        return phase == "denoise"

    def capacity(self, chunk: int) -> int | None:
        """As the role inside."""
        return self.role.capacity(chunk)

    def retain(self, table: FrameTable) -> Sequence[int] | Selection:
        """As the role inside."""
        return self.role.retain(table)

    def place(
        self,
        frames: Sequence[int | None],
        chunk: int,
        window: int,
        query: int | None = None,
        digested: int = 0,
    ) -> tuple[int, ...]:
        """As the role inside; places of a digest come behind first frames, also where those are not seen."""
        more = {"query": query} if query is not None else {}
        if not digested:
            return self.role.place(frames, chunk, window, **more)
        unseen = [frame for frame in range(self.role.first_frames) if frame not in frames]
        placed = self.role.place((*unseen, *frames), chunk, window, **more, digested=digested)
        return placed[len(unseen) :]

    def follow(self, pin: Pin, chunk: int) -> None:
        """As the role inside."""
        self.role.follow(pin, chunk)

    @property
    def scheme(self) -> PositionScheme:
        """As the role inside."""
        return self.role.scheme

    @property
    def first_frames(self) -> int:
        """As the role inside."""
        return self.role.first_frames

    @property
    def bounded(self) -> bool:
        """As the role inside."""
        return self.role.bounded

    @property
    def reads_per_query(self) -> bool:
        """As the role inside."""
        return self.role.reads_per_query

    @property
    def recalls(self) -> tuple[Tier, ...]:
        """As the role inside."""
        return self.role.recalls

    def tier(self, frame: int | None, start: int) -> Tier:
        """As the role inside."""
        return self.role.tier(frame, start)

    def digest(self) -> Digest | None:
        """As the role inside."""
        return self.role.digest()
