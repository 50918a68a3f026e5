"""LongLive 1 (arXiv:2509.22622): the attention skeleton of Self Forcing with writes after the last layer.

Its facts: attention returns its output with the end indices and what is to be written, and the model counts
and writes once all layers ran; a video begins with new cache dicts; a new prompt runs the last frames again
in one call. Both of its models have this interface, the one that keeps keys after RoPE and the one that keeps
them before: our roles say where frames sit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from headforcing.adapter import Memo
from headforcing.errors import ExternalEditError
from headforcing.types import AttentionCall
from headforcing.wan import CountingWan


class LongLive(CountingWan):
    """The `CausalWanSelfAttention` skeleton that is told whether the sink runs again."""

    name = "longlive"
    forward = (
        "x",
        "seq_lens",
        "grid_sizes",
        "freqs",
        "block_mask",
        "kv_cache",
        "current_start",
        "cache_start",
        "sink_recache_after_switch",
    )

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`.

        Raises:
            ExternalEditError: the sink would run again, too.
        """
        call = super().read(module, args, kwargs)
        if call is None:
            return None
        if call.arguments["sink_recache_after_switch"] and call.start:
            raise ExternalEditError(
                "the cache was emptied for a new prompt, first frames included (global_sink=False), which is "
                "not served: set global_sink=True, or put handle.switch_prompt(...) in place of the "
                "pipeline's _recache_after_switch"
            )
        return dataclasses.replace(call, repeats=True)

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        """Projects, and says where the cache ends; the model has nothing to write, it only counts."""
        y = super().output(module, out, call, memo)
        memo["marks"] = [(index, mark if mark is None else mark + 1) for index, mark in memo["marks"]]
        return y, (*memo["ends"], None)


ADAPTER = LongLive()
