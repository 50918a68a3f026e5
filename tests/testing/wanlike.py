"""A Wan-like stand-in that answers every question of `WanAdapter` in one way or another."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.adapters.wan_counted import CountingWan
from headforcing.demo.model.attention import RMSNorm
from headforcing.roles import HeadRole, SlidingWindow
from tests.hosts.fastvideo import tables_of
from tests.hosts.fastvideo import turned as really_turned
from tests.hosts.matrix_game2 import turned as own_turned
from tests.hosts.standin import (
    DIM,
    GRID,
    HEAD_DIM,
    HEADS,
    TOKENS,
    CountingHost,
    StandInAttention,
    StandInBlock,
    StandInModel,
    turned,
)

WINDOW, SINK = 9, 1


@dataclass(frozen=True)
class Answers:
    """What a base model answers; the defaults are Wan's.

    Attributes:
        fused: one layer for queries, keys and values.
        per_head: norms of heads.
        shared: heads per head of keys and values.
        halves: RoPE pairs channels that lie half a head apart.
        table: `"complex"`, `"real"` with the frames of the call, `"attribute"` of the attention, or `"own"`,
            which the attention makes.
        numbers: the grid comes as three numbers.
        frames: the call begins at a frame, not at a token.
        plain: counters are numbers.
        wrapped: the cache is an object.
        compact: positions are the slots of the cache.
    """

    fused: bool = False
    per_head: bool = False
    shared: int = 1
    halves: bool = False
    table: str = "complex"
    numbers: bool = False
    frames: bool = False
    plain: bool = False
    wrapped: bool = False
    compact: bool = False


class WanLikeAttention(StandInAttention):
    """Attention of a window of nine frames with a sink."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.answers, kv = answers, DIM // answers.shared
        self.local_attn_size, self.sink_size, self.num_kv_heads = WINDOW, SINK, HEADS // answers.shared
        self.k, self.v = nn.Linear(DIM, kv), nn.Linear(DIM, kv)
        if answers.fused:
            del self.q, self.k, self.v
            self.to_qkv = nn.Linear(DIM, DIM + 2 * kv)
        if answers.per_head:
            self.norm_q, self.norm_k = RMSNorm(HEAD_DIM, 1e-6), RMSNorm(HEAD_DIM, 1e-6)
        else:
            self.norm_k = RMSNorm(kv, 1e-6)

    def forward(
        self, x: Tensor, rope: Any, grid: Any, mask: Any = None, cache: Any = None, begin: int = 0
    ) -> Tensor:
        """Attends from `x [B, L, C]` to the cache, which it writes; to itself where there is none."""
        told, start = self.answers, begin if self.answers.frames else begin // TOKENS
        sizes = (DIM, DIM // told.shared, DIM // told.shared)
        parts = self.to_qkv(x).split(sizes, -1) if told.fused else (self.q(x), self.k(x), self.v(x))
        q, k = self._normed(self.norm_q, parts[0]), self._normed(self.norm_k, parts[1])
        v = parts[2].unflatten(-1, (-1, HEAD_DIM))
        k, v = (part.repeat_interleave(told.shared, 2) for part in (k, v))
        if not told.compact:
            q, k = self._turned(q, rope, start), self._turned(k, rope, start)
        if cache is not None:
            k, v = self._kept(cache, k, v, start)
        if told.compact:
            q, k = self._turned(q, rope, (k.shape[1] - q.shape[1]) // TOKENS), self._turned(k, rope, 0)
        return self.attended(q, k, v)

    def _normed(self, norm: nn.Module, part: Tensor) -> Tensor:
        split = part.unflatten(-1, (-1, HEAD_DIM))
        out: Tensor = norm(split) if self.answers.per_head else norm(part).view_as(split)
        return out

    def _turned(self, x: Tensor, rope: Any, first: int) -> Tensor:
        """`x [B, L, H, D]` rotated as frames from `first` on."""
        halves, frames = self.answers.halves, x.shape[1] // TOKENS
        if halves:
            x = torch.stack(x.chunk(2, -1), -1).flatten(-2)
        if self.answers.table == "real":
            x = really_turned(x, tables_of(first, frames))
        elif self.answers.table == "own":
            x = own_turned(x, first)
        else:
            x = turned(x, self.table if self.answers.table == "attribute" else rope, first * TOKENS)
        return torch.cat([x[..., 0::2], x[..., 1::2]], -1) if halves else x

    def _kept(self, cache: Any, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Rolls and writes the cache; returns what it holds."""
        held = vars(cache) if self.answers.wrapped else cache
        rows, local_end = self.rolled(held, k, v, start * TOKENS, SINK)
        for name, new in rows.items():
            held[name][:, : new.shape[1]] = new
        for name, value in (
            ("global_end_index", start * TOKENS + k.shape[1]),
            ("local_end_index", local_end),
        ):
            if self.answers.plain:
                held[name] = value
            else:
                held[name].fill_(value)
        return rows["k"], rows["v"]


class WanLikeBlock(StandInBlock):
    """Calls its attention as that wants to be called."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        layout: tuple[Any, ...],
        context: Tensor,
        crossattn_cache: Any,
        kv_cache: Any = None,
        current_start: int = 0,
    ) -> tuple[Tensor, Any]:
        """One block on `[B, L, C]`."""
        attention: Any = self.self_attn
        told, (_, grids, freqs, _) = attention.answers, layout
        first, frames = current_start // TOKENS, x.shape[1] // TOKENS
        rope = tables_of(first, frames) if told.table == "real" else freqs
        if told.table == "real" and told.halves:
            rope = tuple(torch.cat([table[:, ::2]] * 2, dim=1) for table in rope)
        attention.table = freqs
        grid = (frames, *GRID) if told.numbers else grids
        x = x + attention(self.norm(x), rope, grid, None, kv_cache, first if told.frames else current_start)
        x = x + self.cross_attn(self.norm(x), context, crossattn_cache)
        return x + self.ffn(self.norm(x)), None


class WanLikeHost(CountingHost):
    """A stand-in that gives some answers, with a sink."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        positions = "compact" if answers.compact else "absolute"
        self.memory: HeadRole = SlidingWindow(WINDOW, SINK, positions=positions)
        if answers.plain or answers.wrapped:
            self.unconcerned = frozenset({"compiled_is_one_operator"})

    def model(self, dtype: torch.dtype = torch.float32) -> StandInModel:
        """See `Host.model`."""
        model = StandInModel(lambda: WanLikeAttention(self.answers), WanLikeBlock)
        return model.eval().requires_grad_(False).to(dtype)

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """See `Host.caches`."""
        caches = super().caches(model, batch)
        for number, cache in enumerate(caches["kv"]):
            if self.answers.plain:
                cache.update(global_end_index=0, local_end_index=0)
            if self.answers.wrapped:
                caches["kv"][number] = SimpleNamespace(**cache)
        return caches

    def cached(self, model: nn.Module, caches: Any, layer: int) -> Any:
        """Unknown, so that the checks of whole videos are asked."""
        return None


class WanLike(CountingWan):
    """The adapter that gives the same answers, and nothing else."""

    name = "wan_like"
    forward = ("x", "rope", "grid", "mask", "cache", "begin")
    numbers = ("num_heads", "head_dim", "num_kv_heads", "local_attn_size", "sink_size")
    kv_heads, grid, start, cache, mask = "num_kv_heads", "grid", "begin", "cache", "mask"

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.projections = ("to_qkv",) if answers.fused else ("q", "k", "v")
        self.norm_per_head, self.halves = answers.per_head, answers.halves
        self.start_in = "frames" if answers.frames else "tokens"
        self.rope = {"attribute": "table", "own": None}.get(answers.table, "rope")
        self.positions = "compact" if answers.compact else "absolute"
