"""Scenes of one store: what its roles keep through a prompt switch, and how they count afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from headforcing.errors import OptionError, StreamError
from headforcing.roles.base import HeadRole, first_frames, recalled, tier
from headforcing.roles.positions import TRUE
from headforcing.stores.switch import Switch
from headforcing.types import Pin, Tier


@dataclass(frozen=True)
class Kept:
    """Whole frames of one role, taken out of its memory.

    Attributes:
        frames: as the role counts them; `None`: chosen by content.
        k: keys before RoPE, `[B, m, P, Hr, D]`.
        v: values, likewise.
        numbers: as the host counts them, `[B, m]`.
    """

    frames: tuple[int | None, ...]
    k: Tensor
    v: Tensor
    numbers: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds."""
        return self.k, self.v, self.numbers

    def restarted(self) -> Kept:
        """Counted from 0."""
        return replace(self, frames=tuple(None if f is None else row for row, f in enumerate(self.frames)))


@dataclass(frozen=True)
class Scene:
    """How a role counts: what it kept when time restarted, then every frame since.

    Attributes:
        kept: the host's numbers of the frames that were kept (`None`: chosen by content).
        begin: the host's number of the first frame after them.
        since: the role's number of the first frame after the last switch.
    """

    kept: tuple[int | None, ...] = ()
    begin: int = 0
    since: int = 0

    def inside(self, frame: int) -> int:
        """The role's number of a frame of this scene."""
        return frame - self.begin + len(self.kept)

    def outside(self, frames: Sequence[int | None]) -> tuple[int | None, ...]:
        """The host's numbers of the role's."""
        first = len(self.kept)
        return tuple(
            None if f is None else self.kept[f] if f < first else f - first + self.begin for f in frames
        )

    def tier(self, role: HeadRole, frame: int | None, start: int) -> Tier:
        """Where a role holds a frame, by its own numbers; what outlived a switch is not recent."""
        found = tier(role, frame, start)
        return "episodic" if found == "recent" and frame is not None and frame < self.since else found


class History(Protocol):
    """What a role remembers: its frames as the role counts them, rows to copy out and to put back."""

    frames: tuple[int | None, ...]

    def take(self, rows: Sequence[int]) -> Kept:
        """Copies rows."""

    def put(self, kept: Kept) -> None:
        """Makes this the history."""


