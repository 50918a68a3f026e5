"""What a backend is given: heads that attend to the same keys, with their queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from headforcing.stores.buffers import side_by_side
from headforcing.types import Heads


@dataclass(frozen=True)
class Part:
    """The heads of one role, and what they attend to.

    Attributes:
        heads: which heads of the layer these are.
        q: rotated queries, `[B, L, Hr, D]`.
        k: rotated keys, `[B, M, Hr, D]`; `M` differs per role.
        v: values, `[B, M, Hr, D]`.
        rows: which queries of the chunk these are; all of them, unless a role reads per query frame.
    """

    heads: Heads
    q: Tensor
    k: Tensor
    v: Tensor
    rows: slice = field(default_factory=lambda: slice(None))


Attend = Callable[[Sequence[Part], int], Tensor]
"""Softmax attention of all parts, put together: `[B, L, H, D]`, contiguous, for `L` queries."""


def num_queries(parts: Sequence[Part]) -> int:
    """Queries of the chunk, `L`; a part may hold those of one frame only."""
    return max(part.rows.stop or part.q.shape[1] for part in parts)


def as_one(parts: Sequence[Part]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries, keys and values of several parts as those of a batch; `None`: they do not lie so."""
    if len(parts) == 1:
        return None
    q, k, v = (side_by_side([getattr(part, name) for part in parts]) for name in "qkv")
    return None if q is None or k is None or v is None else (q, k, v)
