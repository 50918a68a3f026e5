"""Counters that all layers share, and the checks when a chunk begins: NaN, skipped layers, their order."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from headforcing.attention.compile import counter
from headforcing.attention.observation import Observer
from headforcing.attention.read_facts import ReadFacts
from headforcing.attention.skipped import check_complete, check_runs, layers_named, warn_of_idle
from headforcing.attention.stream import PassId, Stream, check_finite
from headforcing.errors import StreamError
from headforcing.stores import KVStore
from headforcing.types import Phase


class _Call:
    """An attention call of a thread; one that an interrupt left behind goes with the frame that held it."""

    def __init__(self, activity: Activity) -> None:
        self.activity, self.thread = activity, threading.get_ident()

    def __enter__(self) -> None:
        self.activity.enter(self)

    def __exit__(self, *_: object) -> None:
        self.activity.leave(self)


class Activity:
    """What happened since apply, shared by all layers of a model.

    Attributes:
        calls: attention calls served.
        layers, served: those that have roles, and which of them were called.
        bypassed: calls that went to the original forward although they had a cache.
        observers: who is shown every call.
        lock: held while a call is entered or left, while requests are handed on, and by what the handle does.
        phase_hook: whether a hook notes the phase of every pass, because roles depend on it.
        prompt_hooks: whether hooks make cross-attention project a new prompt.
        order: written by every compiled call; see `headforcing.attention.compile`.
        path_modules: modules between the root and each attention, weakly, by name; empty after deepcopy.
        facts: what was read of the model at apply; `None` after deepcopy.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.order = counter()
        self.layers: set[int] = set()
        self.served: set[int] = set()
        self.bypassed = 0
        self.observers: list[Observer] = []
        self.phase_hook = self.prompt_hooks = False
        self.path_modules: Sequence[tuple[str, weakref.ref[nn.Module]]] = ()
        self.facts: ReadFacts | None = None
        self._sought_idle = False
        self._call_numbers = itertools.count()
        self._running: weakref.WeakSet[_Call] = weakref.WeakSet()
        self.lock = threading.Lock()
        self._thread = threading.local()

    @property
    def phase(self) -> Phase | None:
        """Which pass this thread is in, where the base model makes it known."""
        return getattr(self._thread, "phase", None)

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._thread.phase = phase

    def new_prompt(self, layer: int) -> KVStore | None:
        """The store whose new prompt is to be projected, after a call of this layer in this thread."""
        store: KVStore | None = getattr(self._thread, "wrote", {}).pop(layer, lambda: None)()
        return None if store is None or not store.prompt_pending else store

    def note_write(self, layer: int, store: KVStore) -> None:
        """Notes that a layer wrote in this pass, and in which store, for its cross-attention that follows."""
        stream, pass_id = getattr(self._thread, "serving", (lambda: None, None))
        if (wrote := stream()) is not None and wrote.store is store:
            wrote.pass_id = pass_id
        self._thread.__dict__.setdefault("wrote", {})[layer] = weakref.ref(store)

    def running(self) -> _Call:
        """Marks a call in progress, while entered."""
        return _Call(self)

    def enter(self, call: _Call) -> None:
        """A call begins."""
        with self.lock:
            self._running.add(call)
        self._thread.call_number = next(self._call_numbers)

    def leave(self, call: _Call) -> None:
        """It ends."""
        with self.lock:
            self._running.discard(call)

    def calls_in(self, *, this_thread: bool) -> bool:
        """Whether calls are in progress in this thread, or in others."""
        return any((call.thread == threading.get_ident()) is this_thread for call in self._running)

    def begin_call(self, layer: int, stream: Stream, start: int) -> None:
        """Counts a call; in the first layer, checks a finished chunk in all layers before any commits it.

        The layers of a pass learn of each other: they are one timeline.

        Raises:
            NonFiniteKVError: the chunk before is broken in some layer; none has committed it, so it can be
                written again. Or, on an accelerator, a committed one is.
            StreamError: the last pass over the chunk before skipped some layer.
            PatchedModuleError: a cache may skip some.
            ModelChangedError: the model no longer says what it said at apply.
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
            self._join_timeline(stream)
            return
        pass_id = getattr(self._thread, "call_number", None), start
        if pending is not None and grown:
            _check_finished_chunk(stream, pending, pass_id)
        with self.lock:
            stream.began = pass_id, threading.get_ident()
            stream.hand_on(start)
        if pending is None or start != pending.start or not start:
            self._check_runs(stream)
        self._thread.first = weakref.ref(stream)
        self._thread.serving = self._thread.first, pass_id

    def _join_timeline(self, stream: Stream) -> None:
        """A later layer of the pass that this thread runs."""
        first: Stream | None = getattr(self._thread, "first", lambda: None)()
        if first is not None:
            first.later_layers.add(stream)
            stream.store.compressed.shared = first.store.compressed.shared
            self._thread.serving = weakref.ref(stream), first.pass_id

    def _check_runs(self, first: Stream) -> None:
        """A chunk begins: checks that the model says what it said, and that nothing may skip a layer."""
        if self.facts is not None:
            self.facts.check()
        by_layer = [(f"layer {one.store.layer}", one.module) for one in first.all_layers if one.module]
        held = self.path_modules or by_layer
        check_runs((path, module) for path, ref in held if (module := ref()) is not None)

    def bypass(self) -> None:
        """Counts a call that went to the original forward although it had a cache; warns once."""
        if not self.bypassed:
            warnings.warn(
                "head forcing is inactive while the model trains or requires gradients: the original "
                "attention ran. Call model.eval() and use torch.no_grad() to switch it on",
                stacklevel=4,
            )
        self.bypassed += 1

    def __reduce__(self) -> Any:
        """A copy starts counting anew; its hooks are copied with it."""
        return _copied_activity, (self.phase_hook,)


def _check_finished_chunk(first: Stream, pending: range, pass_id: PassId) -> None:
    """Checks the chunk that the next pass will commit, in all layers of a timeline."""
    layers = first.all_layers
    call_number, start = first.pass_id or pass_id
    if call_number != pass_id[0] and start == pending.start:  # else the same call goes on
        wrote = {one.store.layer for one in layers if one.pass_id == first.pass_id}
        late = {one.store.layer for one in layers if one.store.pending == pending} - wrote
        check_complete(sorted(late), pending)
    if torn := sorted(one.store.layer for one in layers if one.store.interrupted):
        raise StreamError(
            f"{layers_named(torn)}: the last pass over frames {pending.start}..{pending.stop - 1} was "
            "interrupted there, and others may not have run it: run that pass again"
        )
    check_finite(layers)


def _copied_activity(phase_hook: bool) -> Activity:
    activity = Activity()
    activity.phase_hook = phase_hook
    return activity
