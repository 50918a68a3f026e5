"""What an applied model carries: options, and one plan per layer with its streams."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from headforcing.adapter import Adapter
from headforcing.backends import Attend
from headforcing.errors import StreamActiveError, StreamError
from headforcing.observation import Observer
from headforcing.role_map import RoleMap
from headforcing.roles import HeadRole
from headforcing.stores import KVStore
from headforcing.types import AttentionCall, Heads, Phase


class Timeline:
    """The anchor of a stream that the user opened, for hosts whose calls carry no cache object."""

    def __init__(self, name: str) -> None:
        self.name = name


open_stream: ContextVar[Timeline | None] = ContextVar("headforcing_stream", default=None)
"""The stream opened by `handle.stream()` in this thread or task."""


@dataclass(eq=False)
class Stream:
    """One layer's memory on one timeline, and what the adapter noted about the host's cache.

    Attributes:
        store: the memory.
        memo: the adapter's notes.
        released: bytes of the host's cache that are free meanwhile.
        behind: the same timeline in the layers after the first, as the last pass met them.
        phase: of the last pass, where roles ask.
    """

    store: KVStore
    memo: dict[str, Any] = field(default_factory=dict)
    released: int = 0
    behind: weakref.WeakSet[Stream] = field(default_factory=weakref.WeakSet)
    phase: Phase | None = None


class Activity:
    """What happened since apply, shared by all layers of a model."""

    def __init__(self) -> None:
        self.calls = 0
        self.bypassed = 0
        self.depth = 0
        self.observers: list[Observer] = []
        self.hears_phases = False
        self._lock = threading.Lock()
        self._pass = threading.local()

    @property
    def phase(self) -> Phase | None:
        """Which pass this thread is in, where the host makes it known."""
        return getattr(self._pass, "phase", None)

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._pass.phase = phase

    def heard_prompt(self, layer: int) -> bool:
        """Whether the last self-attention of a layer in this thread has a new prompt; told once."""
        store: KVStore | None = getattr(self._pass, "turned", {}).pop(layer, lambda: None)()
        if store is None or not store.turned:
            return False
        store.turned = False
        return True

    def note_turn(self, layer: int, store: KVStore) -> None:
        """Notes down whose prompt the cross-attention of a layer is about to hear."""
        self._pass.__dict__.setdefault("turned", {})[layer] = weakref.ref(store)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Marks a call in progress."""
        with self._lock:
            self.depth += 1
        try:
            yield
        finally:
            with self._lock:
                self.depth -= 1

    def serve(self, layer: int, stream: Stream, start: int) -> None:
        """Counts a call, and checks a finished chunk in all layers before the first one commits it.

        The layers of a pass are told of each other: they are one timeline.

        Raises:
            NonFiniteKVError: keys or values of the chunk before are broken in some layer; none has
                committed it, so it can be written again.
        """
        self.calls += 1
        if layer:
            first = getattr(self._pass, "first", lambda: None)()
            if first is not None:
                first.behind.add(stream)
                stream.store.digests.notes = first.store.digests.notes
            return
        pending = stream.store.pending
        if pending is not None and start > pending.start:
            for met in (stream, *sorted(stream.behind, key=lambda later: later.store.layer)):
                met.store.check()
        self._pass.first = weakref.ref(stream)

    def bypass(self) -> None:
        """Counts a call that went to the original forward although it had a cache; warns once."""
        if not self.bypassed:
            warnings.warn(
                "head forcing is inactive while the model trains or needs gradients: the original "
                "attention ran. Call model.eval() and use torch.no_grad() to switch it on",
                stacklevel=4,
            )
        self.bypassed += 1

    def __reduce__(self) -> Any:
        """A copy starts counting anew; its hooks are copied with it."""
        return _copied_activity, (self.hears_phases,)


def _copied_activity(hears_phases: bool) -> Activity:
    activity = Activity()
    activity.hears_phases = hears_phases
    return activity


def _by_anchor() -> MutableMapping[object, Stream]:
    """Streams that die with their anchors: no id is ever stored, no cache object is kept alive."""
    return WeakIdKeyDictionary()


def check_clean(stream: Stream, layer: int) -> None:
    """Looks whether the pending chunk had its clean pass, where roles ask for phases.

    Raises:
        StreamError: its last pass was noisy.
    """
    pending = stream.store.pending
    if pending is not None and stream.phase != "commit":
        raise StreamError(
            f"layer {layer}: frames {pending.start}..{pending.stop - 1} had no clean pass, their last one "
            "was noisy: if the host writes its cache at another noise level, say so, as in "
            "adapter=SelfForcing(context_noise=...)"
        )


def check_settled(plan: LayerPlan, what: str) -> None:
    """Looks whether all layers stand at the same chunk, as between two passes; `plan` is the first one's.

    Raises:
        StreamActiveError: they do not.
    """
    for stream in list(plan.streams.values()):
        ahead = stream.store.pending
        if any(met.store.pending != ahead for met in stream.behind):
            raise StreamActiveError(
                f"{what}() between two layers of a pass, or after one that failed there: call it between two "
                "chunks, run a failed one again first"
            )


@dataclass(frozen=True)
class Options:
    """What was applied: the roles, and the tools that serve them. Equal options are one application."""

    roles: RoleMap
    window: int
    adapter: Adapter = field(compare=False)
    store: type[KVStore]
    attend: Attend


@dataclass
class LayerPlan:
    """What one layer needs to know.

    Attributes:
        layer: number of the layer.
        options: what was applied to the model.
        activity: counters shared by all layers.
        handle: the handle of the model, while somebody holds it.
        original: the module that was replaced, while somebody holds it.
        own_forward: the module's own forward, where it lay in its `__dict__`, as accelerate leaves it.
        streams: memories of this layer by the anchor of their timeline.
    """

    layer: int
    options: Options
    activity: Activity
    handle: weakref.ref[Any] | None = None
    original: weakref.ref[Any] | None = None
    own_forward: Any = None
    streams: MutableMapping[object, Stream] = field(default_factory=_by_anchor, compare=False)

    def __post_init__(self) -> None:
        row = self.options.roles.layers[self.layer]
        members: dict[HeadRole, list[int]] = {}
        for head, role in enumerate(row):
            members.setdefault(role, []).append(head)
        self.num_heads = len(row)
        self.heads = {role: Heads(indices, len(row)) for role, indices in members.items()}

    def stream(self, call: AttentionCall) -> Stream:
        """The stream of a call; a new one where its anchor was never seen."""
        anchor = open_stream.get() if call.anchor is None else call.anchor
        if anchor is None:
            raise StreamError(
                f"layer {self.layer}: the call carries no cache object, so its timeline cannot be told: "
                "run it inside `with handle.stream(name):`, one name per video and CFG branch"
            )
        stream = self.streams.get(anchor)
        if stream is None:
            store = self.options.store(self.heads, window=self.options.window, layer=self.layer)
            stream = self.streams[anchor] = Stream(store)
        return stream

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled plan serves the same roles with an empty memory of its own."""
        return {**self.__dict__, "streams": None, "handle": None, "original": None, "own_forward": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, streams=_by_anchor())
