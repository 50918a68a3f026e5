"""Backends: one function each, `attend(parts, num_heads)`, for heads that see different lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from headforcing.lookup import named_module
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


def find_backend(name: str) -> Attend:
    """The `attend` of the module `headforcing.backends.<name>`.

    Raises:
        OptionError: there is no such module; the message lists the folder.
    """
    return cast(Attend, named_module(__name__, name).attend)
