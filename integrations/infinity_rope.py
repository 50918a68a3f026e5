"""Infinity-RoPE (arXiv:2511.20649): the attention interface of Self Forcing, with keys cached before RoPE.

Facts: positions are the slots of the cache, the first is 0. Where the prompt changes, the pipeline moves the
first frame and the last two together in its buffers (KV flush), and reduces `local_end_index` alone. At a
hard cut, `scene_cut` in the cache dicts puts one chunk at position 45 and after.

With head forcing, roles decide what is stored, so the flush itself changes nothing; `handle.switch_prompt`
decides what happens at a new prompt. A hard cut is refused, because its jump of positions is not implemented.
"""

from __future__ import annotations

from headforcing.adapters.base import Memo
from headforcing.adapters.wan import CALL
from headforcing.adapters.wan_counted import CountingWan
from headforcing.errors import ExternalEditError
from headforcing.types import AttentionCall


class InfinityRope(CountingWan):
    """`CausalWanSelfAttention` with an optional timestep."""

    name = "infinity_rope"
    forward = (*CALL, "cache_start", "timestep")
    positions = "compact"
    verified = {"dde5da48e80a7f2b": "compact"}  # 63d7b84

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """See `Adapter.begins_video`; a flush reduces the local index and begins no video.

        Raises:
            ExternalEditError: a hard cut is requested, or the cache was edited in another way.
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
        """Frees nothing: the flush writes into the base model's buffers."""
        return 0


ADAPTER = InfinityRope()
