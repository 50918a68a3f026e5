"""PyTorch's scaled dot-product attention, one call per role: any device, and the oracle of the others.

A role that reads per query frame takes one call as well, query frames as a batch, where their keys and values
lie at equal distances: once a video is long, with one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headforcing.attention.backends import Part
from headforcing.attention.part import as_one, num_queries
from headforcing.attention.requirements import Requirements

REQUIREMENTS = Requirements()


def attend(parts: Sequence[Part], num_heads: int) -> Tensor:
    """Attends per role and puts the heads back in place; see `headforcing.attention.backends.Attend`."""
    if len(parts) == 1:
        return _attend(parts[0].q, parts[0].k, parts[0].v).contiguous()
    q = parts[0].q
    shape = (q.shape[0], num_queries(parts), num_heads, q.shape[3])
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    for some in _alike(parts):
        if (one := as_one(some)) is not None:
            rows = out[0, some[0].rows.start : some[-1].rows.stop].unflatten(0, (len(some), -1))
            some[0].heads.put(rows, _attend(*one))
            continue
        for part in some:
            part.heads.put(out[:, part.rows], _attend(part.q, part.k, part.v))
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, Hr, L or M, D]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _alike(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts of the same heads and sizes with neighbouring queries: of a role that reads per query frame."""
    found: list[list[Part]] = []
    for part in parts:
        last = found[-1][-1] if found else part
        together = part.heads is last.heads and part.k.shape == last.k.shape
        if found and together and part.rows.start == last.rows.stop:
            found[-1].append(part)
        else:
            found.append([part])
    return found
