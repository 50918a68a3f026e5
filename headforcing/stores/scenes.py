"""Scenes of one store: which frames its roles keep through a prompt switch, and how they count afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from headforcing.errors import OptionError, StreamError
from headforcing.roles.base import HeadRole, first_frames, recalled, tier
from headforcing.roles.positions import TRUE
from headforcing.stores.bank import Bank, Kept
from headforcing.stores.compressed import CompressedHistories
from headforcing.stores.switch import Switch
from headforcing.types import Grid, Pin, Tier


@dataclass(frozen=True)
class Scene:
    """How a role counts frames: those it kept when time restarted, then every frame since.

    Attributes:
        kept: numbers that the base model gives to the frames that were kept (`None`: chosen by content).
        begin: the base model's number of the first frame after them.
        since: the role's number of the first frame after the last switch.
    """

    kept: tuple[int | None, ...] = ()
    begin: int = 0
    since: int = 0

    def inside(self, frame: int) -> int:
        """The role's number of a frame of this scene."""
        return frame - self.begin + len(self.kept)

    def outside(self, frames: Sequence[int | None]) -> tuple[int | None, ...]:
        """The base model's numbers of frames that are numbered by the role."""
        first = len(self.kept)
        return tuple(
            None if f is None else self.kept[f] if f < first else f - first + self.begin for f in frames
        )

    def tier(self, role: HeadRole, frame: int | None, start: int) -> Tier:
        """The tier of a frame, by the role's numbers; a frame from before the last switch is not recent."""
        found = tier(role, frame, start)
        return "episodic" if found == "recent" and frame is not None and frame < self.since else found


