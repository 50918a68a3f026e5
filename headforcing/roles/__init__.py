"""Head roles: what a head keeps, what it sees, and where that sits for RoPE.

A role is a frozen dataclass of plain numbers, in frames. It holds no state: once per chunk it is
shown a table of what is still there and names the rows that stay. Read side by side, the built-in
roles are the method of Head Forcing (arXiv:2605.14487): local heads look at the own chunk, anchor
heads at the first frame, memory heads at everything between.

The three roles are documented by the paper; the numbers are not, so every number is a field, and the
defaults are our choice. A number left `None` is filled in from the model when the role is applied.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from headforcing.episodic import EpisodicUpdate, MaxMin, Uniform
from headforcing.errors import RoleError, WindowError
from headforcing.positions import SCHEMES, PositionScheme, place
from headforcing.types import FrameTable, Merge, Phase, Selection


@dataclass(frozen=True)
class HeadRole(ABC):
    """What one attention head remembers.

    Subclasses are frozen dataclasses: hashable, comparable, storable as JSON. The own chunk is always
    visible and is never counted. A new role is one subclass, in any module.
    """

    positions: PositionScheme = field(default="compact", kw_only=True)
    uses_phase: ClassVar[bool] = False
    """Whether `attend` depends on the phase; such a role needs a host that tells it."""
    reads_per_query: ClassVar[bool] = False
    """Whether what is visible, or where it sits, depends on the frame of the query."""

    def __post_init__(self) -> None:
        if self.positions not in SCHEMES:
            raise RoleError(
                f"{type(self).__name__}.positions is {self.positions!r}: expected one of {', '.join(SCHEMES)}"
            )
        if self.merge is not None and not self.reads_per_query:
            raise RoleError(f"{self} merges frames: it has to read per query frame")
        for name in self._counts():
            value = getattr(self, name)
            if value is None and self.__dataclass_fields__[name].default is None:
                continue
            if type(value) is not int or value < 0:
                raise RoleError(
                    f"{type(self).__name__}.{name} is {value!r}: expected a number of frames >= 0"
                )

    @abstractmethod
    def capacity(self, chunk: int) -> int | None:
        """Most frames it keeps beside a chunk of `chunk` frames; `None` is without bound."""

    @abstractmethod
    def retain(self, table: FrameTable) -> Sequence[int] | Selection:
        """Rows of the table that stay, ascending; asked once when a chunk begins."""

    def attend(self, table: FrameTable, phase: Phase) -> Sequence[int]:
        """Rows of the history that are visible in this pass, ascending; default all."""
        return range(len(table))

    def place(
        self, frames: Sequence[int | None], chunk: int, window: int, query: int | None = None
    ) -> tuple[int, ...]:
        """Temporal RoPE position of every visible frame, own chunk last; `query` is the frame that looks.

        Raises:
            WindowError: a position would leave the range the model was trained on, `[0, window)`.
        """
        placed = place(self.positions, frames, chunk, window)
        if self.bounded and placed[-1] >= window:
            raise WindowError(
                f"{self} with a chunk of {chunk} frames reaches RoPE position {placed[-1]}, but the "
                f"model was trained on {window} frames: give the role fewer frames"
            )
        return placed

    @property
    def bounded(self) -> bool:
        """Whether positions stay in `[0, window)` for ever."""
        return self.positions != "absolute"

    @property
    def merge(self) -> Merge | None:
        """Blocks of merged frames that the role keeps beside whole ones; default none."""
        return None

    def read_blocks(self, blocks: Sequence[int], start: int) -> Sequence[int]:
        """Those of the blocks, named by their first frames, that a chunk at `start` sees; default all."""
        return blocks

    def place_blocks(self, blocks: Sequence[int], query: int) -> tuple[int, ...]:
        """Temporal RoPE position of every block, for a query frame."""
        raise RoleError(f"{self} merges frames but does not say where they sit: define place_blocks")

    def fit(self, window: int, chunk: int) -> HeadRole:
        """The role with every number filled in for a model, checked against its window.

        Args:
            window: frames the model was trained on.
            chunk: frames of the longest chunk the model will be given.

        Raises:
            WindowError: the role with the own chunk needs more than `window` frames.
        """
        capacity = self.capacity(chunk)
        if self.bounded and (capacity is None or capacity + chunk > window):
            kept = "every frame" if capacity is None else f"{capacity} frames"
            raise WindowError(
                f"{self} keeps {kept} beside a chunk of {chunk}, but the model was trained on {window} "
                f"frames: keep at most {window - chunk}, or use positions='absolute'"
            )
        return self

    def _counts(self) -> tuple[str, ...]:
        """Names of the fields that are numbers of frames."""
        counts = ("int", "int | None", int, int | None)
        return tuple(f.name for f in dataclasses.fields(self) if f.type in counts)


@dataclass(frozen=True)
class Full(HeadRole):
    """Keeps everything at its true position: the growing dense cache."""

    positions: PositionScheme = field(default="absolute", kw_only=True)

    def capacity(self, chunk: int) -> int | None:
        return None

    def retain(self, table: FrameTable) -> Sequence[int]:
        return range(len(table))


@dataclass(frozen=True)
class SlidingWindow(HeadRole):
    """The first `sink` and the last frames, `window` in all, own chunk included.

    With `positions="absolute"` this is the rolled cache of Self Forcing and its descendants; with
    `positions="compact"` it is StreamingLLM (arXiv:2309.17453) on frames.

    Attributes:
        window: frames seen, own chunk included.
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
        return _ends(len(table), self.sink, self.window - table.chunk - self.sink)

    def fit(self, window: int, chunk: int) -> HeadRole:
        if self.window < self.sink + chunk:
            raise WindowError(
                f"{self} has no room for its sink and a chunk of {chunk} frames: give it a window of at "
                f"least {self.sink + chunk}"
            )
        return super().fit(window, chunk)


