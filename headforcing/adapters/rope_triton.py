"""The rotation of `headforcing.adapters.rope_fused` as one Triton kernel; imported only where Triton is."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
"""Patches that one program rotates, of one frame, head and sample."""


@triton.jit(do_not_specialize=["frames", "patches", "heads"])  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    x,
    out,
    times,
    spaces,
    frames,
    patches,
    heads,
    x_sample,
    x_frame,
    x_patch,
    x_head,
    out_sample,
    out_frame,
    out_patch,
    out_head,
    rows: tl.constexpr,
    time: tl.constexpr,  # pairs of channels that move with time; the others stay in their place
    pairs: tl.constexpr,
    padded: tl.constexpr,  # the next power of two
):
    head = tl.program_id(0) % heads
    frame = tl.program_id(0) // heads % frames
    sample = (tl.program_id(0) // heads // frames).to(tl.int64)
    patch = tl.program_id(1) * rows + tl.arange(0, rows)[:, None]
    pair = tl.arange(0, padded)[None, :]
    moves, there = pair < time, (patch < patches) & (pair < pairs)
    times += frame * time + pair
    cos_time = tl.load(times, moves, 0)
    sin_time = tl.load(times + frames * time, moves, 0)
    spaces += patch * (pairs - time) + pair - time
    cos_space = tl.load(spaces, there & ~moves, 0)
    sin_space = tl.load(spaces + patches * (pairs - time), there & ~moves, 0)
    cos, sin = tl.where(moves, cos_time, cos_space), tl.where(moves, sin_time, sin_space)
    channel = tl.arange(0, 2 * padded)[None, :]
    inside = (patch < patches) & (channel < 2 * pairs)
    x += sample * x_sample + frame.to(tl.int64) * x_frame + head.to(tl.int64) * x_head
    wide = tl.load(x + patch * x_patch + channel, inside, 0).to(cos.dtype)
    a, b = tl.split(tl.reshape(wide, [rows, padded, 2]))
    both = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [rows, 2 * padded])
    out += sample * out_sample + frame.to(tl.int64) * out_frame + head.to(tl.int64) * out_head
    if out.dtype.element_ty != tl.float64:
        both = both.to(tl.float32)  # first: PyTorch rounds doubles to half precision in two steps
    tl.store(out + patch * out_patch + channel, both.to(out.dtype.element_ty), inside)


def rotate(x: Tensor, times: Tensor, spaces: Tensor) -> Tensor:
    """See `headforcing.adapters.rope_fused.at_once`; channels of `x` lie side by side."""
    out = torch.empty_like(x)
    rotate_into(out, x, times, spaces)
    return out


def rotate_into(out: Tensor, x: Tensor, times: Tensor, spaces: Tensor) -> None:
    """Writes the rotated `x` to `out`, which may have another dtype and lie otherwise."""
    samples, frames, patches, heads, channels = x.shape
    pairs = channels // 2
    sizes: dict[str, Any] = {
        "rows": ROWS,
        "time": pairs - spaces.shape[2],
        "pairs": pairs,
        "padded": triton.next_power_of_2(pairs),
    }
    grid = samples * frames * heads, triton.cdiv(patches, ROWS)
    strides = (*x.stride()[:4], *out.stride()[:4])
    # Fused, a product and a sum are rounded once: not what the base model does.
    _rotate[grid](x, out, times, spaces, frames, patches, heads, *strides, **sizes, enable_fp_fusion=False)
