"""PyTorch's attention for sequences of different lengths: one launch per layer, keys read in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from headforcing.attention.backends import Part
from headforcing.attention.ragged import attend_ragged
from headforcing.attention.requirements import HALF, Requirements, is_flash_2

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
