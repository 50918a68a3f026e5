"""Finds layers and passes whose attention was skipped (caches of blocks, a replaced forward)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from headforcing.errors import InactiveLayerWarning, PatchedModuleError, StreamError
from headforcing.types import runs

RUNS_ALWAYS = {"peft_autocast_disable"}
"""Hooks of diffusers that put a forward of their own around the module's and always call it."""


SKIPS = re.compile("(tea|mag|easy|delta)_?cache|taylor_?seer", re.IGNORECASE)
"""Names of the functions that published caches put in the place of a model's forward."""


def check_runs(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Checks that no known cache may skip one of the modules, given with their names.

    Raises:
        PatchedModuleError: one may.
    """
    for path, module in modules:
        if (found := _cache_on(module)) is not None:
            raise PatchedModuleError(
                f"{path or 'the model'}: {found} skips calls of attention, whose keys would be missing from "
                "the memory. Take it out first, with disable_cache() or by removing its hooks: roles and "
                "such caches cannot be combined"
            )


def _cache_on(module: nn.Module) -> str | None:
    """The cache on a module that may not call it, or the modules below; `None`: none that is known."""
    own = module.__dict__
    hooks = getattr(own.get("_diffusers_hook"), "hooks", {})
    names = [name for name, hook in hooks.items() if hasattr(hook, "new_forward") and name not in RUNS_ALWAYS]
    if names or own.get("_cache_config") is not None:
        return f"a cache of diffusers ({', '.join(names) or 'enable_cache'})"
    if own.get("_is_cached"):
        return "a cache of blocks (cache-dit, ParaAttention)"
    forward = getattr(own.get("forward", type(module).forward), "__name__", "")
    switch = getattr(module, "enable_teacache", None)
    if switch or (switch is None and SKIPS.search(forward)):
        return f"a cache of blocks ({forward})"
    return None


def check_complete(late: Sequence[int], chunk: range) -> None:
    """Checks that the last pass over a chunk left no layer out, which would keep what an earlier pass wrote.

    Raises:
        StreamError: it did.
    """
    if late:
        raise StreamError(
            f"{layers_named(late)}: not called in the last pass over frames {chunk.start}..{chunk.stop - 1}, "
            "which layer 0 ran, so keys of an earlier pass would stay: run that pass again, or take out what "
            "skips attention (a cache, a hook on the blocks)"
        )


def warn_of_idle(layers: Sequence[int]) -> None:
    """Says which layers have roles, and nobody calls them."""
    warnings.warn(
        f"{layers_named(layers)}: never called with a cache, though others ran a whole chunk, so roles have "
        "no effect there. Something calls other code in its place (a forward that was replaced), or skips "
        "it: take that out, then apply again; handle.status() says who is served",
        InactiveLayerWarning,
        stacklevel=5,
    )


def layers_named(numbers: Sequence[int]) -> str:
    """Ascending layers in words."""
    ends = [f"{first}..{stop - 1}" if stop - first > 1 else f"{first}" for first, stop in runs(numbers)]
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(ends)}"
