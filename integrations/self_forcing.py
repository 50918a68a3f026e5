"""Self Forcing (arXiv:2506.08009) and the repositories that share its attention skeleton.

Causal Forcing and minimal-self-forcing use the same interface. Its facts: cache dicts carry
`global_end_index` and `local_end_index`; denoise passes overwrite the same slots; keys are cached after RoPE
at absolute frames; a full cache is rolled left behind its sink; a new video replaces the index tensors of
the same dicts by zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headforcing.adapter import Memo
from headforcing.errors import ExternalEditError
from headforcing.types import AttentionCall
from headforcing.wan import WanAdapter

INDICES = ("global_end_index", "local_end_index")


class SelfForcing(WanAdapter):
    """The `CausalWanSelfAttention` skeleton with two end indices."""

    name = "self_forcing"
    forward = (
        "x",
        "seq_lens",
        "grid_sizes",
        "freqs",
        "block_mask",
        "kv_cache",
        "current_start",
        "cache_start",
    )

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """See `Adapter.begins_video`; reads the indices only when the host touched them."""
        if "ends" not in memo:
            return False
        indices = [call.arguments["kv_cache"][name] for name in INDICES]
        if all(_untouched(index, mark) for index, mark in zip(indices, memo["marks"], strict=True)):
            return False
        ends = tuple(int(index.item()) for index in indices)
        if ends == (0, 0):
            memo["ends"] = ends
            return True
        if ends == memo["ends"]:
            return False
        raise ExternalEditError(
            f"{' and '.join(INDICES)} of the cache became {ends}, expected {memo['ends']} or zeros: "
            "something outside edits the cache; reset the stream with handle.reset()"
        )

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Tensor:
        """Projects, and moves the end indices as upstream would have."""
        cache, tokens = call.arguments["kv_cache"], out.shape[1]
        end = int(call.arguments["current_start"]) + tokens
        global_end, local_end = memo["ends"] if "ends" in memo and call.start else (0, 0)
        over = tokens + local_end - cache["k"].shape[1]
        evicted = over if module.local_attn_size != -1 and end > global_end and over > 0 else 0
        memo["ends"] = (end, local_end + end - global_end - evicted)
        indices = [cache[name] for name in INDICES]
        for index, value in zip(indices, memo["ends"], strict=True):
            index.fill_(value)
        memo["marks"] = [(index, _version(index)) for index in indices]
        return super().output(module, out, call, memo)  # type: ignore[no-any-return]

    def forget(self, memo: Memo) -> None:
        memo.pop("ends", None)
        memo.pop("marks", None)

    def give_back(self, anchor: object, memo: Memo) -> None:
        """Zeros for the indices, too: a cache nothing was written to."""
        super().give_back(anchor, memo)
        for index, _ in memo.get("marks", ()) if "v" in memo else ():
            with torch.inference_mode(index.is_inference()):
                index.zero_()


def _version(index: Tensor) -> int | None:
    """Counts in-place edits; inference tensors do not count, so theirs must be read."""
    return None if index.is_inference() else index._version


def _untouched(index: Tensor, mark: tuple[Tensor, int | None]) -> bool:
    tensor, version = mark
    return index is tensor and version is not None and _version(index) == version


ADAPTER = SelfForcing()
