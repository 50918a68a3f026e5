"""What every role stores and attends to, written from its docstring and the pages in docs/ alone.

Short, slow and on frame numbers only: no tensor, no table, no row, nothing of the package but the numbers of
a role. One class per rule. Where it disagrees with a store, one of the two reads the docstring wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from headforcing import roles
from headforcing.roles import HeadRole
from headforcing.roles.episodic import ThresholdFifo, Uniform
from headforcing.stores.switch import Switch


class Frame(NamedTuple):
    """A frame: when it was, counted since time restarted, and which one it is."""

    time: int
    name: Any
    chosen: bool = False  # by its content, so a store need not know which one it is


Alike = Callable[[Frame, Frame], float]
"""Similarity of the keys of two frames."""


class Head:
    """What the heads of one role store of one video; the base of all rules, and the rule of `Full`."""

    def __init__(self, role: Any, alike: Alike) -> None:
        self.role, self.alike = role, alike
        self.sink: int = getattr(role, "sink", 0)
        self.stored: list[Frame] = []
        self.origin = 0  # number of the frame at time 0
        self.since = 0  # time of the last prompt switch
        self.start, self.length = 0, 0  # the current chunk
        self.begin_anew()

    # What happens

    def commit(self, frames: Iterable[tuple[int, Any]]) -> None:
        """Frames, by number and name, are finished."""
        new = [Frame(number - self.origin, name) for number, name in frames]
        self.stored += new
        self.chunks.append(new)

    def chunk_begins(self, number: int, length: int) -> None:
        """Every role evicts once, when a chunk begins."""
        self.start, self.length = number - self.origin, length
        before, self.stored = self.stored, self.kept()
        gone = [frame for frame in before if frame.time not in {f.time for f in self.stored}]
        self.evicted += [gone] if gone else []

    def mark(self, number: int) -> list[Frame]:
        """What a recall brings back: all frames of an episodic memory, the first ones of others."""
        return [f for f in self.stored if self.is_episodic or self.tier(f, number) == "sink"]

    def switch(self, wanted: Switch, number: int, marked: list[Frame] | None) -> None:
        """A prompt switch takes effect before the frame of a number."""
        if wanted.mode == "continue":
            return
        first, before = self.restarted, number - self.origin
        self.begin_anew()
        if wanted.mode == "recache":
            self.stored = [f for f in self.stored if f.time < before]
            self.since = min(self.since, before)
            self.restarted = first if before == len(first) else []  # the whole scene is run again
        elif wanted.mode == "smooth":
            self.stored = [f for f in self.stored if self.tier(f, number) in ("sink", "episodic")]
            self.since = number - self.origin
        elif wanted.mode == "cut":
            self.restart([f for f in self.stored if self.tier(f, number) in wanted.keep], number)
        else:
            assert marked is not None
            self.restart(marked, number)

    def empty(self, keep: int, number: int) -> None:
        """The base model emptied its cache but for its first frames, and runs frames from a number on again.

        Roles without true positions count from 0 again; others are not known here.
        """
        kept = [f for f in self.stored if not f.chosen and f.name[0] < keep]
        self.begin_anew()
        self.restart(kept, number)

    def restart(self, kept: Sequence[Frame], number: int) -> None:
        """Time restarts: the frames that are kept are the first of a scene, and others follow."""
        self.stored = [frame._replace(time=time) for time, frame in enumerate(kept)]
        self.origin, self.since = number - len(kept), len(kept)
        self.restarted = list(self.stored)

    def begin_anew(self) -> None:
        """Compressed tokens are dropped."""
        self.chunks: list[list[Frame]] = []  # committed since
        self.evicted: list[list[Frame]] = []  # since
        self.restarted: list[Frame] = []  # frames that time restarted with

    # What is stored and attended to

    @property
    def is_episodic(self) -> bool:
        """Whether the role has an episodic memory."""
        return isinstance(self.role, roles.Memory)

    def tier(self, frame: Frame, number: int) -> str:
        """Frames before `sink` are first ones, the last `recent` are recent, others episodic or recent."""
        if frame.time < self.sink:
            return "sink"
        late = frame.time >= max(number - self.origin - getattr(self.role, "recent", 0), self.since)
        return "recent" if not self.is_episodic or (late and not frame.chosen) else "episodic"

    def first(self) -> list[Frame]:
        """The first frames."""
        return [f for f in self.stored if f.time < self.sink]

    def last(self, count: int) -> list[Frame]:
        """The last frames that are not first ones."""
        others = [f for f in self.stored if f.time >= self.sink]
        return others[max(len(others) - max(count, 0), 0) :]

    def kept(self) -> list[Frame]:
        """What the role keeps of what is stored."""
        return self.stored

    def attended(self, phase: str, query: int | None) -> list[Frame]:
        """Stored frames that a pass attends to; `query`: number of the query frame, where it matters."""
        every = self.in_view(phase, query)
        newest = self.start + self.length - (self.role.clean_window or 0)
        if phase == "clean" and self.role.clean_window is not None:
            return [f for f in every if f.time >= newest and not f.chosen]
        return every

    def in_view(self, phase: str, query: int | None) -> list[Frame]:
        """The same where the clean pass has no window of its own."""
        return self.stored

    def beside(self) -> int:
        """Positions that compressed tokens take right after the first frames."""
        return 0

    def positions(self, phase: str, query: int | None, window: int) -> list[int]:
        """Of the frames attended to and the current chunk; a window of the clean pass moves none."""
        own = [Frame(self.start + i, None) for i in range(self.length)]
        every = self.in_view(phase, query)
        placed = self.placed([*every, *own], query, window)
        seen = self.attended(phase, query)
        return [at for f, at in zip([*every, *own], placed, strict=True) if f in seen or f in own]

    def placed(self, frames: list[Frame], query: int | None, window: int) -> list[int]:
        """Positions of frames, the current chunk last."""
        times, ranks = [f.time for f in frames], list(range(len(frames)))
        if self.role.positions == "absolute":
            return times
        if self.role.positions == "adjoining":
            return [times[-1] - ranks[-1] + rank for rank in ranks]
        if self.role.positions == "clamped":
            here = min(self.start, window - self.length)
            return [
                max(r, here - self.start + t) if t < self.start else here - self.start + t
                for r, t in zip(ranks, times, strict=True)
            ]
        return [rank if rank < self.sink else rank + self.beside() for rank in ranks]


class Ends(Head):
    """`Local` and `Anchor`: the first and the last frames."""

    def kept(self) -> list[Frame]:
        return self.first() + self.last(self.role.recent)


class Sliding(Head):
    """The first and the last frames, `window` in all, current chunk included."""

    def kept(self) -> list[Frame]:
        return self.first() + self.last(self.role.window - self.length - self.sink)


class Dilated(Head):
    """Of the last `window` frames, current chunk included, the multiples of the dilation."""

    def kept(self) -> list[Frame]:
        last = range(self.start + self.length - self.role.window, self.start)
        return [f for f in self.stored if f.time in last and f.time % self.role.dilation == 0]


class Rolling(Head):
    """First and last frames, `window` in all; the clean pass attends to first ones only among the last."""

    def kept(self) -> list[Frame]:
        return self.first() + self.last(self.role.window - self.sink)

    def in_view(self, phase: str, query: int | None) -> list[Frame]:
        room = self.role.window - self.length
        if phase == "denoise":
            return self.first() + self.last(room - self.sink)
        return [f for f in self.stored if f.time >= self.start - room]


class Memory(Head):
    """Sink, episodic and recent frames; a frame enters the episodic tier when it leaves the recent one."""

    def kept(self) -> list[Frame]:
        first, recent, bank, full = self.first(), self.last(self.role.recent), [], False
        for frame in self.stored:
            if frame not in first and frame not in recent:
                bank.append(frame)
            if len(bank) > self.role.episodic:
                bank.remove(self.loser(bank))
                full = True
        if full and self.role.update.reads_keys:
            bank = [f._replace(chosen=True) for f in bank]
        return first + bank + recent

    def loser(self, bank: list[Frame]) -> Frame:
        """The frame that leaves a full episodic memory, of which the last one has just joined."""
        *before, new = bank
        if not before:
            return new
        if isinstance(self.role.update, Uniform):  # the inner frame whose neighbours are nearest, or the new
            gaps = {b: c.time - a.time for a, b, c in zip(bank, bank[1:], bank[2:], strict=False)}
            return max((f for f in gaps if gaps[f] == min(gaps.values())), default=new)
        if isinstance(self.role.update, ThresholdFifo):
            novelty = 1 - max(self.alike(new, f) for f in before)
            return before[0] if novelty > self.role.update.novelty else new
        pairs = [(self.alike(a, b), a, b) for a in bank for b in bank if a.time < b.time]
        _, a, b = max(pairs)  # the two most similar; it goes whose next-nearest is nearer, else the newer

        def next_nearest(frame: Frame) -> float:
            return max((self.alike(frame, f) for f in bank if f not in (a, b)), default=-1.0)

        return a if next_nearest(a) > next_nearest(b) else b


class Clamped(Head):
    """Pyramid Forcing: all frames but the last ones at one distance of the query frame."""

    def newest(self) -> list[Frame]:
        """Frames that are among the last `recent` of the video."""
        return [f for f in self.stored if f.time >= self.start - self.role.recent]

    def kept(self) -> list[Frame]:
        return sorted({*self.first(), *self.newest()})

    def placed(self, frames: list[Frame], query: int | None, window: int) -> list[int]:
        assert query is not None
        near, most = self.role.near, self.role.far
        begin, far = (max(0, time - min(max(time, near), most)) for time in (self.start, query - self.origin))
        last = self.start - self.role.recent
        return [f.time - begin if f.time >= last else far - begin for f in frames]


class Cycle(Clamped):
    """`Wave` and `Strided`: between the ends, the last `cap` frames of the phase of the query, or of 0."""

    def between(self, phase: int) -> list[Frame]:
        ends = [*self.first(), *self.newest()]
        found = [f for f in self.stored if f.time % self.role.period == phase and f not in ends]
        return found[max(len(found) - self.role.cap, 0) :]

    def kept(self) -> list[Frame]:
        phases = range(self.role.period) if isinstance(self.role, roles.Wave) else [0]
        return sorted({*super().kept(), *(f for phase in phases for f in self.between(phase))})

    def in_view(self, phase: str, query: int | None) -> list[Frame]:
        assert query is not None
        own = (query - self.origin) % self.role.period if isinstance(self.role, roles.Wave) else 0
        return sorted({*super().kept(), *self.between(own)})


class Veil(Clamped):
    """First and last frames, and blocks of the scene."""

    def blocks(self) -> list[list[Frame]]:
        """The last complete blocks, but for those that overlap the last frames."""
        scene = {f.time: f for f in [*self.restarted, *(f for chunk in self.chunks for f in chunk)]}
        size, count = self.role.block, self.role.blocks
        found = [[scene.get(first + i) for i in range(size)] for first in range(0, self.start, size)]
        complete = [[f for f in block if f] for block in found if all(block)]
        last = complete[max(len(complete) - count, 0) :]
        return [block for block in last if block[-1].time < self.start - self.role.recent]


class Averaging(Head):
    """First frames, two averages of evicted ones, last frames, `window` in all."""

    def kept(self) -> list[Frame]:
        places = 2 if self.evicted else 0
        if len(self.stored) + places + self.length <= self.role.window:
            return self.stored
        return self.first() + self.last(self.role.window - self.length - 2 - self.sink)

    def beside(self) -> int:
        return 2 if self.evicted else 0

    def averaged(self) -> list[list[Frame]]:
        """Frames that are averaged together; the first two that went made room and are lost."""
        return [gone[0 if number else 2 :] for number, gone in enumerate(self.evicted)]


class EmaSink(Head):
    """A sink that evicted frames are mixed into, last frames, `window` in all."""

    def kept(self) -> list[Frame]:
        if len(self.stored) + self.beside() + self.length <= self.role.window:
            return self.stored
        recent = self.role.window - self.sink - self.length
        return self.stored[len(self.stored) - recent :]

    def beside(self) -> int:
        return self.sink if self.evicted else 0

    def placed(self, frames: list[Frame], query: int | None, window: int) -> list[int]:
        """Once it is mixed, the sink comes before all frames."""
        return [rank + self.beside() for rank in range(len(frames))]

    def mixed(self) -> tuple[list[Frame], list[list[Frame]]]:
        """The frames that the sink was, and those that were evicted together."""
        first, *later = self.evicted or [[]]
        return first[: self.sink], [first[self.sink :], *later]


class Participating(Head):
    """First frames, tokens selected from all between, last frames, `window` in all."""

    def chunk_begins(self, number: int, length: int) -> None:
        super().chunk_begins(number, length)
        if not self.chunks:  # no query is known that could select any
            self.evicted = []

    def kept(self) -> list[Frame]:
        tokens = self.role.chosen if self.evicted else 0
        if len(self.stored) + tokens + self.length <= self.role.window:
            return self.stored
        return self.first() + self.last(self.role.recent - self.length)

    def beside(self) -> int:
        return 1 if self.evicted else 0

    def between(self) -> list[Frame]:
        """Frames that tokens are selected from."""
        return [f for gone in self.evicted for f in gone]


class Dynamic(Head):
    """First frames, pieces of those right before the last one, the last frame."""

    def kept(self) -> list[Frame]:
        return self.first() + self.last(1)

    def beside(self) -> int:
        return len(self.cut())

    def cut(self) -> list[Frame]:
        """The last frame of the chunk before, and all of the last chunk but its last; no first frames."""
        if len(self.chunks) <= max(self.role.skip, 1):
            return []
        *_, before, chunk = self.chunks
        return [f for f in [before[-1], *chunk[:-1]] if f.time >= self.sink]


RULES: dict[type[HeadRole], type[Head]] = {
    roles.Full: Head,
    roles.SlidingWindow: Sliding,
    roles.Dilated: Dilated,
    roles.Local: Ends,
    roles.Anchor: Ends,
    roles.Memory: Memory,
    roles.Rolling: Rolling,
    roles.Wave: Cycle,
    roles.Strided: Cycle,
    roles.Veil: Veil,
    roles.Averaging: Averaging,
    roles.EmaSink: EmaSink,
    roles.Participating: Participating,
    roles.Dynamic: Dynamic,
}


def head(role: HeadRole, alike: Alike) -> Head:
    """The heads of a role at the beginning of a video."""
    return RULES[type(role)](role, alike)
