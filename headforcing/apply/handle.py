"""The handle of an applied model, and how modules are put in and taken out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from torch import nn

from headforcing.apply.hooks import hear_prompts, remove_hooks
from headforcing.apply.sites import Site, check_reachable, check_removable, sites_of
from headforcing.apply.status import Status, collect
from headforcing.attention.activity import Activity
from headforcing.attention.module import HeadForcingMixin
from headforcing.attention.observation import Observer
from headforcing.attention.plan import LayerPlan, Options, check_settled
from headforcing.attention.stream import Stream, Timeline, check_clean, check_finished, open_stream
from headforcing.errors import StreamActiveError, StreamError
from headforcing.roles.maps.role_map import RoleMap
from headforcing.stores import KVStore
from headforcing.stores.switch import Mode, Switch
from headforcing.types import Tier


class HeadForcing:
    """The handle of an applied model: ask it, reset it, remove it. Also a context manager.

    Made by `apply_head_forcing`.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], plans: Sequence[LayerPlan]) -> None:
        self._model = model
        self._sites = tuple(sites)
        self._plans = tuple(plans)
        self._timelines: dict[str, Timeline] = {}
        for plan in plans:
            plan.handle = weakref.ref(self)

    @property
    def options(self) -> Options:
        """What was applied: roles with every number filled in, window, adapter, store, backend."""
        return self._plans[0].options

    @property
    def roles(self) -> RoleMap:
        """The role map in force, every number filled in."""
        return self.options.roles

    def frames(self, layer: int, head: int) -> list[list[list[int]]]:
        """Whole frames a head remembers now, per stream and sample, oldest first, own chunk excluded.

        Reads the device: for people and pictures, not for the path of a model.
        """
        role, plan = self.roles.layers[layer][head], self._plans[layer]
        return [stream.store.frames(role) for stream in plan.streams.values()]

    def status(self) -> Status:
        """What is applied and what it holds right now, counted from the tensors."""
        return collect(self._plans, self.applied)

    def reset(self) -> None:
        """Forgets every video; the next chunk of each stream must start at frame 0."""
        self._refuse_while_running("reset")
        for plan, stream in list(self._streams()):
            stream.store.reset()
            plan.options.adapter.forget(stream.memo)

    def commit(self) -> None:
        """Ends the pending chunk of every stream, which otherwise ends when the next one begins.

        Raises:
            StreamError: roles ask for phases, and a chunk had no clean pass; or the first one of a window of
                several chunks had none.
        """
        self._refuse_while_running("commit")
        self._commit(list(self._streams()))

    def mark(self, name: str) -> None:
        """Names the scene up to here, the pending chunk included, so that it can be recalled in this video.

        A mark holds what heads with an episodic memory hold, and the first frames of the others; the same
        name again replaces it. Its bytes count in `status()`, and a new video drops it.

        Raises:
            StreamError: no video is running.
        """
        for store in self._running("mark"):
            store.scenes.mark(name)

    @property
    def marks(self) -> tuple[str, ...]:
        """Names of the scenes that every running video can recall."""
        known = [stream.store.scenes.marks for _, stream in self._streams()]
        return tuple(name for name in (known[0] if known else ()) if all(name in names for names in known))

    def switch_prompt(
        self, mode: Mode, *, keep: Sequence[Tier] = (), mark: str | None = None, frames: int = 0
    ) -> None:
        """Says that the next chunk has another prompt, and what of the past the heads keep then.

        Takes effect when the next chunk begins, also if this one is not finished, in every video that runs;
        of several calls before that, the last one counts. The host hands in the new prompt as it always does;
        its cross-attention projects it anew.

        Args:
            mode: `"continue"` keeps everything. `"smooth"` drops recent frames, and what is kept beside whole
                frames; first and episodic frames stay. `"cut"` drops everything but `keep`, and positions
                restart, as in a new video. `"recall"` puts back what was held at a mark, and positions
                restart behind it. `"recache"` drops the last `frames` frames, which the host runs again.
            keep: tiers that outlive a cut: `"sink"`, `"episodic"`.
            mark: name of the scene to recall.
            frames: frames that the host runs again.

        Raises:
            OptionError: there is no such mode, or the other arguments do not go with it.
            StreamError: no video is running, there is no such mark, or a role cannot tell which of its frames
                come again.
            UnsupportedModelError: the adapter does not say where the host keeps the projected prompt.
        """
        switch = Switch(mode, tuple(keep), mark, frames)
        stores = self._running("switch_prompt")
        for store in stores:
            store.check_switch(switch)
        hear_prompts(self._model, self._plans)
        for store in stores:
            store.scenes.ask(switch)

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Names the timeline of the calls inside, for hosts whose calls carry no cache object.

        One name per video and CFG branch. Leaving the block normally commits the pending chunk.

        Raises:
            StreamError: head forcing was removed.
        """
        if not self.applied:
            raise StreamError(f"stream({name!r}) of a handle that was removed: apply head forcing again")
        timeline = self._timelines.setdefault(name, Timeline(name))
        token = open_stream.set(timeline)
        try:
            yield
            mine = [(plan, plan.streams[timeline]) for plan in self._plans if timeline in plan.streams]
            self._commit(mine)
        finally:
            open_stream.reset(token)

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Shows every attention call to `observer` while the block runs, for measuring."""
        observers = self._plans[0].activity.observers
        observers.append(observer)
        try:
            yield
        finally:
            observers.remove(observer)

    def remove(self) -> None:
        """Puts every original module back and gives the host's caches back empty; idempotent.

        Raises:
            StreamActiveError: a call or an explicit stream of this thread is open.
            PatchedModuleError: something added after apply still wraps one of our modules.
        """
        self._refuse_while_running("remove")
        for site, plan in zip(self._sites, self._plans, strict=True):
            check_reachable(site, plan)
        ours = list(self._in_place())
        for site, module, _ in ours:
            check_removable(module, site)
        for site, module, plan in ours:
            _strip(module, plan)
            _restore(site.original, plan)
            site.put(site.original)
        remove_hooks(self._model, self._plans[0].activity)
        self._timelines.clear()

    def __enter__(self) -> HeadForcing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return repr(self.status())

    @property
    def applied(self) -> bool:
        """Whether our modules are in place."""
        return any(True for _ in self._in_place())

    def _in_place(self) -> Iterator[tuple[Site, nn.Module, LayerPlan]]:
        """The sites that still hold a module of ours."""
        for site, plan in zip(self._sites, self._plans, strict=True):
            module = site.module
            if isinstance(module, HeadForcingMixin) and module.__dict__.get("_headforcing") is plan:
                yield site, module, plan

    def _streams(self) -> Iterator[tuple[LayerPlan, Stream]]:
        """All streams of all layers."""
        for plan in self._plans:
            for stream in list(plan.streams.values()):
                yield plan, stream

    def _commit(self, streams: Sequence[tuple[LayerPlan, Stream]]) -> None:
        for plan, stream in streams:
            check_finished(stream, plan.layer)
            if plan.activity.hears_phases:
                check_clean(stream, plan.layer)
        for _, stream in streams:
            stream.store.commit()

    def _running(self, what: str) -> list[KVStore]:
        """The memories of all videos that have begun."""
        if self._plans[0].activity.depth:
            raise StreamActiveError(f"{what}() inside an attention call: wait until the model returns")
        check_settled(self._plans[0], what)
        stores = [stream.store for _, stream in self._streams()]
        running = [store for store in stores if store.frames_so_far]
        if not running:
            raise StreamError(f"{what}(): no video is running, call it between two chunks of one")
        return running

    def _refuse_while_running(self, what: str) -> None:
        if self._plans and self._plans[0].activity.depth:
            raise StreamActiveError(f"{what}() inside an attention call: wait until the model returns")
        if open_stream.get() in self._timelines.values():
            raise StreamActiveError(f"{what}() inside `with handle.stream(...)`: leave the block first")


