"""Requirements of a backend: device, dtype, head dim, compute capability; checked before the kernel runs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from headforcing.attention.part import Part
from headforcing.errors import OptionError

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """What attention is asked for.

    Attributes:
        device: kind of device, as in `torch.device.type`.
        dtype: of queries, keys and values.
        head_dim: channels per head, `D`.
        capability: CUDA compute capability; `None`: not an NVIDIA GPU.
        flash_built: whether PyTorch was built with FlashAttention; only asked on `cuda`.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    capability: tuple[int, int] | None = None
    flash_built: bool = True

    @classmethod
    def of(cls, q: Tensor) -> Case:
        """The case of queries `[..., D]`."""
        flash_built = q.device.type != "cuda" or _flash_built()
        return cls(q.device.type, q.dtype, q.shape[-1], _capability(q.device), flash_built)

    def __str__(self) -> str:
        gpu = "" if self.capability is None else f" (compute capability {_dotted(self.capability)})"
        return f"{_name(self.dtype)} on {self.device}{gpu} with {self.head_dim} channels per head"


@dataclass(frozen=True)
class Requirements:
    """What a backend requires; by default nothing.

    Attributes:
        devices: kinds of device; empty: any.
        dtypes: of queries, keys and values; empty: any.
        head_dims: channels per head; `None`: any number.
        capability: least CUDA compute capability; only asked on `cuda`.
        flash_built: whether PyTorch has to be built with FlashAttention; only asked on `cuda`.
        function: `module:name` of what it calls; imported when the backend is chosen, not before.
        remedy: how to get the function.
    """

    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    head_dims: range | None = None
    capability: tuple[int, int] | None = None
    flash_built: bool = False
    function: str | None = None
    remedy: str = ""

    def missing(self) -> str | None:
        """What is not installed here; `None`: nothing."""
        return _imported(self)[1]

    def load(self) -> Callable[..., Any]:
        """The function it calls.

        Raises:
            OptionError: it is not installed.
        """
        function, missing = _imported(self)
        if function is None:
            raise OptionError(missing or "this backend calls no function of a library")
        return function

    def why_not(self, case: Case) -> str | None:
        """What tells against this case; `None`: nothing."""
        if self.devices and case.device not in self.devices:
            return f"it runs on {' or '.join(self.devices)}"
        if self.dtypes and case.dtype not in self.dtypes:
            return f"it takes {' or '.join(map(_name, self.dtypes))}"
        if (dims := self.head_dims) is not None and case.head_dim not in dims:
            return f"it takes {dims[0]} to {dims[-1]} channels per head, a multiple of {dims.step}"
        if case.device == "cuda" and self.capability and (case.capability or (0, 0)) < self.capability:
            return f"it requires an NVIDIA GPU of compute capability {_dotted(self.capability)} or higher"
        if case.device == "cuda" and self.flash_built and not case.flash_built:
            return "it requires FlashAttention, but this PyTorch was built without it: install another build"
        return self.missing()

    def check(self, name: str, parts: Sequence[Part]) -> None:
        """Checks that the backend `name` can attend.

        Raises:
            OptionError: it cannot, or gradients are asked for.
        """
        case = Case.of(parts[0].q)
        reason = self.why_not(case)
        tensors = (x for part in parts for x in (part.q, part.k, part.v))
        if reason is None and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            reason = "it has no gradients, which these queries, keys or values require"
        if reason is not None:
            raise OptionError(
                f"backend {name!r} cannot attend in {case}: {reason}. Pass backend='sdpa', which runs "
                "anywhere, or 'auto'"
            )


@functools.lru_cache(maxsize=64)
def _imported(requirements: Requirements) -> tuple[Callable[..., Any] | None, str | None]:
    """The function that is required, or what is missing."""
    if requirements.function is None:
        return None, None
    module, _, name = requirements.function.partition(":")
    try:
        return getattr(importlib.import_module(module), name), None
    except (ImportError, AttributeError) as error:
        return None, f"it calls {module}.{name}, which is not here ({error}): {requirements.remedy}"


@functools.lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@functools.cache
def _flash_built() -> bool:
    """Whether this PyTorch brings FlashAttention; a build without it says so only when called."""
    return bool(torch.backends.cuda.is_flash_attention_available())


def is_flash_2() -> bool:
    """Whether PyTorch's own FlashAttention-2 attends; others may be activated in its place.

    Rows after the end of a sequence may hold anything, as in buffers that are not full yet: FlashAttention-2
    clears them. FlashAttention-3 and 4 multiply them by zero, and a `NaN` stays one:
    https://github.com/Dao-AILab/flash-attention/issues/2374
    """
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return active in (None, "FA2")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
