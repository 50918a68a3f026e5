"""Taking head forcing into a model and out again without a trace."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from headforcing.adapter import Adapter, find_adapter
from headforcing.attention import (
    Activity,
    HeadForcingMixin,
    LayerPlan,
    Timeline,
    open_stream,
    original_class,
    patched_class,
    with_class,
)
from headforcing.backends import Attend, find_backend
from headforcing.errors import (
    AlreadyAppliedError,
    PatchedModuleError,
    RoleMapError,
    StreamActiveError,
    UnsupportedModelError,
)
from headforcing.presets import PRESETS
from headforcing.role_map import RoleMap
from headforcing.roles import HeadRole
from headforcing.status import Status, collect
from headforcing.stores import KVStore, store_class
from headforcing.types import Heads

Roles = RoleMap | HeadRole | Sequence[Sequence[HeadRole]] | str | Path
"""What may stand for roles: a map, one role for all heads, a table, a preset name, a file."""


@dataclass(frozen=True)
class _Site:
    """One attention module, where it sits, and what takes its place."""

    parent: nn.Module
    name: str
    path: str
    original: nn.Module

    def put(self, module: nn.Module) -> None:
        self.parent._modules[self.name] = module


class HeadForcing:
    """The handle of an applied model: ask it, reset it, remove it. Also a context manager.

    Made by `apply_head_forcing`.
    """

    def __init__(self, sites: Sequence[_Site], plans: Sequence[LayerPlan], roles: RoleMap) -> None:
        self._sites = tuple(sites)
        self._plans = tuple(plans)
        self._timelines: dict[str, Timeline] = {}
        self.roles = roles
        """The role map in force, every number filled in."""

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two applications the same: roles, window and tools."""
        return self._plans[0].key

    def status(self) -> Status:
        """What is applied and what it holds right now, counted from the tensors."""
        return collect(self._plans, self.roles)

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

    def _in_place(self) -> Iterator[tuple[_Site, nn.Module, LayerPlan]]:
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


def apply_head_forcing(
    model: nn.Module,
    roles: Roles,
    *,
    adapter: Adapter | None = None,
    window: int | None = None,
    chunk: int | None = None,
    store: str | type[KVStore] = "ring",
    backend: str | Attend = "sdpa",
    replace: bool = False,
) -> HeadForcing:
    """Gives every attention head of a model the memory its role needs.

    Everything is checked before anything is changed: a call that fails leaves the model untouched.
    No cache is allocated until the model runs.

    Args:
        model: an AR video diffusion model, or anything that holds one (wrapper, pipeline module,
            PEFT or compiled model).
        roles: a `RoleMap`, one role for all heads, a table `roles[layer][head]`, a preset name, or the
            path of a role-map file.
        adapter: the model's adapter; default: the one that fits.
        window: frames the model was trained on; default: what the model says.
        chunk: frames of the longest chunk; default: what the model says.
        store: where keys and values live, by name or class.
        backend: how attention is computed, by name or function.
        replace: swap the roles of a model that is applied already, dropping what it remembers.

    Returns:
        The handle. Applying the same roles again returns the same handle.

    Raises:
        UnsupportedModelError: no adapter fits, or the model does not say a number that is needed.
        RoleMapError: the roles are malformed or do not fit the model.
        WindowError: a role needs more frames than the model was trained on.
        AlreadyAppliedError: other roles are applied, and `replace` is false.
        PatchedModuleError: something else has replaced `forward` on an attention module.

    Example:
        >>> import headforcing as hf
        >>> from headforcing.demo import demo_model, demo_roles
        >>> model = demo_model()
        >>> with hf.apply_head_forcing(model, demo_roles()) as handle:
        ...     handle.status().layers
        6
    """
    chosen = adapter or find_adapter(model)
    found = list(chosen.attentions(model))
    if not found:
        raise UnsupportedModelError(f"{chosen.name}: {chosen.why_not(model)}")
    shapes = {chosen.heads(module) for _, module in found}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"attention layers differ in (heads, head dim): {sorted(shapes)}")
    num_heads = shapes.pop()[0]
    window = chosen.window(model) if window is None else window
    chunk = chosen.chunk(model) if chunk is None else chunk
    fitted = _role_map(roles, len(found), num_heads, window, chunk).fit(len(found), num_heads, window, chunk)
    tools = (
        chosen,
        store_class(store) if isinstance(store, str) else store,
        find_backend(backend) if isinstance(backend, str) else backend,
    )
    key = (fitted, window, type(chosen), *tools[1:])
    present = _handle_of(model)
    if present is not None:
        if present.key == key:
            return present
        if not replace:
            raise AlreadyAppliedError(
                "the model carries head forcing already, with other roles or options: remove it first, "
                "or pass replace=True"
            )
        present.remove()
        found = list(chosen.attentions(model))
    activity = Activity()
    plans = [
        LayerPlan(layer, _heads_by_role(row), num_heads, window, *tools, activity, key)
        for layer, row in enumerate(fitted.layers)
    ]
    return _install(_sites(model, found), plans, fitted)


