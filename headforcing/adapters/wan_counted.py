"""Wan-like base models that count in their caches how far these are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headforcing.adapters.base import Memo
from headforcing.adapters.host_cache import alive, entry, untouched, version, write_count
from headforcing.adapters.wan import WanAdapter
from headforcing.errors import ExternalEditError
from headforcing.types import AttentionCall, TracedCall

INDICES = ("global_end_index", "local_end_index")


class CountingWan(WanAdapter):
    """A base model whose cache dicts also hold how far they are written, as one-element tensors or numbers.

    `global_end_index` counts tokens of the video, `local_end_index` those in the cache, where a full one is
    rolled to the left after its sink; a new video replaces both by zeros.

    Attributes:
        counters: what of a cache dict an adapter writes to.
    """

    counters: ClassVar[tuple[str, ...]] = INDICES

    def traced_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> TracedCall | None:
        """See `Adapter.traced_call`; the counters are written."""
        traced = super().traced_call(module, args, kwargs)
        if traced is None:
            return None
        counters = [entry(traced.arguments[self.cache], name) for name in self.counters]
        if not all(isinstance(counter, Tensor) for counter in counters):
            return None  # numbers cannot be written inside a graph
        return dataclasses.replace(traced, writes=tuple(counters))

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """See `Adapter.begins_video`; reads the indices only when the base model touched them."""
        ends = self.changed_ends(call, memo)
        if ends is None or ends == memo["ends"]:
            return False
        if ends == (0, 0):
            memo["ends"] = ends
            return True
        raise ExternalEditError(
            f"{' and '.join(INDICES)} of the cache became {ends}, expected {memo['ends']} or zeros: "
            "something outside edits the cache; reset the stream with handle.reset()"
        )

    def changed_ends(self, call: AttentionCall, memo: Memo) -> tuple[int, ...] | None:
        """Both indices, where the base model touched them since the last call; reads the device only then."""
        if "ends" not in memo or "writing" in memo:
            return None
        indices = [entry(call.arguments[self.cache], name) for name in INDICES]
        if all(untouched(index, left) for index, left in zip(indices, memo["versions"], strict=True)):
            return None
        return tuple(int(index) for index in indices)

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Tensor:
        """Projects, and moves the end indices as upstream would have."""
        self.count(module, call, memo)
        return super().output(module, out, call, memo)  # type: ignore[no-any-return]

    def count(self, module: nn.Module, call: AttentionCall, memo: Memo) -> None:
        """Moves the end indices."""
        ends = self.counted(module, call, memo)[:2]
        memo["writing"] = True  # an interrupt leaves this, and indices that only we changed
        memo["ends"] = ends
        cache = call.arguments[self.cache]
        memo["versions"] = [write_count(cache, *new) for new in zip(INDICES, ends, strict=True)]
        del memo["writing"]

    def counted(self, module: nn.Module, call: AttentionCall, memo: Memo) -> tuple[int, int, int]:
        """Both indices after a call, and the tokens that the base model evicts in it."""
        cache, tokens = call.arguments[self.cache], self.written(module, call)
        end = call.start * call.tokens_per_frame + tokens
        global_end, local_end = memo["ends"] if "ends" in memo and call.start else (0, 0)
        over = tokens + local_end - entry(cache, "k").shape[1]
        evicted = over if self.evicts(module) and end > global_end and over > 0 else 0
        return end, local_end + end - global_end - evicted, evicted

    def written(self, module: nn.Module, call: AttentionCall) -> int:
        """Tokens of a call that the base model writes into its cache: all of them."""
        return call.x.shape[1]

    def evicts(self, module: nn.Module) -> bool:
        """Whether the base model rolls a full cache."""
        return self.rolls or bool(module.local_attn_size != -1)

    def forget(self, memo: Memo) -> None:
        """Drops what was noted about the indices."""
        for name in ("ends", "versions", "writing"):
            memo.pop(name, None)

    def give_back(self, anchor: object, memo: Memo) -> None:
        """Zeros for the indices, too: a cache nothing was written to.

        Numbers stay as they are: the memo cannot hold a dict weakly, and must not keep it alive. They do no
        harm, because the pipeline sets them to zero before it begins a video in the same dicts.
        """
        super().give_back(anchor, memo)
        tensors = [seen[0] for seen in memo.get("versions", ()) if isinstance(seen, tuple)]
        for index in alive(tensors if "freed" in memo else ()):
            with torch.inference_mode(index.is_inference()):
                index.zero_()


class DeferringWan(CountingWan):
    """A base model whose attention also returns where the cache ends and what is to be written.

    The model counts and writes once all layers ran.
    """

    def traced_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> TracedCall | None:
        """See `Adapter.traced_call`; two ends are returned."""
        traced = super().traced_call(module, args, kwargs)
        return None if traced is None else dataclasses.replace(traced, numbers=2)

    def answer(self, y: Tensor, numbers: Tensor, call: TracedCall) -> Any:
        """What `output` returns, the ends as tensors."""
        return y, (numbers[0], numbers[1], None)

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        """Projects, and says where the cache ends; the model has nothing to write, it only counts."""
        y = super().output(module, out, call, memo)
        memo["versions"] = [
            (index, edits if edits is None else edits + 1) for index, edits in memo["versions"]
        ]
        memo["keys"] = version(entry(call.arguments[self.cache], "k"))
        return y, (*memo["ends"], None)

    def wrote(self, call: AttentionCall, memo: Memo) -> bool:
        """Whether something wrote to the base model's keys since the last call."""
        keys = version(entry(call.arguments[self.cache], "k"))
        return bool(memo.get("keys", keys) != keys)

    def forget(self, memo: Memo) -> None:
        """Drops what was noted about the indices and keys."""
        super().forget(memo)
        memo.pop("keys", None)
