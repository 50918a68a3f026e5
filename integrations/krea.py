"""Krea Realtime 14B: the attention of Self Forcing, and a cache that is filled again before every chunk.

Facts (krea-ai/realtime-video acf4b7b): before every chunk but the first, the pipeline empties its cache and
computes the last frames again from their latents, the first of them encoded anew. This is one call with a
`block_mask` and the cache: chunks attend to themselves and to those before, from position 0 on, whatever
`current_start` says. Then the chunk is denoised behind these frames, so that in a long video every chunk has
the same `current_start`. There is no other clean pass. Counters are Python numbers. `fuse_projections` puts a
`to_qkv` beside `q`, `k` and `v`, which are not called any more. Where the frames are no whole chunks, those
of the last one also attend to keys of zeros, which fill the call up to a multiple of 128 tokens.

So every chunk is a video of its own for our roles: the frames that are computed again, chunk by chunk, and
behind them the chunk that is denoised.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from headforcing.adapters.base import Adapter, Memo, parameter_names
from headforcing.adapters.wan import CALL
from headforcing.adapters.wan_counted import CountingWan
from headforcing.errors import StreamShapeError, UnsupportedModelError
from headforcing.types import AttentionCall

BIAS = "kv_cache_attention_bias"


class Krea(CountingWan):
    """`CausalWanSelfAttention` with projections that may be fused, and a mask where the cache is filled."""

    name = "krea"
    forward = (*CALL, "cache_start")
    markers = ("fused_projections", "fuse_projections")
    verified = {"75f19b12fdf7df67": "absolute"}  # acf4b7b
    traced_call = Adapter.traced_call  # a call may be many chunks, and numbers cannot be written in a graph

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`; frames that are computed again begin at 0."""
        call = super().read(module, args, kwargs)
        if call is None or call.arguments["block_mask"] is None:
            return call
        return dataclasses.replace(call, start=0, arguments={**call.arguments, self.start: 0})

    def split(self, module: nn.Module, call: AttentionCall) -> Sequence[AttentionCall]:
        """See `Adapter.split`; the chunks of frames that are computed again, read from their mask."""
        if (mask := call.arguments["block_mask"]) is None:
            return (call,)
        stops, zeros = _chunks(mask, call.grid[0], call.tokens_per_frame)
        if len(stops) == 1:
            return (dataclasses.replace(call, arguments={**call.arguments, "zeros": zeros}),)
        projected, calls = self.project(module, call), []
        for first, stop in itertools.pairwise((0, *stops)):
            tokens = slice(first * call.tokens_per_frame, stop * call.tokens_per_frame)
            told = {
                **call.arguments,
                self.start: tokens.start,
                "projected": [x[:, first:stop] for x in projected],
                "zeros": zeros if stop == stops[-1] else 0,
            }
            grid = (stop - first, *call.grid[1:])
            calls.append(AttentionCall(call.x[:, tokens], first, grid, call.anchor, told))
        return calls

    def join(self, module: nn.Module, outs: Sequence[Any], call: AttentionCall) -> Any:
        """See `Adapter.join`."""
        return self.project_out(module, torch.cat(list(outs), dim=1))

    def project(self, module: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter.project`; by the layer that the model calls, once for all chunks of a call."""
        if "projected" in call.arguments:
            q, k, v = call.arguments["projected"]
            return q, k, v
        if not module.fused_projections:
            return super().project(module, call)
        fused: Any = module.to_qkv
        return self.split_heads(module, fused(call.x).chunk(3, dim=-1), call)

    def tokens(self, x: Tensor, frames: Sequence[int | None], call: AttentionCall) -> Tensor:
        """See `Adapter.tokens`; behind them the keys of zeros that the base model attends to."""
        attended, zeros = super().tokens(x, frames, call), call.arguments.get("zeros", 0)
        return pad(attended, (0, 0, 0, 0, 0, zeros)) if zeros else attended

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Tensor:
        """Projects, unless `join` does, and moves the end indices."""
        if "projected" not in call.arguments:
            return super().output(module, out, call, memo)
        self.count(module, call, memo)
        return out

    def cross_attentions(self, model: nn.Module) -> list[nn.Module]:
        """A prompt switch is neither needed nor possible.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "Krea's pipeline computes its past again for every chunk, so there is nothing to keep or drop at "
            "a new prompt: give it to the pipeline, no switch_prompt is needed"
        )


def refuse(model: nn.Module) -> str | None:
    """Why Krea's attention as in daydream Scope (68b0f95) is not supported: it weakens the past by a bias."""
    for module in model.modules():
        if all(hasattr(module, marker) for marker in Krea.markers) and BIAS in parameter_names(module):
            return (
                f"its attention weakens all past frames but the first by {BIAS}, which no role can say. Use "
                "the pipeline of krea-ai/realtime-video, or write an adapter that serves a bias of 1 alone"
            )
    return None


Chunks = tuple[tuple[int, ...], int]
"""Frames before which the chunks of a mask end, and keys of zeros that the last chunk attends to."""
_READ: MutableMapping[Any, dict[tuple[int, int], Chunks]] = WeakKeyDictionary()
"""What masks allow: all layers receive the same, and reading it waits for the device."""


def _chunks(mask: Any, frames: int, tokens: int) -> Chunks:
    """The chunks of a mask over so many frames, each of so many tokens.

    Raises:
        StreamShapeError: chunks attend to something else than themselves and all chunks before.
    """
    if not hasattr(mask, "mask_mod") or mask.shape[-1] < frames * tokens:
        raise StreamShapeError(
            f"the cache is filled under the mask {mask!r:.60}: expected a BlockMask of at least the "
            f"{frames * tokens} tokens of the call"
        )
    read = _READ.setdefault(mask, {})
    if (frames, tokens) not in read:
        read[frames, tokens] = _read(mask, frames, tokens)
    return read[frames, tokens]


def _read(mask: Any, frames: int, tokens: int) -> Chunks:
    """The same, from what the first and the last token of every frame attend to."""
    every = torch.arange(mask.shape[-1], device=mask.kv_num_blocks.device)
    edges = every[: frames * tokens].view(frames, tokens)[:, [0, -1]].flatten()
    seen = mask.mask_mod(0, 0, edges[:, None], torch.cat([edges, every[frames * tokens :]])).cpu()
    stops = sorted({int(count) // 2 for count in seen[:, : len(edges)].sum(1)})
    zeros = int(seen[-1, len(edges) :].sum())
    known = torch.zeros_like(seen)
    for first, stop in itertools.pairwise((0, *stops)):
        known[2 * first : 2 * stop, : 2 * stop + (zeros if stop == frames else 0)] = True
    if (wrong := (seen != known).any(1).nonzero().flatten().tolist()) or stops[-1] != frames:
        frame = wrong[0] // 2 if wrong else frames - 1
        attended = sorted({int(place) // 2 for place in seen[2 * frame, : len(edges)].nonzero()})
        raise StreamShapeError(
            f"the last {frames} frames are computed again under a mask in which frame {frame} attends to "
            f"frames {attended}: expected whole chunks that attend to themselves and to all before them, as "
            "with local_attn_size=-1; roles say what is attended to"
        )
    return tuple(stops), zeros


ADAPTER = Krea()
