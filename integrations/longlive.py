"""LongLive 1 (arXiv:2509.22622): the attention skeleton of Self Forcing with writes after the last layer.

Its facts: attention returns its output with the end indices and what is to be written, and the model counts
and writes once all layers ran; a video begins with new cache dicts; a new prompt runs the last frames again
in one call. Both of its models have this interface, the one that keeps keys after RoPE and the one that keeps
them before: our roles say where frames sit. MemRoPE has it, too.
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
    """The `CausalWanSelfAttention` skeleton that is told whether the sink runs again."""

    name = "longlive"
    forward = (*CALL, "cache_start", "sink_recache_after_switch")

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """The call, which may bring frames of the past again."""
        call = super().read(module, args, kwargs)
        if call is None:
            return None
        return dataclasses.replace(
            call, repeats=True, emptied=bool(call.arguments["sink_recache_after_switch"])
        )

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """See `Adapter.begins_video`.

        Raises:
            ExternalEditError: the cache was emptied in the middle of a video, and the host does not say so.
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
        """Where first frames run again as well: the cache was emptied, its sink is the first of them."""
        if not call.emptied:
            return ()
        return Truncation(), Pin(call.start, int(module.sink_size))  # type: ignore[arg-type]


ADAPTER = LongLive()