class Scenes:
    """What prompt switches did to the roles of one store, and what is asked for next."""

    def __init__(self, histories: Mapping[HeadRole, History]) -> None:
        self._histories = histories
        self._scenes = dict.fromkeys(histories, Scene())
        self._follow = {role for role in self._scenes if role.compressed() is None}
        self._marks: dict[str, dict[HeadRole, _Named]] = {}
        self._due: list[str] = []
        self._switch: Switch | None = None
        self._pin: Pin | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """Names that can be recalled."""
        return (*self._marks, *(name for name in self._due if name not in self._marks))

    def inside(self, role: HeadRole, frames: range) -> range:
        """Frames of the host as a role counts them."""
        scene = self._scenes[role]
        return range(scene.inside(frames.start), scene.inside(frames.stop))

    def outside(self, role: HeadRole, frames: Sequence[int | None]) -> tuple[int | None, ...]:
        """Frames of a role as the host counts them."""
        return self._scenes[role].outside(frames)

    def hold(self, pin: Pin | None) -> None:
        """From now on the host holds first frames of a later shot, or none but those of the video."""
        self._pin = pin

    def pin(self, role: HeadRole) -> Pin | None:
        """First frames of a later shot, as a role counts them; none, where time restarted since.

        Roles that keep anything beside whole frames put it behind first ones of the video, and hold those.
        """
        scene = self._scenes[role]
        if self._pin is None or self._pin.begin < scene.begin or role not in self._follow:
            return None
        return replace(self._pin, begin=scene.inside(self._pin.begin))

    def skip(self, start: int, frames: int) -> None:
        """Of the frames from `start` on, the first ones are not remembered: they are no first frames."""
        if self._pin is not None and self._pin.begin == start:
            self._pin = replace(self._pin, begin=start + frames)

    def empty(self, keep: int, start: int) -> None:
        """Drops all but frames before `keep`, because the host did, and runs frames again from `start` on.

        Roles without true positions count anew.
        """
        self._pin = None
        for role in self._scenes:
            history = self._histories[role]
            frames = self.outside(role, history.frames)
            kept = history.take([row for row, f in enumerate(frames) if f is not None and f < keep])
            if role.positions in TRUE:
                history.put(kept)
                continue
            names = self.outside(role, kept.frames)
            self._scenes[role] = Scene(names, start, len(names))
            history.put(kept.restarted())

    def mark(self, name: str) -> None:
        """Names what the heads hold when the next chunk begins.

        Raises:
            OptionError: the name is no text.
        """
        if not isinstance(name, str):
            raise OptionError(f"a mark is named {name!r}: expected a text")
        self._due.append(name)

    def check(self, switch: Switch, stop: int, layer: int) -> None:
        """Looks whether a switch is possible behind frame `stop`.

        Raises:
            StreamError: there is no such mark, or frames that come again lie before the last restart of time
                or cannot be told from others.
        """
        if switch.mark is not None and switch.mark not in self.marks:
            known = ", ".join(self.marks) if self.marks else "none"
            raise StreamError(f"layer {layer}: nothing is marked {switch.mark!r}, marks are: {known}")
        if switch.mode != "recache":
            return
        if switch.frames > stop:
            raise StreamError(f"layer {layer}: {switch.frames} of {stop} frames cannot come again")
        for role, scene in self._scenes.items():
            if stop - switch.frames < scene.begin:
                raise StreamError(
                    f"layer {layer}: time restarted at frame {scene.begin}, so of {stop} frames only the "
                    f"last {stop - scene.begin} can come again: pass frames={stop - scene.begin} or fewer"
                )
            frames, first = self._histories[role].frames, scene.inside(stop - switch.frames)
            unknown = [row for row, frame in enumerate(frames) if frame is None]
            later = [f for f in frames[unknown[-1] :] if f is not None] if unknown else []
            if unknown and (not later or later[0] > first):
                raise StreamError(
                    f"layer {layer}: {role} chose frames by content that may be among the last "
                    f"{switch.frames}: run fewer frames again, or give the role more recent ones"
                )

    def ask(self, switch: Switch) -> None:
        """Switches when the next chunk begins; the last one asked for counts."""
        self._switch = switch

    def rerun(self, stop: int) -> int | None:
        """The frame from which the host runs the last ones of `stop` again, where it said so."""
        if self._switch is None or self._switch.mode != "recache":
            return None
        return stop - self._switch.frames

    def turn(self, start: int) -> Switch | None:
        """Marks and switches what was asked for, because a chunk begins at `start`."""
        for name in self._due:
            rows = {role: self._rows(role, recalled(role), start) for role in self._scenes}
            self._marks[name] = {role: self._take(role, rows[role]) for role in self._scenes}
        self._due.clear()
        switch, self._switch = self._switch, None
        if switch is None or switch.mode == "continue":
            return switch
        for role in self._scenes:
            self._histories[role].put(self._survivors(switch, role, start))
        return switch

    def clear(self) -> None:
        """A new video: no marks, nothing asked for."""
        self._scenes = dict.fromkeys(self._scenes, Scene())
        self._marks.clear()
        self._due.clear()
        self._switch = self._pin = None

    def tensors(self) -> Iterator[Tensor]:
        """What the marks hold."""
        for mark in self._marks.values():
            for kept, _ in mark.values():
                yield from kept.tensors()

    def _take(self, role: HeadRole, rows: Sequence[int]) -> _Named:
        frames = [self._histories[role].frames[row] for row in rows]
        return self._histories[role].take(rows), self.outside(role, frames)

    def _rows(self, role: HeadRole, tiers: Sequence[Tier], start: int) -> list[int]:
        """Rows of a role's history that lie in some tiers when a chunk begins at `start`."""
        scene, pin, frames = self._scenes[role], self.pin(role), self._histories[role].frames
        found = [scene.tier(role, frame, scene.inside(start)) in tiers for frame in frames]
        if pin is not None and "sink" in tiers:
            pinned = range(pin.begin, pin.begin + min(pin.frames, first_frames(role)))
            found = [stays or frame in pinned for stays, frame in zip(found, frames, strict=True)]
        return [row for row, stays in enumerate(found) if stays]

    def _survivors(self, switch: Switch, role: HeadRole, start: int) -> Kept:
        """What a role still holds, counted as it will count."""
        scene = self._scenes[role]
        first = scene.inside(start)
        if switch.mode == "recache":
            self._scenes[role] = replace(scene, since=min(scene.since, first))
            return self._histories[role].take(_rows_before(self._histories[role].frames, first))
        if switch.mark is not None:
            kept, names = self._marks[switch.mark][role]
        else:
            kept, names = self._take(role, self._rows(role, switch.tiers, start))
        if switch.restarts:
            self._scenes[role] = Scene(names, start, len(names))
            return kept.restarted()
        self._scenes[role] = replace(scene, since=first)
        return kept


def _rows_before(frames: Sequence[int | None], first: int) -> list[int]:
    """Rows of ascending frames that lie before `first` for sure, those chosen by content included."""
    known = [row for row, frame in enumerate(frames) if frame is not None and frame <= first]
    return [row for row in range(max(known, default=-1) + 1) if frames[row] != first]


_Named = tuple[Kept, tuple[int | None, ...]]
"""Frames, and the host's numbers of them."""
