"""Infinity-RoPE (arXiv:2511.20649): the attention skeleton of Self Forcing that keeps keys before RoPE.

Its facts: frames sit at their place in the cache, the first at 0; where the prompt changes, the pipeline
moves the first frame and the last two together in its own buffers, and shortens `local_end_index` alone; at
a hard cut, `scene_cut` in the cache dicts makes one chunk sit at 45 and after.

What a head remembers is up to its role here, so the flush itself changes nothing: `handle.switch_prompt` says
what a new prompt means. A hard cut is refused, because its jump of positions is not taken over.
"""

from __future__ import annotations

from headforcing.adapters.base import Memo
from headforcing.adapters.wan import CALL
from headforcing.adapters.wan_counted import CountingWan
from headforcing.errors import ExternalEditError
from headforcing.types import AttentionCall


class InfinityRope(CountingWan):
    """The `CausalWanSelfAttention` skeleton that may be told the timestep."""

    name = "infinity_rope"
    forward = (*CALL, "cache_start", "timestep")

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """See `Adapter.begins_video`; a flush shortens the local index and begins no video.

        Raises:
            ExternalEditError: the host asks for a hard cut, or edits its cache in another way.
        """
        cache = call.arguments["kv_cache"]
        if cache.get("scene_cut"):
            raise ExternalEditError(
                "the prompt asks for a hard cut (#), which moves one chunk to positions that the model was "
                "not trained on: leave the # out and call handle.switch_prompt('cut') between the two chunks"
            )
        ends = self.changed_ends(call, memo)
        if ends is not None and ends[0] == memo["ends"][0] and 0 < ends[1] < memo["ends"][1]:
            memo["ends"] = ends
        return super().begins_video(call, memo)

    def release(self, call: AttentionCall, memo: Memo) -> int:
        """Frees nothing: the flush writes into the host's buffers."""
        return 0


ADAPTER = InfinityRope()
