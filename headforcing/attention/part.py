"""What a backend is given: heads that attend to the same keys, with their queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

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
