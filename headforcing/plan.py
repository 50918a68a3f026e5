"""What an applied model carries: options, and one plan per layer with its streams."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from headforcing.adapter import Adapter
from headforcing.backends import Attend
from headforcing.errors import StreamActiveError, StreamError
from headforcing.observation import Observer
from headforcing.role_map import RoleMap
from headforcing.roles import HeadRole
from headforcing.skipping import check_complete, check_runs, warn_of_idle
from headforcing.stores import KVStore
from headforcing.timeline import open_stream
from headforcing.types import AttentionCall, Heads, Phase
from headforcing.weights import Marks, Watch


@dataclass(eq=False)
class Stream:
    """One layer's memory on one timeline, and what the adapter noted about the host's cache.

    Attributes:
        store: the memory.
        memo: the adapter's notes.
        released: bytes of the host's cache that are free meanwhile.
        behind: the same timeline in the layers after the first, as the last pass met them.
        phase: of the last pass, where roles ask.
        module: the attention, while it is there.
        marks: of its weights when the last chunk began.
        turn: number and first frame of the last pass that wrote.
    """

    store: KVStore
    memo: dict[str, Any] = field(default_factory=dict)
    released: int = 0
    behind: weakref.WeakSet[Stream] = field(default_factory=weakref.WeakSet)
    phase: Phase | None = None
    module: weakref.ref[nn.Module] | None = None
    marks: Marks | None = None
    turn: tuple[int | None, int] | None = None

    def mark(self) -> Marks | None:
        """Notes down the weights of the attention; returns what was noted before."""
        module = None if self.module is None else self.module()
        before, self.marks = self.marks, None if module is None else Marks.of(module)
        return before


class Activity:
    """What happened since apply, shared by all layers of a model.

    Attributes:
        calls: attention calls served.
        layers, served: those that have roles, and which of them were called.
        bypassed: calls that went to the original forward although they had a cache.
        depth, observers: calls in progress, and who is shown every call.
        hears_phases: whether a hook tells the phase.
        way: modules that hold or are attentions, by name; unknown in a copy.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.layers: set[int] = set()
        self.served: set[int] = set()
        self.bypassed = 0
        self.depth = 0
        self.observers: list[Observer] = []
        self.hears_phases = False
        self.way: Sequence[tuple[str, weakref.ref[nn.Module]]] = ()
        self._sought_idle = False
        self._weights = Watch()
        self._turns = itertools.count()
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
        """Notes down that a layer wrote, and whose prompt its cross-attention is about to hear."""
        stream, turn = getattr(self._pass, "serving", (lambda: None, None))
        if (wrote := stream()) is not None and wrote.store is store:
            wrote.turn = turn
        self._pass.__dict__.setdefault("turned", {})[layer] = weakref.ref(store)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Marks a call in progress."""
        with self._lock:
            self.depth += 1
        self._pass.turn = next(self._turns)
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
            StreamError: the last pass over the chunk before skipped some layer.
            PatchedModuleError: a cache of diffusers may skip some.
        """
        self.calls += 1
        self.served.add(layer)
        pending = stream.store.pending
        grown = pending is not None and start > pending.start
        if grown and layer == min(self.served) and not self._sought_idle:
            if idle := sorted(self.layers - self.served):
                warn_of_idle(idle)
            self._sought_idle = True
        if layer:
            first: Stream | None = getattr(self._pass, "first", lambda: None)()
            if first is not None:
                first.behind.add(stream)
                stream.store.digests.notes = first.store.digests.notes
                self._pass.serving = weakref.ref(stream), first.turn
            if stream.marks is None:
                stream.mark()
            return
        turn = getattr(self._pass, "turn", None), start
        met = [stream, *sorted(stream.behind, key=lambda later: later.store.layer)]
        if pending is not None and grown:
            number, first_frame = stream.turn or turn
            if number != turn[0] and first_frame == pending.start:  # else the same call goes on
                ran = {one.store.layer for one in met if one.turn == stream.turn}
                late = {one.store.layer for one in met if one.store.pending == pending} - ran
                check_complete(sorted(late), pending)
            for one in met:
                one.store.check()
        if pending is None or start != pending.start or not start:
            self._look_around(met, start)
        self._pass.first = weakref.ref(stream)
        self._pass.serving = self._pass.first, turn

    def _look_around(self, met: Sequence[Stream], start: int) -> None:
        """A chunk begins: whether all attention will run, and with the weights that made the past."""
        held = self.way or [(f"layer {one.store.layer}", one.module) for one in met if one.module]
        check_runs((path, module) for path, ref in held if (module := ref()) is not None)
        marks = [(one.store.layer, one.mark(), one.marks) for one in met]
        if start:
            self._weights.look(start, marks)
        else:
            self._weights.begin()

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
        module: ours in its place, likewise.
        own_forward: the module's own forward, where it lay in its `__dict__`, as accelerate leaves it.
        streams: memories of this layer by the anchor of their timeline.
    """

    layer: int
    options: Options
    activity: Activity
    handle: weakref.ref[Any] | None = None
    original: weakref.ref[Any] | None = None
    module: weakref.ref[nn.Module] | None = None
    own_forward: Any = None
    streams: MutableMapping[object, Stream] = field(default_factory=_by_anchor, compare=False)

    def __post_init__(self) -> None:
        self.activity.layers.add(self.layer)
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
            stream = self.streams[anchor] = Stream(store, module=self.module)
        return stream

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled plan serves the same roles with an empty memory of its own."""
        module = None if self.module is None else self.module()
        left = dict.fromkeys(("streams", "handle", "original", "own_forward"))
        return {**self.__dict__, **left, "module": module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state["module"]  # that of the copy, which is copied together with its plan
        ref = None if module is None else weakref.ref(module)
        self.__dict__.update(state, streams=_by_anchor(), module=ref)
        self.activity.layers.add(self.layer)
