"""Says when an attention has a signature that is known, and code that nobody compared with its adapter."""

from __future__ import annotations

import inspect
import warnings

from torch import nn

from headforcing.adapters.base import Adapter
from headforcing.adapters.verified import digest, recorded
from headforcing.errors import UnverifiedCodeWarning

OURS = "headforcing."


def unverified(model: nn.Module, adapter: Adapter) -> dict[str, str]:
    """Attention classes whose code is not known to the adapter, by digest; our own code is."""
    if not adapter.verified:
        return {}
    found = {}
    for _, module in adapter.attentions(model):
        forward = inspect.unwrap(type(module).forward)
        if not forward.__module__.startswith(OURS):
            found[digest(module) or "no source"] = forward.__qualname__.rpartition(".")[0]
    known = {*adapter.verified, *(recorded() if found.keys() - adapter.verified.keys() else ())}
    return {code: name for code, name in found.items() if code not in known}


def warn_unverified(model: nn.Module, adapter: Adapter) -> None:
    """Warns of code that is not known; Python shows a warning once per place."""
    for code, name in unverified(model, adapter).items():
        warnings.warn(
            f"{name} has the signature of {adapter.name}, but other code ({code}): it may remember other "
            "frames, or at other positions. Run `headforcing verify my_model:make` to compare, "
            "and with --record to be silent",
            UnverifiedCodeWarning,
            stacklevel=3,
        )
