"""Every error the library raises: one root, and the builtin kind it also is.

A message says what was found, what was expected, where (layer, head, chunk) and what to do next.
"""

from __future__ import annotations


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
    """A profile, or the file it comes from, is malformed, or lacks what a classifier needs."""


class WindowError(HeadForcingError, ValueError):
    """A role, or a chunk, needs more frames than the model was trained on."""


class AlreadyAppliedError(HeadForcingError, RuntimeError):
    """The model already carries head forcing with other roles or options."""


class PatchedModuleError(HeadForcingError, RuntimeError):
    """Another patch sits on an attention module, so ours could not be put in or taken out cleanly."""


class StreamActiveError(HeadForcingError, RuntimeError):
    """Something that needs a quiet model was asked for while a call or an explicit stream is open."""


class StreamError(HeadForcingError, RuntimeError):
    """A call does not say to which timeline it belongs, or its timeline can no longer be trusted."""


class StreamShapeError(StreamError, ValueError):
    """Batch, grid, heads or dtype changed inside one timeline."""


class ChunkOrderError(StreamError, ValueError):
    """A chunk does not follow the one before it."""


class ExternalEditError(StreamError):
    """The host's cache was changed from outside in a way no adapter knows."""


class NonFiniteKVError(StreamError, ArithmeticError):
    """Keys or values of a finished chunk hold NaN or infinity, so it was not committed."""


class ForeignRolesWarning(UserWarning):
    """A role map was measured on other weights than those it is applied to."""


class WeightsChangedWarning(UserWarning):
    """Weights of attention changed in the middle of a video, whose past was made by those before."""


class InactiveLayerWarning(UserWarning):
    """A layer that has roles was never called, though others were."""
