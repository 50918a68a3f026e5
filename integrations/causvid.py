"""CausVid (arXiv:2412.07772): the attention interface of Wan, with a cache without counters.

Facts: cache dicts have `k` and `v` for 21 frames and no indices; calls say where they write, from
`current_start` to `current_end` in tokens; every chunk attends from frame 0 on, and frame 21 does not fit;
another rollout begins at frame 0 on the same dicts without resetting them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from headforcing.adapters.wan import CALL, WanAdapter
from headforcing.errors import StreamShapeError
from headforcing.types import AttentionCall


class CausVid(WanAdapter):
    """`CausalWanSelfAttention` with an argument for the end of its tokens."""

    name = "causvid"
    forward = (*CALL, "current_end")
    numbers = ("num_heads", "head_dim")
    verified = {"91ec675c977a1c99": "absolute"}  # ca21150

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`.

        Raises:
            StreamShapeError: the end of the call does not match its tokens.
        """
        call = super().read(module, args, kwargs)
        if call is not None:
            start, end = (int(call.arguments[name]) for name in ("current_start", "current_end"))
            if end - start != call.x.shape[1]:
                raise StreamShapeError(
                    f"the call writes tokens {start} to {end}, but has {call.x.shape[1]} tokens: expected "
                    f"{end - start}"
                )
        return call


ADAPTER = CausVid()
