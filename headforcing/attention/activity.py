"""What happens in an applied model: calls, passes, and what is looked at when a chunk begins."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from headforcing.attention.compile import counter
from headforcing.attention.guards import check_complete, check_runs, warn_of_idle
from headforcing.attention.observation import Observer
from headforcing.attention.stream import Stream
from headforcing.stores import KVStore
from headforcing.types import Phase


class Activity:
    """What happened since apply, shared by all layers of a model.

    Attributes:
        calls: attention calls served.
        layers, served: those that have roles, and which of them were called.
        bypassed: calls that went to the original forward although they had a cache.
        depth, observers: calls in progress, and who is shown every call.
        hears_phases: whether a hook tells the phase.
        hears_prompts: whether hooks make a new prompt heard.
        order: written by every compiled call; see `headforcing.attention.compile`.
        way: modules that hold or are attentions, by name; unknown in a copy.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.order = counter()
        self.layers: set[int] = set()
        self.served: set[int] = set()
        self.bypassed = 0
        self.depth = 0
        self.observers: list[Observer] = []
        self.hears_phases = self.hears_prompts = False
        self.way: Sequence[tuple[str, weakref.ref[nn.Module]]] = ()
        self._sought_idle = False
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
            held = self.way or [(f"layer {one.store.layer}", one.module) for one in met if one.module]
            check_runs((path, module) for path, ref in held if (module := ref()) is not None)
        self._pass.first = weakref.ref(stream)
        self._pass.serving = self._pass.first, turn

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
