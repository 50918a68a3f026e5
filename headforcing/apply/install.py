"""Putting head forcing into a model that carries none."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from headforcing.apply.handle import HeadForcing
from headforcing.apply.handles import check_videos, remove_all
from headforcing.apply.hooks import add_phase_hook
from headforcing.apply.sites import Site, is_own, sites_of
from headforcing.attention.activity import Activity
from headforcing.attention.layer_state import LayerState, Options
from headforcing.attention.module import HeadForcingMixin, patched_class, with_class
from headforcing.attention.read_facts import ReadFacts
from headforcing.errors import PatchedModuleError


def install(
    model: nn.Module, options: Options, facts: ReadFacts, before: Sequence[HeadForcing] = ()
) -> HeadForcing:
    """Replaces every attention module of a model, and removes what was applied `before`.

    Raises:
        PatchedModuleError: something else intercepts calls of one of them; nothing has changed.
        StreamActiveError: a call of the model is running; likewise.
    """
    sites = sites_of(model, [module for _, module in options.adapter.attentions(model)])
    for handle in before:
        handle.check_remove()
    for site in sites:
        _check_patchable(site)
    check_videos(before)
    activity = Activity()
    activity.facts = facts
    layers = [LayerState(layer, options, activity) for layer in range(len(sites))]
    replacements = []
    for site in sites:
        cls: Any = type(site.original)
        replacements.append(with_class(site.original, patched_class(cls)))
    remove_all(before)
    for site, layer, replacement in zip(sites, layers, replacements, strict=True):
        layer.original = weakref.ref(site.original)
        layer.own_forward = replacement.__dict__.pop("forward", None)
        replacement.__dict__["_headforcing"] = layer
        layer.module = weakref.ref(replacement)
        site.put(replacement)
    activity.path_modules = _path_modules(model, sites)
    add_phase_hook(model, options.roles, options.adapter, activity)
    return HeadForcing(model, sites, layers)


def _path_modules(model: nn.Module, sites: Sequence[Site]) -> list[tuple[str, weakref.ref[nn.Module]]]:
    """The modules between the root and each attention, both included."""
    names = [site.path.split(".") for site in sites]
    paths = {".".join(parts[:depth]) for parts in names for depth in range(len(parts) + 1)}
    return [(path, weakref.ref(module)) for path, module in model.named_modules() if path in paths]


def _check_patchable(site: Site) -> None:
    own = site.original.__dict__
    forward = own.get("forward")
    ours = isinstance(site.module, HeadForcingMixin)  # what was compiled of it goes with it
    compiled = own.get("_compiled_call_impl") is not None and not ours
    compiled = compiled or any(name == "_orig_mod" for _, name in site.places)
    if compiled or not (forward is None or is_own(forward, site.original)):
        raise PatchedModuleError(
            f"{site.path}: something wraps forward of this module (an accelerate hook, torch.compile?), "
            "which would bypass head forcing: remove it, apply, then add it again"
        )
