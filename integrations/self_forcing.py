"""Self Forcing (arXiv:2506.08009) and the repositories that share its attention skeleton.

Causal Forcing and minimal-self-forcing use the same interface. Its facts: cache dicts carry
`global_end_index` and `local_end_index`; denoise passes overwrite the same slots; keys are cached after RoPE
at absolute frames; a full cache is rolled left behind its sink; a new video replaces the index tensors of
the same dicts by zeros.
"""

from __future__ import annotations

from headforcing.adapters.wan import CALL
from headforcing.adapters.wan_counted import CountingWan


class SelfForcing(CountingWan):
    """The `CausalWanSelfAttention` skeleton with two end indices."""

    name = "self_forcing"
    forward = (*CALL, "cache_start")


ADAPTER = SelfForcing()
