"""flash-attn's attention for sequences of different lengths: one launch per layer, keys read in place.

Heads are folded into its batch, as for `varlen`. It has no `seqused_k`, so the rows between two segments
are a sequence of their own that no query asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headforcing.attention.backends import Part
from headforcing.attention.needs import HALF, Needs
from headforcing.attention.ragged import KEPT, Plan, attend_by

NEEDS = Needs(
    devices=("cuda",),
    dtypes=HALF,
    head_dims=range(8, 257, 8),
    capability=(8, 0),
    function="flash_attn:flash_attn_varlen_func",
    argument="cu_seqlens_k",
    remedy="pip install 'headforcing[flash-attn]', which needs CUDA",
)


def attend(parts: Sequence[Part], num_heads: int) -> Tensor:
    """Attends with one call of `flash_attn_varlen_func`; see `headforcing.attention.backends.Attend`.

    Raises:
        OptionError: these tensors are none for the kernel, or flash-attn is not installed.
    """
    NEEDS.check("flash", parts)
    return attend_with(NEEDS.load(), parts, num_heads)


def attend_with(varlen_func: Callable[..., Tensor], parts: Sequence[Part], num_heads: int) -> Tensor:
    """The same with another function of the signature of `flash_attn_varlen_func`."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        asked, begins = _starts(plan, q.device)
        return varlen_func(q, k, v, asked, begins, max(plan.queries), max(plan.used))

    return attend_by(kernel, parts, num_heads)


@functools.lru_cache(maxsize=KEPT)
def _starts(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where sequences begin in queries and keys, `[N + 1]` each; those between segments ask for nothing."""
    asked, begins = [0], [0]
    for end, row, after in zip(plan.ends, plan.asked[1:], plan.begins[1:], strict=True):
        asked.append(row)
        begins.append(end)
        if end < after:
            asked.append(row)
            begins.append(after)
    with torch.inference_mode(False):
        first, second = (torch.tensor(row, dtype=torch.int32, device=device) for row in (asked, begins))
    return first, second
