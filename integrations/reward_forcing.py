"""Reward Forcing (arXiv:2512.04678): the signature of Self Forcing, and evicted frames change the sink.

Facts (4317f5a): cache dicts and counters are those of Self Forcing. Keys are cached before RoPE and rotated
to the slots of the cache. The first pass of a chunk for which there is no room evicts frames and mixes them
into the sink, keys and values alike; the passes after it do not. Without a sink, queries sit at negative
indices of the RoPE table, and a full cache raises. A sink that is longer than the first chunk is attended to
before it is written.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from headforcing.adapters.wan import CALL
from headforcing.adapters.wan_counted import CountingWan
from headforcing.errors import UnsupportedModelError
from headforcing.roles import EmaSink, Full, HeadRole


class RewardForcing(CountingWan):
    """`CausalWanSelfAttention` with two end indices and a moving average for a sink."""

    name = "reward_forcing"
    forward = (*CALL, "cache_start")
    markers = ("compression_alpha", "incremental_update")
    verified = {"ab05e543edc2c3ab": "compact"}  # 4317f5a

    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        """See `Adapter.own_memory`.

        Raises:
            UnsupportedModelError: the model has no sink, or one that is longer than a chunk.
        """
        chunk = self.chunk(model)  # 1 until the pipeline is built
        for name, module in self.attentions(model):
            sink: Any = module.sink_size
            if sink == 0 or 1 < chunk < sink:
                raise UnsupportedModelError(
                    f"{name} has a sink_size of {sink}, and chunks of {chunk} frames: expected at least 1, "
                    "at most a chunk. Else its code puts queries at negative positions, or attends to slots "
                    "before they are written: set sink_size to 3, as released, or pass other roles"
                )
        return super().own_memory(model)

    def own_role(self, module: Any) -> HeadRole:
        """What one attention remembers."""
        if module.local_attn_size == -1:
            return Full()
        return EmaSink(module.local_attn_size, module.sink_size, float(module.compression_alpha))


ADAPTER = RewardForcing()
