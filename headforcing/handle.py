"""The handle of an applied model, and how modules are put in and taken out."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from headforcing.attention import HeadForcingMixin, original_class, patched_class, with_class
from headforcing.errors import PatchedModuleError, StreamActiveError
from headforcing.plan import Activity, LayerPlan, Options, Timeline, open_stream
from headforcing.role_map import RoleMap
from headforcing.status import Status, collect


@dataclass(frozen=True)
class Site:
    """One attention module, where it sits, and what takes its place."""

    parent: nn.Module
    name: str
    path: str
    original: nn.Module

    def put(self, module: nn.Module) -> None:
        """Makes `module` the one the model calls here."""
        self.parent._modules[self.name] = module


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
        """Frames a head remembers now, per stream and sample, oldest first, own chunk excluded.

        Reads the device: for people and pictures, not for the path of a model.
        """
        role, plan = self.roles.layers[layer][head], self._plans[layer]
        return [stream.store.frames(role) for stream in plan.streams.values()]

    def status(self) -> Status:
        """What is applied and what it holds right now, counted from the tensors."""
        return collect(self._plans)

    def reset(self) -> None:
        """Forgets every video; the next chunk of each stream must start at frame 0."""
        self._refuse_while_running("reset")
        for plan in self._plans:
            for stream in plan.streams.values():
                stream.store.reset()

    def commit(self) -> None:
        """Ends the pending chunk of every stream, which otherwise ends when the next one begins."""
        self._refuse_while_running("commit")
        for plan in self._plans:
            for stream in plan.streams.values():
                stream.store.commit()

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Names the timeline of the calls inside, for hosts whose calls carry no cache object.

        One name per video and CFG branch. Leaving the block normally commits the pending chunk.
        """
        timeline = self._timelines.setdefault(name, Timeline(name))
        token = open_stream.set(timeline)
        try:
            yield
            for plan in self._plans:
                if timeline in plan.streams:
                    plan.streams[timeline].store.commit()
        finally:
            open_stream.reset(token)

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

    def _in_place(self) -> Iterator[tuple[Site, nn.Module, LayerPlan]]:
        """The sites that still hold a module of ours."""
        for site, plan in zip(self._sites, self._plans, strict=True):
            module = site.parent._modules.get(site.name)
            if isinstance(module, HeadForcingMixin) and module.__dict__.get("_headforcing") is plan:
                yield site, module, plan

    def _refuse_while_running(self, what: str) -> None:
        if self._plans and self._plans[0].activity.running:
            raise StreamActiveError(f"{what}() inside an attention call: wait until the model returns")
        if open_stream.get() in self._timelines.values():
            raise StreamActiveError(f"{what}() inside `with handle.stream(...)`: leave the block first")


def install(model: nn.Module, options: Options) -> HeadForcing:
    """Replaces every attention module of a model that carries no head forcing.

    Raises:
        PatchedModuleError: something else has replaced `forward` on one of them.
    """
    sites = sites_of(model, options.adapter.attentions(model))
    for site in sites:
        if "forward" in site.original.__dict__:
            raise PatchedModuleError(
                f"{site.path}: something replaced forward on this module (an accelerate hook, a compiled "
                "forward?), which would bypass head forcing: remove it, apply, then add it again"
            )
    activity = Activity()
    plans = [LayerPlan(layer, options, activity) for layer in range(len(sites))]
    for site, plan in zip(sites, plans, strict=True):
        cls: Any = type(site.original)
        replacement = with_class(site.original, patched_class(cls))
        replacement.__dict__["_headforcing"] = plan
        site.put(replacement)
    return HeadForcing(sites, plans)


def handle_of(model: nn.Module) -> HeadForcing | None:
    """The handle of an applied model; made anew where it was dropped, or the model is a copy."""
    found = [(path, module) for path, module in model.named_modules() if _is_ours(module)]
    if not found:
        return None
    plans: list[LayerPlan] = [module.__dict__["_headforcing"] for _, module in found]
    handle = plans[0].handle() if plans[0].handle is not None else None
    return handle if isinstance(handle, HeadForcing) else HeadForcing(sites_of(model, found), plans)


def _is_ours(module: nn.Module | None) -> bool:
    return isinstance(module, HeadForcingMixin)


def sites_of(model: nn.Module, found: Iterable[tuple[str, nn.Module]]) -> list[Site]:
    """Where the found modules sit, with what belongs there when head forcing is out."""
    sites = []
    for path, module in found:
        parent, _, name = path.rpartition(".")
        if isinstance(module, HeadForcingMixin):
            module = with_class(module, original_class(module))
        sites.append(Site(model.get_submodule(parent), name, path, module))
    return sites


def _check_removable(ours: nn.Module, path: str) -> None:
    forward = ours.__dict__.get("forward")
    if forward is not None and getattr(forward, "__self__", None) is not ours:
        raise PatchedModuleError(
            f"{path}: something wrapped forward after head forcing was applied (an accelerate hook?): "
            "remove it first, then remove head forcing"
        )


def _strip(ours: nn.Module, plan: LayerPlan) -> None:
    """Takes everything of ours off a module; a forward left behind by a removed hook is ours too."""
    for anchor, stream in list(plan.streams.items()):
        plan.options.adapter.give_back(anchor, stream.memo)
    plan.streams.clear()
    ours.__dict__.pop("forward", None)
    ours.__dict__.pop("_headforcing", None)
