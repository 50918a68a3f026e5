"""LongLive 2 (NVlabs): the attention interface of Wan 2.2 5B, for videos of several shots.

Facts: attention returns the end indices, and the model writes the cache after all layers ran. A shot may be
shifted in time by `temporal_offset`. After the first chunk of a shot the pipeline pins it, so that its first
frames stay in addition to those of the video; before the clean pass of that chunk it may empty the cache.
With `use_relative_rope`, positions are the slots of the cache. The prompt is projected in every pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.adapters.base import Memo
from headforcing.adapters.host_cache import alive, untouched, version_of
from headforcing.adapters.wan import CALL
from headforcing.adapters.wan_counted import INDICES, DeferringWan
from headforcing.errors import ExternalEditError, UnsupportedModelError
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.types import AttentionCall, Edit, Pin, Truncation

SHOTS = ("t_scale", "use_relative_rope", "method", "original_seq_len", "temporal_offset")
PINS, NO_PIN = ("pinned_start", "pinned_len"), (-1, 0)


class LongLive2(DeferringWan):
    """`CausalWanSelfAttention` with arguments for shots.

    Args:
        context_noise: see `WanAdapter`.
        use_relative_rope: as in the configuration of the pipeline, which tells the model only while it runs;
            needed for the model's own memory alone.
    """

    name = "longlive2"
    forward = (*CALL, "cache_start", *SHOTS)
    numbers = ("num_heads", "head_dim", "local_attn_size", "sink_size", "global_sink_size")
    counters = (*INDICES, *PINS)
    verified = {"e00f79010c6caecc": "absolute"}  # 7860ad9

    def __init__(self, context_noise: float = 0, use_relative_rope: bool = False) -> None:
        super().__init__(context_noise)
        self.use_relative_rope = use_relative_rope

    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        """See `Adapter.own_memory`; with relative RoPE, positions are the slots of the cache."""
        return [
            dataclasses.replace(role, positions="compact")
            if self.use_relative_rope and isinstance(role, SlidingWindow)
            else role
            for role in super().own_memory(model)
        ]

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`; with the shift of its frames in time.

        Raises:
            UnsupportedModelError: the cache is quantised, or positions are computed in another way.
        """
        call = super().read(module, args, kwargs)
        if call is None:
            return None
        given = call.arguments
        offset = given["temporal_offset"]
        if not isinstance(given["kv_cache"]["k"], Tensor):
            raise UnsupportedModelError(
                "the model's KV cache is quantised, ours is not: switch quantisation of its KV cache off"
            )
        if not isinstance(offset, int | float) or given["method"] != "linear":
            raise UnsupportedModelError(
                f"temporal_offset is a {type(offset).__name__} and method {given['method']!r}: expected one "
                "number for all samples, and 'linear'"
            )
        return dataclasses.replace(call, shift=0.0 if given["use_relative_rope"] else float(offset))

    def rotate(self, x: Tensor, call: AttentionCall, positions: Sequence[float], patch: int = 1) -> Tensor:
        """See `Adapter.rotate`."""
        scale = call.arguments["t_scale"]
        scaled = positions if scale == 1 else [position * float(scale) for position in positions]
        return super().rotate(x, call, scaled, patch)

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """See `Adapter.begins_video`; emptying the cache except for the sink begins no video.

        Raises:
            ExternalEditError: the cache was edited in another way.
        """
        ends, start = self.changed_ends(call, memo), int(call.arguments["current_start"])
        if ends is not None and 0 < ends[0] == start < memo["ends"][0] and ends[1] < memo["ends"][1]:
            memo["ends"], memo["left"] = ends, ends[1]
        if super().begins_video(call, memo):
            memo.pop("pins", None)
            return True
        if self.wrote(call, memo):
            raise ExternalEditError(
                "the keys in the cache were written to between two calls: expected the pipeline to change "
                "its indices and pins only"
            )
        return False

    def edits(self, module: nn.Module, call: AttentionCall, memo: Memo) -> Sequence[Edit]:
        """An emptied cache, or a pinned shot.

        Raises:
            ExternalEditError: a shot is not pinned any more.
        """
        found: list[Edit] = []
        frame, cache = call.tokens_per_frame, call.arguments["kv_cache"]
        if "left" in memo:
            found.append(Truncation(memo["left"] // frame))
        versions, before = memo.get("pins", ((), None))
        if versions and all(untouched(cache[name], seen) for name, seen in zip(PINS, versions, strict=True)):
            return found
        memo["now"] = start, length = tuple(int(cache[name]) for name in PINS)
        if before in (None, memo["now"]):
            return found
        if length > 0:
            first = memo["ends"][0] - memo["ends"][1] + start
            always = int(module.global_sink_size)  # type: ignore[arg-type]
            found.append(Pin(first // frame, length // frame, always))
        elif not found:
            raise ExternalEditError(
                f"{' and '.join(PINS)} became {memo['now']}, expected {before} or a later shot"
            )
        return found

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        """Projects, and moves a pin as the base model does when it rolls its cache."""
        cache, (_, before) = call.arguments["kv_cache"], memo.get("pins", ((), NO_PIN))
        start, length = memo.pop("now", before)
        memo.pop("left", None)  # kept until here, because the store may refuse and the call be repeated
        evicted, sink = self.counted(module, call, memo)[2], int(module.global_sink_size)  # type: ignore[arg-type]
        if evicted and length and start > sink * call.tokens_per_frame:
            start -= evicted
            memo["pins"] = (
                (),
                (start, length),
            )  # first: else an interrupt after it would look like another pin
            cache[PINS[0]].sub_(evicted)
        memo["pins"] = ([version_of(cache[name]) for name in PINS], (start, length))
        return super().output(module, out, call, memo)

    def cross_attentions(self, model: nn.Module) -> list[nn.Module]:
        """None caches the projected prompt."""
        return []

    def forget(self, memo: Memo) -> None:
        """Clears what the memo says about indices, keys and pins."""
        super().forget(memo)
        for name in ("pins", "now", "left"):
            memo.pop(name, None)

    def give_back(self, anchor: object, memo: Memo) -> None:
        """Resets the pins as well: no shot is pinned in an empty cache."""
        super().give_back(anchor, memo)
        for (known, _), nothing in zip(memo.get("pins", ((), NO_PIN))[0], NO_PIN, strict=False):
            for pin in alive([known]):
                with torch.inference_mode(pin.is_inference()):
                    pin.fill_(nothing)


ADAPTER = LongLive2()
