"""Self Forcing (arXiv:2506.08009) and the repositories that share its attention interface.

Causal Forcing and minimal-self-forcing use the same interface. Facts: cache dicts have `global_end_index` and
`local_end_index`; denoising passes overwrite the same slots; keys are cached after RoPE at absolute frames; a
full cache is rolled left, keeping its sink; for a new video the index tensors of the same dicts are replaced
by zeros.
"""

from __future__ import annotations

from headforcing.adapters.wan import CALL
from headforcing.adapters.wan_counted import CountingWan


class SelfForcing(CountingWan):
    """`CausalWanSelfAttention` with two end indices."""

    name = "self_forcing"
    forward = (*CALL, "cache_start")
    absent = ("incremental_update", "fuse_projections")  # of Reward Forcing and Krea
    verified = {
        "db1f10ed3fefd97c": "absolute",  # Self Forcing 33593df, Causal Forcing 1fc7bbc
        "6f8f8706229e5ea9": "absolute",  # One-Forcing ca345b3
        "da5906774b20a787": "compact",  # Infinite Forcing b8feaf5, whose positions are the slots of its cache
    }


ADAPTER = SelfForcing()
