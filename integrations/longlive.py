"""LongLive 1 (arXiv:2509.22622): as Self Forcing, but the cache is written after the last layer.

Facts: attention returns its output, the end indices, and the keys and values to write; the model updates
counters and cache after all layers ran. A video begins with new cache dicts. At a new prompt the last frames
are recomputed in one call (KV recache). Both of its models have this interface, the one that caches keys
after RoPE and the one that caches them before; our roles decide positions. MemRoPE has it too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from headforcing.adapters.base import Memo
from headforcing.adapters.wan import CALL
from headforcing.adapters.wan_counted import DeferringWan
from headforcing.errors import ExternalEditError
from headforcing.types import AttentionCall, Edit, Pin, Truncation


class LongLive(DeferringWan):
    """`CausalWanSelfAttention` with an argument that says whether the sink is recomputed."""

    name = "longlive"
    forward = (*CALL, "cache_start", "sink_recache_after_switch")
    verified = {
        "ffe4260414c78fb7": "absolute",  # branch v1.0, e52d9ef
        "f4691171469b2349": "compact",  # the same, causal_model_infinity
    }

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`; the call may recompute past frames."""
        call = super().read(module, args, kwargs)
        if call is None:
            return None
        return dataclasses.replace(
            call, repeats=True, emptied=bool(call.arguments["sink_recache_after_switch"])
        )

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """See `Adapter.begins_video`.

        Raises:
            ExternalEditError: the cache was emptied in the middle of a video without this argument.
        """
        if super().begins_video(call, memo):
            return True
        if self.wrote(call, memo) and not call.emptied:
            raise ExternalEditError(
                "the cache was emptied for a new prompt, and its first frames stay empty (global_sink=False "
                "in a pipeline that does not pass sink_recache_after_switch): set global_sink=True, or put "
                "handle.switch_prompt(...) in place of the pipeline's _recache_after_switch"
            )
        return False

    def edits(self, module: nn.Module, call: AttentionCall, memo: Memo) -> Sequence[Edit]:
        """If the sink is recomputed: the cache was emptied, and the first recomputed frames are the sink."""
        if not call.emptied:
            return ()
        return Truncation(), Pin(call.start, int(module.sink_size))  # type: ignore[arg-type]


ADAPTER = LongLive()
