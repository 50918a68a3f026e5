"""Every error the library raises: one root, and the builtin kind it also is.

A message says what was found, what was expected, where (layer, head, chunk) and what to do next.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


class HeadForcingError(Exception):
    """Root of all errors of this library."""


class UnsupportedModelError(HeadForcingError, TypeError):
    """No adapter knows the attention layers of the model."""


class RoleError(HeadForcingError, ValueError):
    """A role, or a number inside it, is not possible."""


class OptionError(HeadForcingError, ValueError):
    """An option has a value that does not exist."""


class RoleMapError(HeadForcingError, ValueError):
    """A role map, or the file it comes from, is malformed."""


class RoleMapMismatchError(RoleMapError):
    """A role map is well formed but does not fit the model."""


class ProfileError(HeadForcingError, ValueError):
    """A profile, or the file it comes from, is malformed, or lacks what a classifier requires."""


class WindowError(HeadForcingError, ValueError):
    """A role, or a chunk, requires more frames than the model was trained on."""


class AlreadyAppliedError(HeadForcingError, RuntimeError):
    """The model already carries head forcing with other roles or options."""


class PatchedModuleError(HeadForcingError, RuntimeError):
    """Another patch sits on an attention module, so ours could not be put in or taken out cleanly."""


class StreamActiveError(HeadForcingError, RuntimeError):
    """Something that requires a quiet model was asked for while a call or an explicit stream is open."""


class StreamError(HeadForcingError, RuntimeError):
    """A call does not say to which timeline it belongs, or its timeline can no longer be trusted."""


class StreamShapeError(StreamError, ValueError):
    """Batch, grid, heads or dtype changed inside one timeline."""


class ChunkOrderError(StreamError, ValueError):
    """A chunk does not follow the one before it."""


class ExternalEditError(StreamError):
    """The base model's KV cache was changed from outside in a way no adapter knows."""


class NonFiniteKVError(StreamError, ArithmeticError):
    """Queries, keys or values of a finished chunk hold NaN or infinity; the message says what follows."""


class ForeignRolesWarning(UserWarning):
    """A role map was measured on other weights than those it is applied to."""


class InactiveLayerWarning(UserWarning):
    """A layer that has roles was never called, though others were."""


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
    return tuple(sorted(module.name for module in pkgutil.iter_modules(path) if not module.ispkg))
