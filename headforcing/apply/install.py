"""Putting head forcing into a model that carries none."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from headforcing.apply.handle import HeadForcing
from headforcing.apply.hooks import hear_phases
from headforcing.apply.sites import Site, is_own, sites_of
from headforcing.attention.activity import Activity
from headforcing.attention.guards import check_runs
from headforcing.attention.module import patched_class, with_class
from headforcing.attention.plan import LayerPlan, Options
from headforcing.errors import PatchedModuleError


def install(model: nn.Module, options: Options) -> HeadForcing:
    """Replaces every attention module of a model that carries no head forcing.

    Raises:
        PatchedModuleError: something else intercepts calls of one of them.
    """
    check_runs(model.named_modules())
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
        plan.module = weakref.ref(replacement)
        site.put(replacement)
    activity.way = _way(model, sites)
    hear_phases(model, options.roles, options.adapter, activity)
    return HeadForcing(model, sites, plans)


def _way(model: nn.Module, sites: Sequence[Site]) -> list[tuple[str, weakref.ref[nn.Module]]]:
    """The modules whose call leads to an attention, and the attentions themselves."""
    names = [site.path.split(".") for site in sites]
    paths = {".".join(parts[:depth]) for parts in names for depth in range(len(parts) + 1)}
    return [(path, weakref.ref(module)) for path, module in model.named_modules() if path in paths]


def _check_patchable(site: Site) -> None:
    own = site.original.__dict__
    forward = own.get("forward")
    compiled = own.get("_compiled_call_impl") is not None
    compiled = compiled or any(name == "_orig_mod" for _, name in site.places)
    if compiled or not (forward is None or is_own(forward, site.original)):
        raise PatchedModuleError(
            f"{site.path}: something wraps forward of this module (an accelerate hook, torch.compile?), "
            "which would bypass head forcing: remove it, apply, then add it again"
        )
