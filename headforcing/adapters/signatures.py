"""What the `forward` of a module takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the module's `forward`, defaults filled in."""
    cls: Any = type(module)
    simple = _simple(cls)
    if simple is not None and len(args) < len(simple[0]):
        (first, *names), defaults, required = simple
        given = {*names[: len(args)], *kwargs}
        if len(given) == len(args) + len(kwargs) and required <= given <= defaults.keys():
            return {first: module, **defaults, **dict(zip(names, args, strict=False)), **kwargs}
    bound = _signature(cls).bind(module, *args, **kwargs)  # also where it has to say what is wrong
    bound.apply_defaults()
    return bound.arguments


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the module's `forward`, `self` excluded."""
    cls: Any = type(module)
    return tuple(_signature(cls).parameters)[1:]


@functools.cache
def _simple(cls: Any) -> tuple[tuple[str, ...], dict[str, Any], frozenset[str]] | None:
    """Of a `forward` whose parameters can all be given by place or by name: names, defaults, required names.

    Parameters without a default have `None` in its place, in order. `None`: some are given otherwise.
    """
    every = [*_signature(cls).parameters.values()]
    if any(one.kind is not one.POSITIONAL_OR_KEYWORD for one in every):
        return None
    later = every[1:]
    defaults = {one.name: None if one.default is one.empty else one.default for one in later}
    required = frozenset(one.name for one in later if one.default is one.empty)
    return tuple(one.name for one in every), defaults, required


@functools.cache
def _signature(cls: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(cls.forward)
