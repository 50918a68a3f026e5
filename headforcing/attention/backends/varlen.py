"""PyTorch's attention for sequences of different lengths: one launch per layer, keys read in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.attention
from torch import Tensor

from headforcing.attention.backends import Part
from headforcing.attention.ragged import attend_ragged
from headforcing.attention.requirements import HALF, Requirements

REQUIREMENTS = Requirements(
    devices=("cuda",),
    dtypes=HALF,
    head_dims=range(8, 257, 8),
    capability=(8, 0),
    flash_built=True,
    function="torch.nn.attention.varlen:varlen_attn",
    remedy="install a newer PyTorch",
)


def attend(parts: Sequence[Part], num_heads: int) -> Tensor:
    """Attends with one call of `varlen_attn`; see `headforcing.attention.backends.Attend`.

    Raises:
        OptionError: the kernel does not take these tensors, or PyTorch lacks it.
    """
    REQUIREMENTS.check("varlen", parts)
    return attend_ragged(REQUIREMENTS.load(), parts, num_heads, gaps=is_flash_2())


def is_flash_2() -> bool:
    """Whether PyTorch's own FlashAttention-2 attends; others may be activated in its place.

    Rows after the end of a sequence may hold anything, as in buffers that are not full yet: FlashAttention-2
    clears them. FlashAttention-3 and 4 multiply them by zero, and a `NaN` stays one:
    https://github.com/Dao-AILab/flash-attention/issues/2374
    """
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return active in (None, "FA2")
