"""Krea Realtime 14B: the signature of Self Forcing, and a cache that is filled again before every chunk.

Facts (acf4b7b): before every chunk, the last frames are computed again in one call with a `block_mask` and
the cache together, at the same positions; counters are Python numbers; `fuse_projections` puts a `to_qkv`
beside `q`, `k` and `v`, which are not called any more.
"""

from __future__ import annotations

from torch import nn

MARKERS = ("fused_projections", "fuse_projections", "local_attn_size", "sink_size")


def refuse_lookalike(model: nn.Module) -> str | None:
    """Why an attention with fused projections beside separate ones is not supported."""
    for module in model.modules():
        if all(hasattr(module, part) for part in MARKERS):
            return (
                "its pipeline computes the last frames again before every chunk, at positions that do not "
                "move on, so which frame a call is about cannot be told; and its fused projections are not "
                "those that would be called. Set its own memory with the pipeline's window"
            )
    return None
