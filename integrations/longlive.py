"""LongLive 1 (arXiv:2509.22622): the attention skeleton of Self Forcing with writes after the last layer.

Its facts: attention returns its output with the end indices and what is to be written, and the model counts
and writes once all layers ran; a video begins with new cache dicts; a new prompt runs the last frames again
in one call. Both of its models have this interface, the one that keeps keys after RoPE and the one that keeps
them before: our roles say where frames sit. MemRoPE has it, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from headforcing.adapter import Memo
from headforcing.errors import ExternalEditError
from headforcing.types import AttentionCall
from headforcing.wan import CALL, CountingWan


class LongLive(CountingWan):
    """The `CausalWanSelfAttention` skeleton that is told whether the sink runs again."""

    name = "longlive"
    forward = (*CALL, "cache_start", "sink_recache_after_switch")

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """The call, which may bring frames of the past again."""
        call = super().read(module, args, kwargs)
        return None if call is None else dataclasses.replace(call, repeats=True)

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """See `Adapter.begins_video`.

        Raises:
            ExternalEditError: the cache was emptied in the middle of a video.
        """
        if super().begins_video(call, memo):
            return True
        emptied = memo.get("keys", _version(call)) != _version(call)
        if emptied or call.arguments["sink_recache_after_switch"]:
            raise ExternalEditError(
                "the cache was emptied for a new prompt, first frames included (global_sink=False), which is "
                "not served: set global_sink=True, or put handle.switch_prompt(...) in place of the "
                "pipeline's _recache_after_switch"
            )
        return False

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        """Projects, and says where the cache ends; the model has nothing to write, it only counts."""
        y = super().output(module, out, call, memo)
        memo["marks"] = [(index, mark if mark is None else mark + 1) for index, mark in memo["marks"]]
        memo["keys"] = _version(call)
        return y, (*memo["ends"], None)

    def forget(self, memo: Memo) -> None:
        super().forget(memo)
        memo.pop("keys", None)


def _version(call: AttentionCall) -> int | None:
    """Counts in-place edits of the host's keys; those of inference tensors do not show."""
    keys: Tensor = call.arguments["kv_cache"]["k"]
    return None if keys.is_inference() else keys._version


ADAPTER = LongLive()