def handles_of(model: nn.Module) -> list[HeadForcing]:
    """The handles of what is applied to a model and its parts; made anew where they were dropped."""
    found = [module for module in model.modules() if isinstance(module, HeadForcingMixin)]
    by_application: dict[Activity, list[HeadForcingMixin]] = {}
    for module in found:
        by_application.setdefault(module._headforcing.activity, []).append(module)
    handles = []
    for modules in by_application.values():
        plans = [module._headforcing for module in modules]
        handle = plans[0].handle() if plans[0].handle is not None else None
        if not isinstance(handle, HeadForcing):
            handle = HeadForcing(model, sites_of(model, modules), plans)
        handles.append(handle)
    return handles


def _strip(ours: nn.Module, plan: LayerPlan) -> None:
    """Takes everything of ours off a module, with what hooks and compilation left of us."""
    for anchor, stream in list(plan.streams.items()):
        plan.options.adapter.give_back(anchor, stream.memo)
    plan.streams.clear()
    for name in ("forward", "_compiled_call_impl", "_headforcing"):
        ours.__dict__.pop(name, None)


def _restore(original: nn.Module, plan: LayerPlan) -> None:
    """Puts back a forward that the module had in its `__dict__` when head forcing came."""
    if plan.own_forward is not None:
        original.__dict__["forward"] = plan.own_forward
