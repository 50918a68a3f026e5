"""The handle of an applied model, and how modules are put in and taken out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from headforcing.attention import HeadForcingMixin, original_class, patched_class, with_class
from headforcing.errors import PatchedModuleError, StreamActiveError, StreamError, UnsupportedModelError
from headforcing.observation import Observer
from headforcing.plan import Activity, LayerPlan, Options, Timeline, open_stream
from headforcing.role_map import RoleMap
from headforcing.status import Status, collect


@dataclass(frozen=True)
class Site:
    """One attention module, and every place where the model holds it.

    Attributes:
        path: dotted name, for messages.
        places: parents and names; a module can be registered more than once.
        original: what belongs there when head forcing is out.
    """

    path: str
    places: tuple[tuple[nn.Module, str], ...]
    original: nn.Module

    @property
    def module(self) -> nn.Module | None:
        """What sits there now."""
        parent, name = self.places[0]
        return parent._modules.get(name)

    def put(self, module: nn.Module) -> None:
        """Makes `module` the one the model calls here."""
        for parent, name in self.places:
            parent._modules[name] = module


class HeadForcing:
    """The handle of an applied model: ask it, reset it, remove it. Also a context manager.

    Made by `apply_head_forcing`.
    """

    def __init__(self, sites: Sequence[Site], plans: Sequence[LayerPlan]) -> None:
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
        for plan in self._plans:
            for stream in list(plan.streams.values()):
                stream.store.reset()
                plan.options.adapter.forget(stream.memo)

    def commit(self) -> None:
        """Ends the pending chunk of every stream, which otherwise ends when the next one begins."""
        self._refuse_while_running("commit")
        for plan in self._plans:
            for stream in list(plan.streams.values()):
                stream.store.commit()

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
            for plan in self._plans:
                if timeline in plan.streams:
                    plan.streams[timeline].store.commit()
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
            PatchedModuleError: a hook added after apply still wraps one of our modules.
        """
        self._refuse_while_running("remove")
        ours = list(self._in_place())
        for site, module, _ in ours:
            _check_removable(module, site.path)
        for site, module, plan in ours:
            _strip(module, plan)
            _restore(site.original, plan)
            site.put(site.original)
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

    def _refuse_while_running(self, what: str) -> None:
        if self._plans and self._plans[0].activity.depth:
            raise StreamActiveError(f"{what}() inside an attention call: wait until the model returns")
        if open_stream.get() in self._timelines.values():
            raise StreamActiveError(f"{what}() inside `with handle.stream(...)`: leave the block first")


def install(model: nn.Module, options: Options) -> HeadForcing:
    """Replaces every attention module of a model that carries no head forcing.

    Raises:
        PatchedModuleError: something else intercepts calls of one of them.
    """
    sites = sites_of(model, [module for _, module in options.adapter.attentions(model)])
    for site in sites:
        _check_patchable(site)
    activity = Activity()
    plans = [LayerPlan(layer, options, activity) for layer in range(len(sites))]
    replacements = []
    for site in sites:
        cls: Any = type(site.original)
        replacements.append(with_class(site.original, patched_class(cls)))
    for site, plan, replacement in zip(sites, plans, replacements, strict=True):
        plan.original = weakref.ref(site.original)
        plan.own_forward = replacement.__dict__.pop("forward", None)
        replacement.__dict__["_headforcing"] = plan
        site.put(replacement)
    return HeadForcing(sites, plans)


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
            handle = HeadForcing(sites_of(model, modules), plans)
        handles.append(handle)
    return handles


def sites_of(model: nn.Module, modules: Sequence[nn.Module]) -> list[Site]:
    """Where the modules sit, with what belongs there when head forcing is out.

    Raises:
        UnsupportedModelError: the model is an attention module itself, which nothing could replace.
    """
    paths = {id(module): path for path, module in model.named_modules()}  # ids of living objects
    places: dict[int, list[tuple[nn.Module, str]]] = {id(module): [] for module in modules}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if id(child) in places:
                places[id(child)].append((parent, name))
    if any(not found for found in places.values()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an attention module itself: pass the model that calls it"
        )
    return [Site(paths[id(m)], tuple(places[id(m)]), _original_of(m)) for m in modules]


def _original_of(module: nn.Module) -> nn.Module:
    if not isinstance(module, HeadForcingMixin):
        return module
    original = module._headforcing.original
    held = None if original is None else original()
    return held if isinstance(held, nn.Module) else with_class(module, original_class(module))


def _check_patchable(site: Site) -> None:
    own = site.original.__dict__
    forward = own.get("forward")
    compiled = own.get("_compiled_call_impl") is not None
    compiled = compiled or any(name == "_orig_mod" for _, name in site.places)
    if compiled or not (forward is None or _is_own(forward, site.original)):
        raise PatchedModuleError(
            f"{site.path}: something wraps forward of this module (an accelerate hook, torch.compile?), "
            "which would bypass head forcing: remove it, apply, then add it again"
        )


def _check_removable(ours: nn.Module, path: str) -> None:
    forward = ours.__dict__.get("forward")
    if not (forward is None or _is_own(forward, ours)):
        raise PatchedModuleError(
            f"{path}: something wrapped forward after head forcing was applied (an accelerate hook?): "
            "remove it first, then remove head forcing"
        )


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Whether a forward in the `__dict__` is just the module's own, as a removed hook leaves it."""
    return getattr(forward, "__self__", None) is module


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
