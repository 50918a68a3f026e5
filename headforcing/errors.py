"""Every error the library raises: one root, and the builtin kind it also is.

A message says what was found, what was expected, where (layer, head, chunk) and what to do next. What comes
from a file stands in it as it is, and is escaped when the message is shown.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from types import ModuleType

_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    r"""Text in one line that cannot drive a terminal: control characters (C0, C1, bidi) as `\u001b`."""
    return _UNSHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def escaped_lines(text: str) -> str:
    """Text of our own in several lines, each escaped."""
    return "\n".join(map(escaped, text.split("\n")))


class HeadForcingError(Exception):
    """Root of all errors of this library."""

    def __str__(self) -> str:
        return escaped(super().__str__())


class UnsupportedModelError(HeadForcingError, TypeError):
    """No adapter knows the attention layers of the model."""

    def __str__(self) -> str:
        return escaped_lines(Exception.__str__(self))  # a line per adapter


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


class ModelChangedError(HeadForcingError, RuntimeError):
    """The model no longer says what it said at apply: its window, its chunks, its heads."""


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

    def __str__(self) -> str:
        return escaped(super().__str__())


class UnverifiedCodeWarning(UserWarning):
    """An attention has a known signature, and code that was never compared with its adapter."""


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
