"""The roles of Head Forcing (arXiv:2605.14487): local, anchor and memory heads.

Local heads attend to the current chunk, anchor heads to the first frame, memory heads to everything between.
The paper documents the three roles but not their numbers, so every number is a field, and the defaults are
our choice. A number that is `None` is filled in from the model when the role is applied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from headforcing.errors import RoleError, WindowError
from headforcing.roles.base import HeadRole, ends
from headforcing.roles.episodic import EpisodicUpdate, MaxMin, Uniform
from headforcing.roles.positions import PositionScheme
from headforcing.types import FrameTable, Selection


@dataclass(frozen=True)
class Local(HeadRole):
    """The last frames only: local heads refine detail in the current chunk.

    The paper says "retains only essential tokens". Its literal reading is `recent=0`; one frame, against
    flicker between chunks, is our choice.

    Attributes:
        recent: last frames.
        sink: first frames, for heads that turn out to need them.
    """

    recent: int = 1
    sink: int = 0

    def capacity(self, chunk: int) -> int | None:
        return self.sink + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        return ends(table, self.sink, self.recent)


@dataclass(frozen=True)
class Anchor(HeadRole):
    """The first frames: anchor heads hold the structure of the video.

    The paper says that the first latent frame matters; that it is one frame is inferred. No recent frames
    and clamped positions are our choice.

    Attributes:
        sink: first frames.
        recent: last frames.
    """

    sink: int = 1
    recent: int = 0
    positions: PositionScheme = field(default="clamped", kw_only=True)

    def capacity(self, chunk: int) -> int | None:
        return self.sink + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        return ends(table, self.sink, self.recent)


@dataclass(frozen=True)
class Memory(HeadRole):
    """Sink, episodic and recent frames: memory heads aggregate the long context.

    The paper has a hierarchical memory with dynamic episodic updates; the three tiers, their sizes and the
    rule are our choice. A frame enters the episodic tier when it leaves the recent one, so nothing is
    evicted before the memory is full.

    Attributes:
        sink: first frames, never evicted.
        episodic: frames chosen from the past; `None`: the rest of the window.
        recent: last frames; `None`: half of the window without the chunk.
        update: the rule that evicts from a full episodic tier.
    """

    sink: int = 1
    episodic: int | None = None
    recent: int | None = None
    update: EpisodicUpdate = field(default_factory=MaxMin)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.update, EpisodicUpdate):
            raise RoleError(f"Memory.update is {self.update!r}: expected an EpisodicUpdate, such as MaxMin()")
        if self.positions != "compact" and self.episodic != 0 and self.update.reads_keys:
            raise RoleError(
                f"{type(self.update).__name__} chooses frames on the device, so positions="
                f"{self.positions!r} cannot know them: use positions='compact' or update=Uniform()"
            )

    def capacity(self, chunk: int) -> int | None:
        episodic, recent = self._sizes()
        return self.sink + episodic + recent

    def retain(self, table: FrameTable) -> Sequence[int] | Selection:
        episodic, recent = self._sizes()
        rows, before = len(table), len(table) - table.new
        sinks = min(self.sink, rows)
        recents = min(recent, rows - sinks)
        contest = range(sinks, rows - recents)
        if len(contest) <= episodic or not episodic:
            kept = contest if episodic else ()
            return (*range(sinks), *kept, *range(rows - recents, rows))
        sinks_before = min(self.sink, before)
        stored = min(episodic, before - sinks_before - min(recent, before - sinks_before))
        if isinstance(self.update, Uniform):
            frames = [frame for row in contest if (frame := table.frames[row]) is not None]
            spread = [sinks + row for row in self.update.spread(frames, stored, episodic)]
            return (*range(sinks), *spread, *range(rows - recents, rows))
        chosen = self.update.choose(table.keys(contest), stored, episodic)
        return Selection(tuple(range(sinks)), sinks + chosen, tuple(range(rows - recents, rows)))

    def fit(self, window: int, chunk: int) -> HeadRole:
        room = window - chunk - self.sink
        if self.recent is not None:
            recent = self.recent
        elif self.episodic is not None:
            recent = room - self.episodic
        else:
            recent = min((window - chunk + 1) // 2, room)
        episodic = room - recent if self.episodic is None else self.episodic
        if min(room, recent, episodic) < 0:
            raise WindowError(
                f"{self} does not fit: a window of {window} frames leaves {window - chunk} beside a "
                f"chunk of {chunk}"
            )
        filled = dataclasses.replace(self, recent=recent, episodic=episodic)
        return HeadRole.fit(filled, window, chunk)

    def _sizes(self) -> tuple[int, int]:
        if self.episodic is None or self.recent is None:
            raise RoleError(f"{self} has numbers that are None: call fit(window, chunk) first")
        return self.episodic, self.recent
