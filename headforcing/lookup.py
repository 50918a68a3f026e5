"""Options by name: the folder is the list, so it cannot go stale."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from headforcing.errors import OptionError


def named_module(package: str, name: str) -> ModuleType:
    """The module `name` of a package whose modules are the choices.

    Raises:
        OptionError: there is no such module; the message lists those there are.
    """
    known = module_names(package)
    if name not in known:
        kind = package.rpartition(".")[2].removesuffix("s")
        raise OptionError(f"unknown {kind} {name!r}: expected one of {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}")


def module_names(package: str) -> tuple[str, ...]:
    """Names of the modules in a package, sorted."""
    path = importlib.import_module(package).__path__
    return tuple(sorted(module.name for module in pkgutil.iter_modules(path)))
