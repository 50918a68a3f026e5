"""The backend that fits the tensors, by stated conditions.

`varlen` where it can attend, else `sdpa`, for all attention of that device, dtype and head dim. On compute
capability 9.0 and later `sdpa`, too, unless FlashAttention-3 or later is active: PyTorch's attention is
cuDNN's there, which we assume to be faster than the FlashAttention-2 that `varlen` runs by default.
Requirements are checked beforehand: a kernel that fails is an error, never a reason to take another one. All
of this is by reasoning, not by measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from headforcing.attention.backends import Attend, Part, find_backend, requirements_of
from headforcing.attention.requirements import Case, Requirements, is_flash_2

CUDNN = (9, 0)
"""Least compute capability where PyTorch attends with cuDNN."""
REQUIREMENTS = Requirements()


def attend(parts: Sequence[Part], num_heads: int) -> Tensor:
    """Attends with the chosen backend; see `headforcing.attention.backends.Attend`."""
    return _chosen(Case.of(parts[0].q), is_flash_2())(parts, num_heads)


def choose(case: Case) -> str:
    """The name of the backend that attends in this case.

    Example:
        >>> import torch
        >>> choose(Case("cpu", torch.float32, head_dim=64))
        'sdpa'
    """
    slower = (case.capability or (0, 0)) >= CUDNN and is_flash_2()
    return "sdpa" if slower or requirements_of("varlen").why_not(case) is not None else "varlen"


@functools.lru_cache(maxsize=64)
def _chosen(case: Case, flash_2: bool) -> Attend:
    return find_backend(choose(case))
