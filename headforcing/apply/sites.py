"""The places of the attention modules in a model, their originals, and checks before these return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from headforcing.attention.layer_state import LayerState
from headforcing.attention.module import HeadForcingMixin, original_class, with_class
from headforcing.errors import PatchedModuleError, UnsupportedModelError


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


def check_single(sites: Sequence[Site]) -> None:
    """Checks that PEFT keeps no copy of an attention beside it, which would look like one more layer.

    Raises:
        PatchedModuleError: it keeps one.
    """
    for site in sites:
        if any(name == "original_module" for _, name in site.places):
            raise PatchedModuleError(
                f"{site.path}: PEFT keeps this module beside a copy that it trains (modules_to_save), so one "
                "layer has two attentions: take it out of modules_to_save, or merge_and_unload() first"
            )


def _original_of(module: nn.Module) -> nn.Module:
    if not isinstance(module, HeadForcingMixin):
        return module
    original = module._headforcing.original
    held = None if original is None else original()
    return held if isinstance(held, nn.Module) else with_class(module, original_class(module))


def is_own(forward: Any, module: nn.Module) -> bool:
    """Whether a forward in the `__dict__` is just the module's own, as a removed hook leaves it."""
    return getattr(forward, "__self__", None) is module


def check_reachable(site: Site, layer: LayerState) -> None:
    """Checks that no wrapper or copy sits in the place of our module, which could not be put back.

    Raises:
        PatchedModuleError: one does.
    """
    there = site.module
    if isinstance(there, HeadForcingMixin) and there._headforcing.handle is None:
        raise PatchedModuleError(
            f"{site.path}: a copy of our module took its place (PEFT's modules_to_save?), which this handle "
            "does not know: use remove_head_forcing(model)"
        )
    if there is None or isinstance(there, HeadForcingMixin):
        return
    if any(module.__dict__.get("_headforcing") is layer for module in there.modules()):
        raise PatchedModuleError(
            f"{site.path}: a {type(there).__name__} was put around it after head forcing was applied "
            "(torch.compile, PEFT's modules_to_save?): take that out first, then remove head forcing"
        )


def check_removable(ours: nn.Module, site: Site) -> None:
    """Checks that our module is as we made it.

    Raises:
        PatchedModuleError: its forward or its class changed.
    """
    forward = ours.__dict__.get("forward")
    if not (forward is None or is_own(forward, ours)):
        raise PatchedModuleError(
            f"{site.path}: something wrapped forward after head forcing was applied (an accelerate hook?): "
            "remove it first, then remove head forcing"
        )
    if type(ours).__mro__[1] is not HeadForcingMixin:
        raise PatchedModuleError(
            f"{site.path}: its class became {type(ours).__name__} after head forcing was applied "
            "(fully_shard?), which the module it stands for would not have: shard first, then apply"
        )
