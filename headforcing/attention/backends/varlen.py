"""PyTorch's attention for sequences of different lengths: one launch per layer, keys read in place.

Heads are folded into its batch: every head of every sample is a sequence of one head. `seqused_k` is what
lets a sequence be shorter than the room it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.attention
from torch import Tensor

from headforcing.attention.backends import Part
from headforcing.attention.needs import HALF, Needs
from headforcing.attention.ragged import KEPT, Plan, attend_by

NEEDS = Needs(
    devices=("cuda",),
    dtypes=HALF,
    head_dims=range(8, 257, 8),
    capability=(8, 0),
    flash_built=True,
    function="torch.nn.attention.varlen:varlen_attn",
    argument="seqused_k",
    remedy="install a newer PyTorch",
)


def attend(parts: Sequence[Part], num_heads: int) -> Tensor:
    """Attends with one call of `varlen_attn`; see `headforcing.attention.backends.Attend`.

    Raises:
        OptionError: these tensors are none for the kernel, or PyTorch lacks it.
    """
    NEEDS.check("varlen", parts)
    return attend_with(NEEDS.load(), parts, num_heads, gaps=leaves_gaps())


def leaves_gaps() -> bool:
    """Whether keys behind `seqused_k` may hold anything, as in memories that are not full yet.

    FlashAttention-2, PyTorch's own, clears them. FlashAttention-3 and 4, which may be activated in its place,
    multiply them by zero, and a `NaN` stays one: https://github.com/Dao-AILab/flash-attention/issues/2374
    """
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return active in (None, "FA2")


def attend_with(
    varlen_attn: Callable[..., Tensor], parts: Sequence[Part], num_heads: int, *, gaps: bool = True
) -> Tensor:
    """The same with another function of the signature of `varlen_attn`; `gaps` as in `leaves_gaps`."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        asked, begins, used = _starts(plan, q.device)
        longest = (max(plan.queries), max(plan.used))
        return varlen_attn(q, k, v, asked, begins, *longest, seqused_k=used)

    return attend_by(kernel, parts, num_heads, gaps=gaps)


@functools.lru_cache(maxsize=KEPT)
def _starts(plan: Plan, device: torch.device) -> tuple[Tensor, ...]:
    """Where segments begin in queries and keys `[N + 1]`, and their numbers of keys `[N]`."""
    with torch.inference_mode(False):
        numbers = (plan.asked, plan.begins, plan.used)
        return tuple(torch.tensor(row, dtype=torch.int32, device=device) for row in numbers)
