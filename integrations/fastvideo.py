"""FastVideo's causal Wan: attention that receives queries, keys and values, and rotates with real tables.

Facts: the block projects and normalises, and applies the output projection. Cosines and sines cover the
frames of the call, or, if the cache holds keys before RoPE, the slots of the cache from 0 on. Attention may
put other tensors for `k` and `v` into the cache dict in every call, but keeps the two counter tensors, so the
first of these is the anchor of the timeline. A video begins with new dicts, or with zeros in the counters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from headforcing.adapters import rope
from headforcing.adapters.base import bind
from headforcing.adapters.wan_counted import INDICES, CountingWan
from headforcing.errors import StreamShapeError
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.types import AttentionCall, Grid, TracedCall

GIVEN = ("q", "k", "v")
_grids: MutableMapping[Tensor, tuple[int, int, Grid]] = WeakIdKeyDictionary()
"""Tokens per frame, first frame and grid of each RoPE table, so that the device is read once per table."""


class FastVideo(CountingWan):
    """`CausalWanSelfAttention` that receives projected queries, keys and values."""

    name = "fastvideo"
    forward = (*GIVEN, "freqs_cis", "block_mask", "kv_cache", "current_start", "cache_start", "frame_seqlen")
    submodules, neighbour = ("attn",), "attn2"
    counters = INDICES[1:]  # the first one is the anchor
    root, timestep = ("condition_embedder", "blocks"), ("timestep", 2)
    verified = {"d00afb4996557fee": "absolute"}  # 2f3d40740, with either policy

    def own_role(self, module: nn.Module) -> HeadRole:
        """See `WanAdapter.own_role`; keys before RoPE are at the slots of the cache."""
        role = super().own_role(module)
        rolls = isinstance(role, SlidingWindow) and _keeps_raw(module)
        return dataclasses.replace(role, positions="compact") if rolls else role

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`; `x` are the queries, or keys or values if only these need gradients."""
        arguments = bind(module, args, kwargs)
        cache, tokens = arguments["kv_cache"], int(arguments["frame_seqlen"])
        if cache is None:
            return None
        given = [arguments[name] for name in GIVEN]
        (start, rest), (frames, more) = (
            divmod(int(size), tokens) for size in (arguments["current_start"], given[0].shape[1])
        )
        if rest or more:
            raise StreamShapeError(
                f"current_start {arguments['current_start']} and the {given[0].shape[1]} tokens of the call "
                f"are not multiples of frame_seqlen {tokens}: expected whole frames, counted in tokens"
            )
        anchor = cache[INDICES[0]]
        if not isinstance(anchor, Tensor):
            raise StreamShapeError(
                f"{INDICES[0]} of the cache is {anchor!r}: expected a tensor of one element, as the "
                "pipelines make it, because our KV cache lives as long as this tensor"
            )
        first = 0 if _keeps_raw(module) else start
        x = next((part for part in given if part.requires_grad), given[0])
        grid = _grid(arguments, tokens, first)
        return AttentionCall(x.flatten(2), start, (frames, *grid), anchor, arguments)

    def traced_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> TracedCall | None:
        """See `Adapter.traced_call`; like `x` of the call, what requires gradients."""
        traced = super().traced_call(module, args, kwargs)
        if traced is None:
            return None
        learnt = [traced.arguments[name] for name in GIVEN if traced.arguments[name].requires_grad]
        return dataclasses.replace(traced, like=learnt[0]) if learnt else traced

    def project(self, module: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """The given tensors; if the cache holds keys before RoPE, keys get its dtype."""
        shape = (call.grid[0], call.tokens_per_frame)
        q, k, v = (call.arguments[name].unflatten(1, shape) for name in GIVEN)
        return q, (k.to(call.arguments["kv_cache"]["k"].dtype) if _keeps_raw(module) else k), v

    def project_out(self, module: nn.Module, out: Tensor) -> Tensor:
        """Returns `out`: the block projects."""
        return out

    def rotate(self, x: Tensor, call: AttentionCall, positions: Sequence[float], patch: int = 1) -> Tensor:
        """See `Adapter.rotate`."""
        grid, tables = call.grid[1:], _tables(call.arguments)
        return rope.rotate_real(x, tables, positions, *grid, patch, call.rotary_cache)


def _keeps_raw(module: nn.Module) -> bool:
    """Whether the cache holds keys before RoPE."""
    return module.rope_cache_policy == "relativistic"


def _tables(arguments: Mapping[str, Any]) -> rope.Tables:
    """Tables with one column per pair of channels; the model's have one or two."""
    pairs = arguments["q"].shape[-1] // 2
    cos, sin = (table[:, :: table.shape[1] // pairs] for table in arguments["freqs_cis"])
    return cos, sin


def _grid(arguments: Mapping[str, Any], tokens: int, first: int) -> Grid:
    """Height and width of a frame, read from the tables that begin at frame `first`."""
    table = arguments["freqs_cis"][0]
    known = _grids.get(table)
    if known is not None and known[:2] == (tokens, first):
        return known[2]
    tables = _tables(arguments)
    time, places = rope.temporal_columns(tables[0]), tuple(range(first, first + len(table) // tokens))
    width = int(
        (tables[1][:tokens, time] == 0).sum()
    )  # in the first row of patches the angle for height is 0
    times = rope.temporal_tables(table.device, places, time, table.dtype)
    pairs = [(found[::tokens, :time], own) for found, own in zip(tables, times, strict=True)]
    alike = all(a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    if not width or tokens % width or not alike:
        raise StreamShapeError(
            f"freqs_cis {tuple(table.shape)} are not the RoPE of frames from {first} on, of {tokens} tokens "
            f"each, with theta {rope.THETA}: pass start_frame=current_start // {tokens} to the transformer"
        )
    _grids[table] = (tokens, first, (tokens // width, width))
    return _grids[table][2]


ADAPTER = FastVideo()
