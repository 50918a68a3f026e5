"""Rotation of all frames at once, in one kernel: for accelerators, where every small one costs a launch.

`rotated` is the specification. `at_once` runs the kernel of `headforcing.adapters.rope_triton` in its place
where there are Triton and the C compiler that it requires; elsewhere, after one warning, the specification.

Both multiply and add in the steps of the complex multiplication of `headforcing.adapters.rope`: the results
are equal bit for bit in float32 and below, and within rounding in float64. The kernel was run in Triton's
interpreter, not on a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from headforcing.errors import RoleError

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
KERNEL = ("cuda", "xpu")
"""Devices that Triton compiles for."""
SWITCH = "HEADFORCING_TRITON"
"""Environment variable; 0: the kernel is not used, where it cannot be built for another reason."""


def rotated(x: Tensor, times: Tensor, spaces: Tensor) -> Tensor:
    """Rotates pairs of neighbouring channels `(a, b) -> (a cos - b sin, b cos + a sin)`.

    Args:
        x: queries or keys before RoPE, `[B, n, P, Hr, D]`.
        times: cosines and sines of every frame, `[2, n, T]`.
        spaces: those of every patch, `[2, P, S]` with `T + S = D/2`; the columns after those of `times`.

    Returns:
        As `x`, in its dtype; computed in the precision of the cosines and sines.
    """
    frames, patches = x.shape[1:3]
    time = times[:, :, None].expand(-1, -1, patches, -1)
    space = spaces[:, None].expand(-1, frames, -1, -1)
    cos, sin = torch.cat([time, space], -1)[..., None, :]  # [n, P, 1, D/2]
    wide = x.to(cos.dtype)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return torch.empty_like(x).copy_(pairs.flatten(-2))


def packed(cos: Tensor, sin: Tensor) -> Tensor:
    """Cosines and sines of frames or of patches, `[n, columns]` each, as `[2, n, columns]`."""
    return torch.stack([cos, sin])


def at_once(x: Tensor, times: Tensor, spaces: Tensor) -> Tensor:
    """Rotates frames `[B, n, P, Hr, D]`; the result lies as `x` does.

    Args:
        x: queries or keys before RoPE.
        times: cosines and sines of every frame, `[2, n, T]`.
        spaces: those of every patch, `[2, P, S]`.
    """
    if x.is_meta:  # the result alone, as the kernel makes it
        return torch.empty_like(x)
    if times.shape[1:] != (x.shape[1], x.shape[4] // 2 - spaces.shape[2]) or spaces.shape[1] != x.shape[2]:
        raise RoleError(
            f"{tuple(x.shape)} [B, n, P, Hr, D] cannot be rotated by factors {tuple(times.shape)} of frames "
            f"and {tuple(spaces.shape)} of patches: expected [2, n, T] and [2, P, D/2 - T], mend the adapter"
        )
    graded = x.requires_grad and torch.is_grad_enabled()
    rotate = None if graded or x.device.type not in KERNEL or x.stride(-1) != 1 else kernel()
    if rotate is None:
        return rotated(x, times, spaces)
    with torch.get_device_module(x.device).device(x.device):  # Triton launches on the current one
        return rotate(x, times, spaces)


@functools.cache
def kernel() -> Rotate | None:
    """The kernel; `None`, after a warning, where it cannot be built."""
    if (missing := _missing()) is not None:
        warnings.warn(f"RoPE runs as several small kernels, which is slow: {missing}", RuntimeWarning, 2)
        return None
    found: Rotate = importlib.import_module("headforcing.adapters.rope_triton").rotate
    return found


def _missing() -> str | None:
    """What the kernel requires and is not here."""
    if os.environ.get(SWITCH) == "0":
        return f"the environment variable {SWITCH} is 0"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: install the one that goes with this PyTorch"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton finds no C compiler: install gcc, or name one in the environment variable CC"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton requires Python's headers: install python3-dev"
    return None
