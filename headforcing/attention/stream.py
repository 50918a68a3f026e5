"""One layer's memory on one timeline, and the timeline that the user names where calls carry no cache."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from headforcing.errors import NonFiniteKVError, StreamError
from headforcing.stores import KVStore
from headforcing.stores.checks import FiniteCheck, check_ended
from headforcing.stores.switch import Switch
from headforcing.types import Chunk, Phase

PassId = tuple[int | None, int]
"""One pass of the model: the number of its first attention call, and the first frame of its chunk."""


class Timeline:
    """The anchor of a stream that the user opened."""

    def __init__(self, name: str) -> None:
        self.name = name


open_stream: ContextVar[Timeline | None] = ContextVar("headforcing_stream", default=None)
"""The stream opened by `handle.stream()` in this thread or task."""


@dataclass(frozen=True)
class Requests:
    """What the user asked of a timeline, until a chunk begins and its first layer hands it on to all layers.

    Attributes:
        marks: names for the scene up to there.
        switch: a prompt switch; the last one asked for.
        after: a chunk that begins at or before this frame is too early, because another timeline began it
            already.
    """

    marks: tuple[str, ...] = ()
    switch: Switch | None = None
    after: int = -1


@dataclass(eq=False)
class Stream:
    """One layer's memory on one timeline, and what the adapter noted about the base model's cache.

    Attributes:
        store: the memory.
        memo: the adapter's notes.
        released: bytes of the base model's cache that are free meanwhile.
        later_layers: in layer 0, the streams of the other layers on this timeline, as seen in the last pass.
        phase: of the last pass, where roles ask.
        module: the attention module, while it exists.
        pass_id: the last pass that wrote.
        requests: in layer 0, what the user asked for and no chunk took up so far.
        began: in layer 0, the last pass that began, and its thread.
    """

    store: KVStore
    memo: dict[str, Any] = field(default_factory=dict)
    released: int = 0
    later_layers: weakref.WeakSet[Stream] = field(default_factory=weakref.WeakSet)
    phase: Phase | None = None
    module: weakref.ref[nn.Module] | None = None
    pass_id: PassId | None = None
    requests: Requests = Requests()
    began: tuple[PassId, int] | None = None

    @property
    def all_layers(self) -> list[Stream]:
        """In layer 0: this stream, then those of the later layers in order."""
        return [self, *sorted(self.later_layers, key=lambda later: later.store.layer)]

    def hand_on(self, start: int) -> None:
        """In layer 0, when a pass begins at frame `start`: requests go to all layers, if a chunk begins."""
        pending, asked = self.store.pending, self.requests
        recache = asked.switch is not None and asked.switch.mode == "recache"
        if pending is not None and not recache and pending.start <= start <= max(pending.start, asked.after):
            return
        for one in self.all_layers if asked != Requests() else ():
            one.store.scenes.request(asked.marks, asked.switch)
        self.requests = Requests()  # last: a fault before it hands them on again

    @property
    def unfinished_in(self) -> int | None:
        """In layer 0: the thread of the last pass, if it did not reach all layers so far."""
        if self.began is None or all(one.pass_id == self.began[0] for one in self.all_layers):
            return None
        return self.began[1]

    def write(self, chunk: Chunk, phase: Phase) -> None:
        """Takes one pass over a chunk; see `KVStore.write`.

        Raises:
            NonFiniteKVError: also of the video before, which it ends, in any layer; said once.
        """
        if self.store.begins_video(chunk):
            check_ended(unreported_of(self.all_layers))
        self.store.write(chunk)
        self.phase = phase


def by_timeline(streams: Iterable[Stream]) -> list[list[Stream]]:
    """The layers of every timeline, as far as a pass joined them; streams of first layers come first."""
    rest, found = dict.fromkeys(streams), []
    while rest:
        found.append([stream for stream in next(iter(rest)).all_layers if stream in rest])
        rest = {stream: None for stream in rest if stream not in found[-1]}
    return found


def check_finite(layers: Sequence[Stream], wait: bool = False) -> None:
    """Checks the pending chunk of a timeline in all layers; see `KVStore.check`.

    Raises:
        NonFiniteKVError: in the first layer where it is broken, which breaks those after it.
    """
    try:
        for one in layers:
            one.store.check(wait)
    except NonFiniteKVError:
        for checks in unreported_of(layers):
            for check in checks:
                check.reported = True
        raise


def unreported_of(streams: Iterable[Stream]) -> list[list[FiniteCheck]]:
    """Checks of every timeline whose results were not reported, those of pending chunks included."""
    return [[check for one in layers for check in one.store.unreported()] for layers in by_timeline(streams)]


def check_finished(stream: Stream, layer: int) -> None:
    """Checks that a window of chunks that are denoised together had the clean pass of its first one.

    Raises:
        StreamError: it had not, and all of it would be stored as it is, with its noise.
    """
    pending = stream.store.pending
    if pending is not None and stream.store.unfinished:
        raise StreamError(
            f"layer {layer}: frames {pending.start}..{pending.stop - 1} are denoised at once, and their "
            "first chunk had no clean pass yet: call commit() right after it, or leave it to the next window"
        )


def check_clean(stream: Stream, layer: int) -> None:
    """Checks that the pending chunk had its clean pass, where roles ask for phases.

    Raises:
        StreamError: its last pass was noisy.
    """
    pending = stream.store.pending
    if pending is not None and stream.phase != "clean":
        raise StreamError(
            f"layer {layer}: frames {pending.start}..{pending.stop - 1} had no clean pass, their last one "
            "was noisy: if the base model writes its cache at another noise level, say so, as in "
            "adapter=SelfForcing(context_noise=...)"
        )