class Scenes:
    """What prompt switches did to the roles of one store, and which switch comes next.

    Args:
        banks: of the store, by role.
        compressed: the compressed histories of the store.
    """

    def __init__(self, banks: Mapping[HeadRole, Bank], compressed: CompressedHistories) -> None:
        self._banks, self._compressed = banks, compressed
        self._scenes = dict.fromkeys(banks, Scene())
        self._marks: dict[str, dict[HeadRole, _Named]] = {}
        self._due: list[str] = []
        self._switch: Switch | None = None
        self._pin: Pin | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """Names that can be recalled."""
        return (*self._marks, *(name for name in self._due if name not in self._marks))

    @property
    def due(self) -> bool:
        """Whether a mark or a switch was requested."""
        return bool(self._due) or self._switch is not None

    def inside(self, role: HeadRole, frames: range) -> range:
        """Frames of the base model as a role counts them."""
        scene = self._scenes[role]
        return range(scene.inside(frames.start), scene.inside(frames.stop))

    def outside(self, role: HeadRole, frames: Sequence[int | None]) -> tuple[int | None, ...]:
        """Frames of a role as the base model counts them."""
        return self._scenes[role].outside(frames)

    def hold(self, pin: Pin | None) -> None:
        """From now on the base model's sink is the first frames of a later shot; `None`: of the video."""
        self._pin = pin

    def pin(self, role: HeadRole) -> Pin | None:
        """First frames of a later shot, as a role counts them; none if time restarted since.

        Roles with a compressed history place it after the first frames of the video, and keep those.
        """
        scene = self._scenes[role]
        if self._pin is None or self._pin.begin < scene.begin or self._compressed.get(role) is not None:
            return None
        return replace(self._pin, begin=scene.inside(self._pin.begin))

    def skip(self, start: int, frames: int) -> None:
        """The first `frames` of the frames from `start` on are not stored, so they cannot be pinned."""
        if self._pin is not None and self._pin.begin == start:
            self._pin = replace(self._pin, begin=start + frames)

    def empty(self, keep: int, start: int, grid: Grid | None) -> None:
        """Drops all but frames before `keep`: the base model did, and recomputes frames from `start` on.

        Roles without true positions count anew.
        """
        self._pin = None
        for role, bank in self._banks.items():
            frames = self.outside(role, bank.frames)
            kept = bank.take([row for row, f in enumerate(frames) if f is not None and f < keep])
            if role.positions in TRUE:
                bank.put(kept)
                continue
            names = self.outside(role, kept.frames)
            self._scenes[role] = Scene(names, start, len(names))
            bank.put(kept.restarted())
        self._restart_compressed(start, grid)

    def mark(self, name: str) -> None:
        """Names what the heads store when the next chunk begins.

        Raises:
            OptionError: the name is no text.
        """
        check_name(name)
        if name not in self._due:
            self._due.append(name)

    def request(self, marks: Sequence[str], switch: Switch | None) -> None:
        """Requests marks and a switch when the next chunk begins."""
        for name in marks:
            self.mark(name)
        if switch is not None:
            self.ask(switch)

    def check(self, switch: Switch, stop: int, layer: int, due: Sequence[str] = ()) -> None:
        """Checks that a switch is possible before frame `stop`; `due`: marks that will be made before it.

        Raises:
            StreamError: there is no such mark, or recomputed frames lie before the last restart of time or
                cannot be told from others.
        """
        marks = tuple(dict.fromkeys((*self.marks, *due)))
        if switch.mark is not None and switch.mark not in marks:
            known = ", ".join(marks) if marks else "none"
            raise StreamError(f"layer {layer}: nothing is marked {switch.mark!r}, marks are: {known}")
        if switch.mode != "recache":
            return
        if switch.frames > stop:
            raise StreamError(f"layer {layer}: {switch.frames} of {stop} frames cannot be recomputed")
        for role, scene in self._scenes.items():
            if stop - switch.frames < scene.begin:
                raise StreamError(
                    f"layer {layer}: time restarted at frame {scene.begin}, so of {stop} frames only the "
                    f"last {stop - scene.begin} can be recomputed: pass frames={stop - scene.begin} or fewer"
                )
            frames, first = self._banks[role].frames, scene.inside(stop - switch.frames)
            unknown = [row for row, frame in enumerate(frames) if frame is None]
            later = [f for f in frames[unknown[-1] :] if f is not None] if unknown else []
            if unknown and (not later or later[0] > first):
                raise StreamError(
                    f"layer {layer}: {role} chose frames by content that may be among the last "
                    f"{switch.frames}: recompute fewer frames, or give the role more recent ones"
                )

    def ask(self, switch: Switch) -> None:
        """Requests a switch when the next chunk begins; the last request counts."""
        self._switch = switch

    def rerun(self, stop: int) -> int | None:
        """The first of the recomputed frames, of `stop` frames so far; `None`: none are announced."""
        if self._switch is None or self._switch.mode != "recache":
            return None
        return stop - self._switch.frames

    def apply_switch(self, start: int, grid: Grid | None) -> Switch | None:
        """Makes the marks and the switch that were requested, because a chunk begins at `start`."""
        for name in self._due:
            rows = {role: self._rows(role, recalled(role), start) for role in self._scenes}
            self._marks[name] = {role: self._take(role, rows[role]) for role in self._scenes}
        self._due.clear()
        switch, self._switch = self._switch, None
        if switch is None or switch.mode == "continue":
            return switch
        for role, bank in self._banks.items():
            bank.put(self._survivors(switch, role, start))
        self._restart_compressed(start, grid)
        return switch

    def clear(self) -> None:
        """A new video: no marks, no requests."""
        self._scenes = dict.fromkeys(self._scenes, Scene())
        self._marks.clear()
        self._due.clear()
        self._switch = self._pin = None

    def tensors(self) -> Iterator[Tensor]:
        """What the marks hold."""
        for mark in self._marks.values():
            for kept, _ in mark.values():
                yield from kept.tensors()

    def _restart_compressed(self, start: int, grid: Grid | None) -> None:
        """Compressed histories begin anew, with what was kept where time restarts at frame `start`."""
        self._compressed.clear()
        for role, bank in self._banks.items():
            if bank.frames and self._scenes[role].begin == start:
                self._compressed.restart(role, bank.frames, bank.rows, grid)

    def _take(self, role: HeadRole, rows: Sequence[int]) -> _Named:
        kept = self._banks[role].take(rows)
        return kept, self.outside(role, kept.frames)

    def _rows(self, role: HeadRole, tiers: Sequence[Tier], start: int) -> list[int]:
        """Rows of a role's history that lie in some tiers when a chunk begins at `start`."""
        scene, pin, frames = self._scenes[role], self.pin(role), self._banks[role].frames
        known = _with_first(frames, first_frames(role))
        found = [scene.tier(role, frame, scene.inside(start)) in tiers for frame in known]
        if pin is not None and "sink" in tiers:
            pinned = range(pin.begin, pin.begin + min(pin.frames, first_frames(role)))
            found = [stays or frame in pinned for stays, frame in zip(found, frames, strict=True)]
        return [row for row, stays in enumerate(found) if stays]

    def _survivors(self, switch: Switch, role: HeadRole, start: int) -> Kept:
        """What a role keeps through a switch, with the numbers that it has from now on."""
        scene, bank = self._scenes[role], self._banks[role]
        first = scene.inside(start)
        if switch.mode == "recache":
            self._scenes[role] = replace(scene, since=min(scene.since, first))
            return bank.take(_rows_before(bank.frames, first))
        if switch.mark is not None:
            kept, names = self._marks[switch.mark][role]
        else:
            kept, names = self._take(role, self._rows(role, switch.tiers, start))
        if switch.restarts:
            self._scenes[role] = Scene(names, start, len(names))
            return kept.restarted()
        self._scenes[role] = replace(scene, since=first)
        return kept


def _with_first(frames: Sequence[int | None], sink: int) -> list[int | None]:
    """Frames, numbered also where those that a scene begins with had been chosen by content."""
    return [row if frame is None and row < sink else frame for row, frame in enumerate(frames)]


def check_name(name: object) -> None:
    """Checks the name of a mark.

    Raises:
        OptionError: it is no text.
    """
    if not isinstance(name, str):
        raise OptionError(f"a mark is named {name!r}: expected a text")


def _rows_before(frames: Sequence[int | None], first: int) -> list[int]:
    """Rows of ascending frames that surely lie before `first`, those chosen by content included."""
    known = [row for row, frame in enumerate(frames) if frame is not None and frame <= first]
    return [row for row in range(max(known, default=-1) + 1) if frames[row] != first]


_Named = tuple[Kept, tuple[int | None, ...]]
"""Frames, and the base model's numbers of them."""
