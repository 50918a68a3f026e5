"""The handle of an applied model: ask it, reset it, remove it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType

from torch import nn

from headforcing.apply.hooks import add_prompt_hooks, remove_hooks
from headforcing.apply.sites import Site, check_reachable, check_removable
from headforcing.apply.status import Status, collect
from headforcing.attention.activity import Activity
from headforcing.attention.layer_state import LayerState, Options, check_settled
from headforcing.attention.module import HeadForcingMixin
from headforcing.attention.observation import Observer
from headforcing.attention.stream import (
    Requests,
    Stream,
    Timeline,
    by_timeline,
    check_clean,
    check_finished,
    check_finite,
    open_stream,
    unreported_of,
)
from headforcing.errors import StreamActiveError, StreamError
from headforcing.roles.maps.role_map import RoleMap
from headforcing.stores.checks import FiniteCheck, check_ended
from headforcing.stores.scenes import check_name
from headforcing.stores.switch import Mode, Switch
from headforcing.types import Tier


class HeadForcing:
    """The handle of an applied model: ask it, reset it, remove it. Also a context manager.

    Made by `apply_head_forcing`.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], layers: Sequence[LayerState]) -> None:
        self._model = model
        self._sites = tuple(sites)
        self._layers = tuple(layers)
        self._timelines: dict[str, Timeline] = {}
        for layer in layers:
            layer.handle = weakref.ref(self)

    @property
    def options(self) -> Options:
        """What was applied: roles with every number filled in, window, adapter, store, backend."""
        return self._layers[0].options

    @property
    def roles(self) -> RoleMap:
        """The role map in force, every number filled in."""
        return self.options.roles

    def frames(self, layer: int, head: int) -> list[list[list[int]]]:
        """Whole frames a head stores now, per stream and sample, oldest first, without the current chunk.

        Reads the device: for people and pictures, not for the path of a model.
        """
        role, state = self.roles.layers[layer][head], self._layers[layer]
        with self._activity.lock:
            if self._activity.calls_in(this_thread=False):
                raise StreamActiveError(
                    "frames() while another thread is in an attention call: call it between"
                )
            return [stream.store.frames(role) for stream in list(state.streams.values())]

    def status(self) -> Status:
        """What is applied and what it holds right now, counted from the tensors."""
        with self._activity.lock:
            return collect(self._layers, self.applied)

    def reset(self) -> None:
        """Forgets every video; the next chunk of each stream must start at frame 0.

        Raises:
            StreamActiveError: a call or an explicit stream of this thread is open.
            NonFiniteKVError: a video ended with NaN or infinity that was not reported; it is forgotten.
        """
        with self._activity.lock:
            self._refuse_while_running("reset")
            unreported = self.unreported()
            for state, stream in list(self._streams()):
                stream.requests, stream.began = Requests(), None
                stream.store.reset()
                state.options.adapter.forget(stream.memo)
        check_ended(unreported)

    def commit(self) -> None:
        """Ends the pending chunk of every stream, which otherwise ends when the next one begins.

        Waits for the device to know whether it is finite: so also the last chunk of a video is checked.

        Raises:
            NonFiniteKVError: a chunk holds NaN or infinity; it stays pending, and none is committed.
            StreamError: roles ask for phases, and a chunk had no clean pass; or the first one of a window of
                several chunks had none.
            StreamActiveError: a call or an explicit stream of this thread is open, another thread is in the
                middle of a pass, or layers stand at different chunks since a pass that failed.
        """
        with self._activity.lock:
            self._refuse_while_running("commit")
            self._refuse_half_a_pass("commit")
            check_settled(self._layers[0], "commit")
            self._commit(list(self._streams()))

    def mark(self, name: str) -> None:
        """Names the scene up to here, the pending chunk included, so that it can be recalled in this video.

        A mark holds what heads with an episodic memory store, and the first frames of the others; the same
        name again replaces it. Its bytes count in `status()`, and a new video drops it.

        Any thread may call it at any time: it takes effect in all layers when the next chunk begins.

        Raises:
            OptionError: the name is no text.
            StreamError: no video is running.
            StreamActiveError: this thread is inside an attention call.
        """
        check_name(name)
        with self._activity.lock:
            for stream, after in self._running("mark"):
                marks = (*stream.requests.marks, name)
                stream.requests = replace(stream.requests, marks=marks, after=after)

    @property
    def marks(self) -> tuple[str, ...]:
        """Names of the scenes that every running video can recall."""
        with self._activity.lock:
            streams = list(self._layers[0].streams.values())
        known = [dict.fromkeys((*one.store.scenes.marks, *one.requests.marks)) for one in streams]
        return tuple(name for name in (known[0] if known else ()) if all(name in names for names in known))

    def switch_prompt(
        self, mode: Mode, *, keep: Sequence[Tier] = (), mark: str | None = None, frames: int = 0
    ) -> None:
        """Says that the next chunk has another prompt, and what of the past the heads keep then.

        Takes effect when the next chunk begins, also if this one is not finished, in every video that runs;
        of several calls before that, the last one counts. Any thread may call it at any time, for `"recache"`
        between two passes. The pipeline passes the new prompt as it always does; cross-attention projects it
        anew.

        Args:
            mode: `"continue"` keeps everything. `"smooth"` drops recent frames and compressed tokens; first
                and episodic frames stay. `"cut"` drops everything but `keep`, and positions restart, as in a
                new video. `"recall"` puts back what was stored at a mark, and positions restart after it.
                `"recache"` drops the last `frames` frames, which the base model computes again.
            keep: tiers that outlive a cut: `"sink"`, `"episodic"`.
            mark: name of the scene to recall.
            frames: frames that the base model computes again.

        Raises:
            OptionError: there is no such mode, or the other arguments do not go with it.
            StreamError: no video is running, there is no such mark, or a role cannot tell which of its frames
                come again.
            StreamActiveError: this thread is inside an attention call; or `"recache"` during a pass.
            UnsupportedModelError: the adapter does not say where the base model keeps the projected prompt.
        """
        switch = Switch(mode, tuple(keep), mark, frames)
        with self._activity.lock:
            running = self._running("switch_prompt")
            if mode == "recache":
                self._refuse_half_a_pass("switch_prompt")
                check_settled(self._layers[0], "switch_prompt")
            for stream, _ in running:
                for one in stream.all_layers if mode == "recache" else (stream,):
                    one.store.check_switch(switch, stream.requests.marks)
            add_prompt_hooks(self._model, self._layers)
            for stream, after in running:
                stream.requests = replace(stream.requests, switch=switch, after=after)

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Names the timeline of the calls inside, for base models whose calls carry no cache object.

        One name per video and CFG branch. Leaving the block normally commits the pending chunk; see `commit`.

        Raises:
            NonFiniteKVError: the pending chunk holds NaN or infinity.
            StreamError: head forcing was removed.
        """
        if not self.applied:
            raise StreamError(f"stream({name!r}) of a handle that was removed: apply head forcing again")
        timeline = self._timelines.setdefault(name, Timeline(name))
        token = open_stream.set(timeline)
        try:
            yield
            with self._activity.lock:
                mine = [
                    (state, state.streams[timeline]) for state in self._layers if timeline in state.streams
                ]
                self._commit(mine)
        finally:
            open_stream.reset(token)

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Shows every attention call to `observer` while the block runs, for measuring."""
        observers = self._layers[0].activity.observers
        observers.append(observer)
        try:
            yield
        finally:
            observers.remove(observer)

    def remove(self) -> None:
        """Puts every original module back and gives the base model's caches back empty; idempotent.

        Raises:
            StreamActiveError: a call or a stream of this thread is open, or another thread is amid a pass.
            PatchedModuleError: something added after apply still wraps one of our modules.
            NonFiniteKVError: a video ended with NaN or infinity that was not reported; all is removed.
        """
        check_ended(self.take_out())

    def take_out(self) -> list[list[FiniteCheck]]:
        """Removes; returns the checks that were not reported."""
        with self._activity.lock:
            self.check_remove()
            unreported = self.unreported()
            for site, module, state in list(self._in_place()):
                _strip(module, state)
                _restore(site.original, state)
                site.put(site.original)
            remove_hooks(self._model, self._activity)
            self._timelines.clear()
        return unreported

    def check_remove(self) -> None:
        """Checks that `remove` would not be refused.

        Raises:
            StreamActiveError, PatchedModuleError: it would.
        """
        self._refuse_while_running("remove")
        self._refuse_half_a_pass("remove")
        for site, state in zip(self._sites, self._layers, strict=True):
            check_reachable(site, state)
        for site, module, _ in self._in_place():
            check_removable(module, site)

    def __enter__(self) -> HeadForcing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unreported = self.take_out()
        if error is None:
            check_ended(unreported)

    def __repr__(self) -> str:
        return repr(self.status())

    @property
    def applied(self) -> bool:
        """Whether our modules are in place."""
        return any(True for _ in self._in_place())

    def _in_place(self) -> Iterator[tuple[Site, nn.Module, LayerState]]:
        """The sites that still hold a module of ours."""
        for site, state in zip(self._sites, self._layers, strict=True):
            module = site.module
            if isinstance(module, HeadForcingMixin) and module.__dict__.get("_headforcing") is state:
                yield site, module, state

    def _streams(self) -> Iterator[tuple[LayerState, Stream]]:
        """All streams of all layers."""
        for state in self._layers:
            for stream in list(state.streams.values()):
                yield state, stream

    def unreported(self) -> list[list[FiniteCheck]]:
        """Checks of every video whose results were not reported."""
        return unreported_of(stream for _, stream in self._streams())

    def _commit(self, streams: Sequence[tuple[LayerState, Stream]]) -> None:
        for state, stream in streams:
            check_finished(stream, state.layer)
            if state.activity.phase_hook:
                check_clean(stream, state.layer)
        timelines = by_timeline(stream for _, stream in streams)
        for wait in (False, True):  # all layers begin before one is waited for
            for layers in timelines:
                check_finite(layers, wait)
        for _, stream in streams:
            stream.store.commit()

    @property
    def _activity(self) -> Activity:
        return self._layers[0].activity

    def _running(self, what: str) -> list[tuple[Stream, int]]:
        """The timelines that have begun, and up to which frame a chunk is too early for a request.

        Another timeline that is one chunk ahead, as another CFG branch of the pass that runs, cannot follow
        a request before the chunk after it; so this one waits for it.
        """
        if self._activity.calls_in(this_thread=True):
            raise StreamActiveError(f"{what}() inside an attention call: wait until the model returns")
        running = [one for one in list(self._layers[0].streams.values()) if one.store.frames_so_far]
        if not running:
            raise StreamError(f"{what}(): no video is running, call it between two chunks of one")
        begun = {one.store.pending.start for one in running if one.store.pending is not None}
        stops = [one.store.frames_so_far for one in running]
        return [(one, stop if stop in begun else -1) for one, stop in zip(running, stops, strict=True)]

    def _refuse_while_running(self, what: str) -> None:
        if self._activity.calls_in(this_thread=True) or self._activity.calls_in(this_thread=False):
            raise StreamActiveError(f"{what}() inside an attention call: wait until the model returns")
        if open_stream.get() in self._timelines.values():
            raise StreamActiveError(f"{what}() inside `with handle.stream(...)`: leave the block first")

    def _refuse_half_a_pass(self, what: str) -> None:
        threads = {one.unfinished_in for one in list(self._layers[0].streams.values())} - {None}
        others = threads & {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        if others:
            raise StreamActiveError(
                f"{what}() while another thread is between two layers of a pass, or its pass failed there: "
                "call it between two passes; after a failed one, run it again or call reset() first"
            )


def _strip(ours: nn.Module, state: LayerState) -> None:
    """Takes everything of ours off a module, with what hooks and compilation left of us."""
    for anchor, stream in list(state.streams.items()):
        state.options.adapter.give_back(anchor, stream.memo)
    state.streams.clear()
    for name in ("forward", "_compiled_call_impl", "_headforcing"):
        ours.__dict__.pop(name, None)


def _restore(original: nn.Module, state: LayerState) -> None:
    """Puts back a forward that the module had in its `__dict__` when head forcing came."""
    if state.own_forward is not None:
        original.__dict__["forward"] = state.own_forward
