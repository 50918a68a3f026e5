"""PyTorch's scaled dot-product attention, one call per role: any device, and the oracle of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headforcing.attention.backends import Part
from headforcing.attention.part import num_queries
from headforcing.attention.requirements import Requirements

REQUIREMENTS = Requirements()


def attend(parts: Sequence[Part], num_heads: int) -> Tensor:
    """Attends per role and puts the heads back in place; see `headforcing.attention.backends.Attend`."""
    if len(parts) == 1:
        return _attend(parts[0]).contiguous()
    q = parts[0].q
    shape = (q.shape[0], num_queries(parts), num_heads, q.shape[3])
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    for part in parts:
        part.heads.put(out[:, part.rows], _attend(part))
    return out


def _attend(part: Part) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (part.q, part.k, part.v))  # [B, Hr, L or M, D]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
