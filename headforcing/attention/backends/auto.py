"""The backend that fits the tensors, by stated conditions.

`varlen` where it can attend, else `sdpa`, for all attention of that device, dtype and head dim. Also `sdpa`
where it is cuDNN's, which we assume to be faster than the FlashAttention-2 that `varlen` runs, unless
FlashAttention-3 or later is active. Requirements are checked beforehand: a kernel that fails is an error,
never a reason to take another one. All of this is by reasoning, not by measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor
from torch.backends import cudnn

from headforcing.attention.backends import Attend, Part, find_backend, requirements_of
from headforcing.attention.requirements import Case, Requirements, is_flash_2

CUDNN, CUDNN_VERSION = ((9, 0), (10, 0), (10, 3)), 91501
"""Compute capabilities on which PyTorch prefers cuDNN's attention, and from which version of cuDNN on."""
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
    slower = case.capability in CUDNN and (cudnn.version() or 0) >= CUDNN_VERSION and is_flash_2()
    return "sdpa" if slower or requirements_of("varlen").why_not(case) is not None else "varlen"


@functools.lru_cache(maxsize=64)
def _chosen(case: Case, flash_2: bool) -> Attend:
    return find_backend(choose(case))
