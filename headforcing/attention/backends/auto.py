"""The backend that fits the tensors, by stated conditions.

The first of `PREFERRED` that can attend is taken, for all attention of that device, dtype and head dim.
Requirements are checked beforehand: a kernel that fails is an error, never a reason to take another one. The
order is by reasoning, not by measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from headforcing.attention.backends import Attend, Part, find_backend, requirements_of
from headforcing.attention.requirements import Case, Requirements

PREFERRED = ("varlen", "sdpa")
"""One launch per layer where a kernel for it comes with PyTorch, else one per role."""
REQUIREMENTS = Requirements()


def attend(parts: Sequence[Part], num_heads: int) -> Tensor:
    """Attends with the chosen backend; see `headforcing.attention.backends.Attend`."""
    return _chosen(Case.of(parts[0].q))(parts, num_heads)


def choose(case: Case) -> str:
    """The name of the backend that attends in this case.

    Example:
        >>> import torch
        >>> choose(Case("cpu", torch.float32, head_dim=64))
        'sdpa'
    """
    return next(name for name in PREFERRED if requirements_of(name).why_not(case) is None)


@functools.lru_cache(maxsize=64)
def _chosen(case: Case) -> Attend:
    return find_backend(choose(case))
