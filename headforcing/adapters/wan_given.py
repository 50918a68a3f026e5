"""Wan-like base models whose attention receives projected queries, keys and values, and projects nothing.

The block projects and normalises, and applies the output projection. Attention may put other tensors for `k`
and `v` into the cache dict in every call, but keeps the two counter tensors, so the first of these is the
anchor of the timeline. With the policy `relativistic` the cache holds keys before RoPE, and positions are
its slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from headforcing.adapters import rope
from headforcing.adapters.host_cache import entry
from headforcing.adapters.wan_counted import INDICES, CountingWan
from headforcing.errors import StreamShapeError
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.types import AttentionCall, Grid, TracedCall

GIVEN = ("q", "k", "v")
_grids: MutableMapping[Tensor, tuple[int, int, Grid]] = WeakIdKeyDictionary()
"""Tokens per frame, first frame and grid of each RoPE table, so that the device is read once per table."""


class GivenWan(CountingWan):
    """Attention that receives queries, keys and values `[B, L, H, D]`.

    Attributes:
        frame_tokens: argument with the tokens per frame; `None`: they are read from the tables.
    """

    projections, norms, out, parts = (), (), None, ("attn",)
    rope: ClassVar[str | None] = "freqs_cis"
    grid: ClassVar[str | None] = None
    neighbour = "attn2"
    root, timestep = ("condition_embedder", "blocks"), ("timestep", 2)
    counters = INDICES[1:]  # the first one is the anchor
    frame_tokens: ClassVar[str | None] = None

    def own_role(self, module: nn.Module) -> HeadRole:
        """See `WanAdapter.own_role`; keys before RoPE are at the slots of the cache."""
        role = super().own_role(module)
        rolls = isinstance(role, SlidingWindow) and keeps_raw(module)
        return dataclasses.replace(role, positions="compact") if rolls else role

    def hidden(self, given: Mapping[str, Any]) -> Tensor:
        """The queries; keys or values, if only these need gradients."""
        parts = [given[name] for name in GIVEN]
        found: Tensor = next((part for part in parts if part.requires_grad), parts[0])
        return found.flatten(2)

    def grid_of(self, module: nn.Module, given: Mapping[str, Any], tokens: int) -> tuple[int, int, int]:
        """See `WanAdapter.grid_of`; where no grid is given, it is read from the tables."""
        if self.grid is not None:
            return super().grid_of(module, given, tokens)
        (cos, sin), pairs = given[str(self.rope)], given[GIVEN[0]].shape[-1] // 2
        per_frame = int(given[self.frame_tokens]) if self.frame_tokens else _per_frame(cos, pairs)
        if tokens % per_frame or int(given[self.start]) % per_frame:
            raise StreamShapeError(
                f"{self.start} {given[self.start]} and the {tokens} tokens of the call are not multiples of "
                f"{self.frame_tokens or 'the tokens per frame,'} {per_frame}: expected whole frames, counted "
                "in tokens"
            )
        first = 0 if keeps_raw(module) else int(given[self.start]) // per_frame
        return tokens // per_frame, *_grid((cos, sin), pairs, per_frame, first)

    def anchor(self, cache: Any) -> object:
        """The first counter.

        Raises:
            StreamShapeError: it is no tensor.
        """
        anchor = entry(cache, INDICES[0])
        if not isinstance(anchor, Tensor):
            raise StreamShapeError(
                f"{INDICES[0]} of the cache is {anchor!r}: expected a tensor of one element, as the "
                "pipelines make it, because our KV cache lives as long as this tensor"
            )
        return anchor

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
        return q, (k.to(entry(call.arguments[self.cache], "k").dtype) if keeps_raw(module) else k), v


def keeps_raw(module: nn.Module) -> bool:
    """Whether the cache holds keys before RoPE."""
    return getattr(module, "rope_cache_policy", None) == "relativistic"


def _per_frame(cos: Tensor, pairs: int) -> int:
    """Tokens of a frame, whose temporal columns are alike."""
    if (known := _grids.get(cos)) is not None:
        return known[0]
    table = rope.per_pair(cos, pairs)
    return [*rope.begins(table[:, : rope.temporal_columns(table)]), len(cos)][1]


def _grid(tables: rope.Tables, pairs: int, tokens: int, first: int) -> Grid:
    """Height and width of a frame, read from the tables that begin at frame `first`."""
    known = _grids.get(tables[0])
    if known is not None and known[:2] == (tokens, first):
        return known[2]
    cos, sin = (rope.per_pair(table, pairs) for table in tables)
    time, places = rope.temporal_columns(cos), tuple(range(first, first + len(cos) // tokens))
    width = int((sin[:tokens, time] == 0).sum())  # in the first row of patches the angle for height is 0
    times = rope.temporal_tables(cos.device, places, time, cos.dtype)
    compared = [(found[::tokens, :time], own) for found, own in zip((cos, sin), times, strict=True)]
    alike = all(a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in compared)
    if not width or tokens % width or not alike:
        raise StreamShapeError(
            f"the RoPE tables {tuple(cos.shape)} are not those of frames from {first} on, of {tokens} tokens "
            f"each, with theta {rope.THETA}: pass start_frame=current_start // {tokens} to the transformer"
        )
    _grids[tables[0]] = (tokens, first, (tokens // width, width))
    return _grids[tables[0]][2]
