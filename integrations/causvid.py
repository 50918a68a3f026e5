"""CausVid (arXiv:2412.07772): the attention interface of Wan, with a cache without counters.

Facts: cache dicts have `k` and `v` for 21 frames and no indices; calls say where they write, from
`current_start` to `current_end` in tokens; every chunk attends from frame 0 on, and frame 21 does not fit;
another rollout begins at frame 0 on the same dicts without resetting them. A fork with a sink and the same
`forward` (StreamDiffusionV2 in daydream Scope) rolls its cache.
"""

from __future__ import annotations

from headforcing.adapters.wan import CALL, WanAdapter


class CausVid(WanAdapter):
    """`CausalWanSelfAttention` with an argument for the end of its tokens."""

    name = "causvid"
    forward, end = (*CALL, "current_end"), "current_end"
    numbers, absent = ("num_heads", "head_dim"), ("sink_size",)
    verified = {"91ec675c977a1c99": "absolute"}  # ca21150


ADAPTER = CausVid()
