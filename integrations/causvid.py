"""CausVid (arXiv:2412.07772): the attention skeleton of Wan with a cache that nobody counts.

Its facts: cache dicts hold `k` and `v` for 21 frames and no indices; calls say where they write, from
`current_start` to `current_end` in tokens; every chunk attends from frame 0 on, and frame 21 does not fit;
another rollout begins at frame 0 on the same dicts, which nothing resets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from headforcing.adapters.wan import CALL, WanAdapter
from headforcing.errors import StreamShapeError
from headforcing.types import AttentionCall


class CausVid(WanAdapter):
    """The `CausalWanSelfAttention` skeleton that is told where its tokens end."""

    name = "causvid"
    forward = (*CALL, "current_end")
    numbers = ("num_heads", "head_dim")

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`.

        Raises:
            StreamShapeError: the call does not end where its tokens do.
        """
        call = super().read(module, args, kwargs)
        if call is not None:
            start, end = (int(call.arguments[name]) for name in ("current_start", "current_end"))
            if end - start != call.x.shape[1]:
                raise StreamShapeError(
                    f"the call writes tokens {start} to {end}, but brings {call.x.shape[1]}: expected as many"
                )
        return call


ADAPTER = CausVid()
