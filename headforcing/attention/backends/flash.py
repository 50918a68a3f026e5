"""flash-attn's attention for sequences of different lengths; otherwise as `varlen`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from headforcing.attention.backends import Part
from headforcing.attention.ragged import attend_ragged
from headforcing.attention.requirements import HALF, Requirements

REQUIREMENTS = Requirements(
    devices=("cuda",),
    dtypes=HALF,
    head_dims=range(8, 257, 8),
    capability=(8, 0),
    function="flash_attn:flash_attn_varlen_func",
    remedy="pip install 'headforcing[flash-attn]', which requires CUDA",
)


def attend(parts: Sequence[Part], num_heads: int) -> Tensor:
    """Attends with one call of `flash_attn_varlen_func`; see `headforcing.attention.backends.Attend`.

    Raises:
        OptionError: the kernel does not take these tensors, or flash-attn is not installed.
    """
    REQUIREMENTS.check("flash", parts)
    return attend_ragged(REQUIREMENTS.load(), parts, num_heads)
