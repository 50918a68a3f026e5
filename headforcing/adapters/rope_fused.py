"""Rotation of all frames at once, in one kernel: for accelerators, where every small one costs a launch.

`rotated` is the specification. `at_once` runs it compiled where PyTorch brings a compiler for the device:
the device alone decides (and whether gradients are asked for), and where nothing can be compiled, PyTorch
raises; with `TORCH_COMPILE_DISABLE=1` in the environment it is run as it is.
One compiled function serves every number of frames, tokens and heads; another one is compiled for another
dtype, device, head dim or kind of memory layout, of which a video has about six.

On a CPU, compiled or not, the result is that of the complex multiplication of `headforcing.adapters.rope` bit
for bit, in float32 and below; in float64 it was so wherever it was tried, and is within rounding in any case.
On an accelerator the compiler may multiply and add in one step: not measured, no GPU.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import dlpack

_Rotated = Callable[[Tensor, Tensor, Tensor], Tensor]
COMPILED = ("cuda", "xpu")
"""Devices for which a compiler comes with PyTorch."""


def rotated(x: Tensor, times: Tensor, spaces: Tensor) -> Tensor:
    """Rotates pairs of neighbouring channels `(a, b) -> (a cos - b sin, b cos + a sin)`.

    Args:
        x: `[A, F*P, D]` or, with several samples in a row, `[A, B*F*P, D]`.
        times: cosines and sines of every frame, as `packed_times` makes them.
        spaces: those of every patch, `[2, P, S]` with `T + S = D/2`; the columns after those of `times`.

    Returns:
        As `x`, in its dtype; computed in the precision of the cosines and sines.
    """
    patches, columns = spaces.shape[1], x.shape[2] // 2 - spaces.shape[2]
    rows = times.shape[0] // (2 * columns)
    token = torch.arange(x.shape[1], device=x.device) % ((rows - 1) * patches)
    time = times.unflatten(0, (2, rows, columns)).index_select(1, token // patches)
    cos, sin = torch.cat([time, spaces.index_select(1, token % patches)], -1)  # [F*P, D/2]
    cos, sin = torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)
    wide = x.to(cos.dtype)
    partner = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    out: Tensor = (wide * cos + partner * sin).to(x.dtype)
    return out


def packed_times(cos: Tensor, sin: Tensor) -> Tensor:
    """Cosines and sines of frames, `[n, T]` each, as `[2, n + 1, T]`, flat, the last row unused.

    So no size of it is 1 or equal to another one, which a compiler would make use of.
    """
    with torch.inference_mode(False), torch.no_grad():  # one kind of tensor, compiled once
        return torch.cat([cos, cos[-1:], sin, sin[-1:]]).flatten()


def packed_spaces(cos: Tensor, sin: Tensor) -> Tensor:
    """Cosines and sines of patches, `[P, S]` each, as `[2, P, S]`."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.stack([cos, sin])


def at_once(x: Tensor, times: Tensor, spaces: Tensor) -> Tensor:
    """Rotates frames `[B, n, P, Hr, D]`; the result lies as `x` does.

    Args:
        x: queries or keys before RoPE.
        times: cosines and sines of every frame, as `packed_times` makes them.
        spaces: those of every patch, as `packed_spaces` makes them.
    """
    graded = torch.is_grad_enabled()
    plain = x.device.type not in COMPILED or (x.requires_grad and graded)
    plain = plain or torch._dynamo.config.disable  # PyTorch's own name for the variable in the environment
    with torch.inference_mode(False), torch.set_grad_enabled(graded):  # the first alone turns gradients on
        flat, back = _tokens(x)
        if x.device.type == "meta":  # the result alone, as a compiled kernel makes it
            return back(torch.empty_like(flat))
        if plain:
            return back(rotated(flat, times, spaces))
        flat = _without_view(flat)
        torch._dynamo.mark_static(flat, 2)  # channels are those of the model
        torch._dynamo.mark_static(spaces, [0, 2])
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # one kind of call, compiled once
            return back(compiled(x.device, x.dtype, x.shape[4], _kind(flat))(flat, times, spaces))


@functools.cache
def compiled(device: torch.device, dtype: torch.dtype, channels: int, kind: tuple[bool, ...]) -> _Rotated:
    """`rotated`, compiled when it is called first.

    PyTorch counts for every code object how often it had to compile it, and gives up at some number, with an
    error: so every device, dtype, number of channels and kind of layout has its own, and they do not count
    together where PyTorch can tell them apart.
    """
    code = rotated.__code__.replace(co_name=f"rotated_{str(dtype).rpartition('.')[2]}")
    own = types.FunctionType(code, rotated.__globals__)
    knows = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    apart: dict[str, Any] = {"isolate_recompiles": True} if knows else {}
    return cast(_Rotated, torch.compile(own, dynamic=True, fullgraph=True, **apart))


def _kind(flat: Tensor) -> tuple[bool, ...]:
    """How rows `[A, M, D]` lie, as far as it is compiled apart: one head, whole, head by head."""
    return len(flat) == 1, flat.is_contiguous(), flat.stride(0) >= flat.stride(1)


def _tokens(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Frames `[B, n, P, Hr, D]` as `[A, M, D]`, `M` over tokens of frames, and the way back.

    A view for frames of a buffer or of a whole chunk; else a copy.
    """
    batch, frames, patches, heads, _ = x.shape
    if x.stride(3) < x.stride(2):  # token by token
        flat = x.permute(3, 0, 1, 2, 4).flatten(1, 3)
        return flat, lambda y: y.unflatten(1, (batch, frames, patches)).permute(1, 2, 3, 0, 4)
    flat = x.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
    return (
        flat,
        lambda y: y.unflatten(1, (frames, patches)).unflatten(0, (batch, heads)).permute(0, 2, 3, 1, 4),
    )


def _without_view(x: Tensor) -> Tensor:
    """A non-view alias of the same storage: `torch.compile` specialises on the storage offset of a view.

    Handed over as a capsule: a tensor itself refuses DLPack unless its device is the current one.
    """
    own: Tensor = dlpack.from_dlpack(dlpack.to_dlpack(x.detach()))  # type: ignore[attr-defined]
    return own