def remove_head_forcing(model: nn.Module) -> None:
    """Takes head forcing out of a model, also out of a copy that has no handle; idempotent.

    Raises:
        StreamActiveError: a call of the model is running.
        PatchedModuleError: a hook added after apply still wraps one of our modules.
    """
    handle = _handle_of(model)
    if handle is not None:
        handle.remove()


def _install(sites: Sequence[_Site], plans: Sequence[LayerPlan], roles: RoleMap) -> HeadForcing:
    for site in sites:
        if "forward" in site.original.__dict__:
            raise PatchedModuleError(
                f"{site.path}: something replaced forward on this module (an accelerate hook, a compiled "
                "forward?), which would bypass head forcing: remove it, apply, then add it again"
            )
    handle = HeadForcing(sites, plans, roles)
    for site, plan in zip(sites, plans, strict=True):
        plan.handle = weakref.ref(handle)
        cls: Any = type(site.original)
        replacement = with_class(site.original, patched_class(cls))
        replacement.__dict__["_headforcing"] = plan
        site.put(replacement)
    return handle


def _handle_of(model: nn.Module) -> HeadForcing | None:
    """The handle of an applied model; made anew where it was dropped, or the model is a copy."""
    found = [(path, module) for path, module in model.named_modules() if _is_ours(module)]
    if not found:
        return None
    plans: list[LayerPlan] = [module.__dict__["_headforcing"] for _, module in found]
    handle = plans[0].handle() if plans[0].handle is not None else None
    if isinstance(handle, HeadForcing):
        return handle
    roles = plans[0].key[0]
    handle = HeadForcing(_sites(model, found), plans, roles)
    for plan in plans:
        plan.handle = weakref.ref(handle)
    return handle


def _is_ours(module: nn.Module | None) -> bool:
    return isinstance(module, HeadForcingMixin)


def _sites(model: nn.Module, found: Sequence[tuple[str, nn.Module]]) -> list[_Site]:
    sites = []
    for path, module in found:
        parent, _, name = path.rpartition(".")
        if isinstance(module, HeadForcingMixin):
            module = with_class(module, original_class(module))
        sites.append(_Site(model.get_submodule(parent), name, path, module))
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
        plan.adapter.give_back(anchor, stream.memo)
    plan.streams.clear()
    ours.__dict__.pop("forward", None)
    ours.__dict__.pop("_headforcing", None)


def _role_map(roles: Roles, layers: int, heads: int, window: int, chunk: int) -> RoleMap:
    """Whatever stands for roles, as a map."""
    if isinstance(roles, RoleMap):
        return roles
    if isinstance(roles, HeadRole):
        return RoleMap.uniform(roles, layers, heads)
    if isinstance(roles, str) and roles in PRESETS:
        return PRESETS[roles](layers, heads, window, chunk)
    if isinstance(roles, str | Path):
        if Path(roles).suffix != ".json" and not Path(roles).exists():
            raise RoleMapError(
                f"{str(roles)!r} is neither a preset ({', '.join(sorted(PRESETS))}) nor a role-map file"
            )
        return RoleMap.load(roles)
    if isinstance(roles, Sequence):
        return RoleMap(tuple(tuple(row) for row in roles))  # type: ignore[arg-type]
    raise RoleMapError(
        f"roles is a {type(roles).__name__}: expected a RoleMap, a HeadRole, a table roles[layer][head], "
        "a preset name or the path of a role-map file"
    )


def _heads_by_role(row: Sequence[HeadRole]) -> dict[HeadRole, Heads]:
    """The heads of every role of a layer: heads of equal roles share buffers and calls."""
    heads: dict[HeadRole, list[int]] = {}
    for head, role in enumerate(row):
        heads.setdefault(role, []).append(head)
    return {role: Heads(indices, len(row)) for role, indices in heads.items()}