@dataclass(frozen=True)
class Local(HeadRole):
    """The last frames only: local heads refine detail in the own chunk (arXiv:2605.14487).

    "Retains only essential tokens" is documented; one frame against flicker at the border is our
    choice, 0 is the literal reading.

    Attributes:
        recent: last frames kept.
        sink: first frames kept, for heads that turn out to need them.
    """

    recent: int = 1
    sink: int = 0

    def capacity(self, chunk: int) -> int | None:
        return self.sink + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        return _ends(len(table), self.sink, self.recent)


@dataclass(frozen=True)
class Anchor(HeadRole):
    """The first frames: anchor heads hold the structure of the video (arXiv:2605.14487).

    That the first latent frame is what matters is documented; one frame is inferred, no recent
    frames and clamped positions are our choice.

    Attributes:
        sink: first frames kept.
        recent: last frames kept as well.
    """

    sink: int = 1
    recent: int = 0
    positions: PositionScheme = field(default="clamped", kw_only=True)

    def capacity(self, chunk: int) -> int | None:
        return self.sink + self.recent

    def retain(self, table: FrameTable) -> Sequence[int]:
        return _ends(len(table), self.sink, self.recent)


@dataclass(frozen=True)
class Memory(HeadRole):
    """Sink, episodic and recent frames: memory heads aggregate the long context (arXiv:2605.14487).

    A hierarchical memory with dynamic episodic updates is documented; the tiers, their sizes and the
    rule are our choice. A frame enters the episodic tier when it leaves the recent one, so nothing is
    lost before the memory is full.

    Attributes:
        sink: first frames, never evicted.
        episodic: frames chosen from the past; `None`: what the window leaves.
        recent: last frames; `None`: half of what the window leaves beside the chunk.
        update: who leaves a full episodic tier.
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
            raise RoleError(f"{self} has open numbers: call fit(window, chunk) first")
        return self.episodic, self.recent


def _ends(rows: int, sink: int, recent: int) -> tuple[int, ...]:
    """The first `sink` and the last `recent` of `rows` rows, each once."""
    first = min(sink, rows)
    return (*range(first), *range(max(first, rows - recent), rows))
