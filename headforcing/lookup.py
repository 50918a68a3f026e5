"""Options by name: the folder is the list, so it cannot go stale."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

from headforcing.errors import OptionError

_T = TypeVar("_T")


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


def named_class(package: str, name: str, base: type[_T]) -> type[_T]:
    """The first subclass of `base` that the module `name` of a package defines.

    Raises:
        OptionError: there is no such module; the message lists those there are.
    """
    module = named_module(package, name)
    members = (value for value in vars(module).values() if isinstance(value, type))
    found = [cls for cls in members if issubclass(cls, base) and cls.__module__ == module.__name__]
    return found[0]


def module_names(package: str) -> tuple[str, ...]:
    """Names of the modules in a package, sorted."""
    path = importlib.import_module(package).__path__
    return tuple(sorted(module.name for module in pkgutil.iter_modules(path)))
