"""One call of one layer, its chunk written: what every role attends with, and what observers are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headforcing.attention.backends import Part
from headforcing.attention.layer_state import LayerState
from headforcing.attention.observation import Observation
from headforcing.attention.rerun import query_positions
from headforcing.attention.stream import Stream
from headforcing.roles import HeadRole
from headforcing.roles.base import sees_compressed
from headforcing.stores.buffers import joined
from headforcing.types import AttentionCall, Chunk, Encode, Heads, KVView


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer, its chunk written.

    Attributes:
        layer: the layer.
        stream: its memory on the timeline of the call.
        call: the call.
        chunk: keys and values that were written; where frames are recomputed, maybe of the last ones only.
        q: queries of the call before RoPE, `[B, F, P, H, D]`.
    """

    layer: LayerState
    stream: Stream
    call: AttentionCall
    chunk: Chunk
    q: Tensor

    def read(self) -> tuple[list[Part], list[KVView]]:
        """What every role attends with, one part per query frame where a role reads so."""
        found = [one for role, heads in self.layer.heads.items() for one in self._read(role, heads)]
        return [part for part, _ in found], [view for _, view in found]

    def observation(
        self, parts: Sequence[Part], views: Sequence[KVView], out: Tensor, edited: bool
    ) -> Observation:
        """What observers are shown, once the heads have attended."""
        return Observation(
            layer=self.layer.layer,
            call=self.call,
            timeline=self.stream,
            chunk=self.chunk,
            q=self.q,
            parts=parts,
            frames=[view.frames for view in views],
            positions=[view.positions for view in views],
            out=out,
            encode=self._encoder(),
            sizes=[self._tokens_per_frame(view) for view in views],
            edited=edited,
        )

    def _read(self, role: HeadRole, heads: Heads) -> list[tuple[Part, KVView]]:
        """What the heads of a role attend with: the whole chunk, or each query frame by itself."""
        (count, tokens), encode = self.q.shape[1:3], self._encoder(heads)
        step = 1 if "query" in role.depends_on else count
        groups = [slice(first, first + step) for first in range(0, count, step)]
        sides = [self._keys(role, frames, encode) for frames in groups]
        placed = [query_positions(view.positions, count, len(self.chunk.frames)) for _, _, view in sides]
        positions = [at for frames, every in zip(groups, placed, strict=True) for at in every[frames]]
        q = encode(heads.take(self.q), positions).to(sides[0][1].dtype)
        found = []
        for frames, (k, v, view) in zip(groups, sides, strict=True):
            rows = slice(frames.start * tokens, frames.stop * tokens)
            found.append((Part(heads, q[:, frames].flatten(1, 2), k, v, rows), view))
        return found

    def _keys(self, role: HeadRole, frames: slice, encode: Encode) -> tuple[Tensor, Tensor, KVView]:
        """Keys and values `[B, M, Hr, D]` that some query frames attend to, and the whole frames of them."""
        adapter, store, call = self.layer.options.adapter, self.stream.store, self.call
        query = (max(call.start + frames.start, self.chunk.start),) if "query" in role.depends_on else ()
        view = store.view(role, call.phase, encode, *query)
        k, v = (adapter.tokens(x, view.frames, call) for x in (view.k, view.v))
        compressed = None
        if sees_compressed(role, call.phase):
            compressed = store.view_compressed(role, encode, *query)
        if compressed is not None:
            k, v = (joined(first, rest) for first, rest in zip(compressed, (k, v), strict=True))
        return k, v, view

    def _encoder(self, heads: Heads | None = None) -> Encode:
        """Rotates keys or queries of some heads, or of all."""
        adapter = self.layer.options.adapter
        call = self.call if heads is None else self.call.of_heads(heads)

        def encode(x: Tensor, positions: Sequence[float], *patch: int) -> Tensor:
            return adapter.rotate(x, call, positions, *patch)

        return encode

    def _tokens_per_frame(self, view: KVView) -> tuple[int, ...]:
        """How many tokens of every frame of a view are attended to; not all, where grids of frames differ."""
        frames, patches = view.v.shape[1:3]
        marks = torch.arange(1, frames + 1).view(1, -1, 1, 1, 1).expand(1, frames, patches, 1, 1)
        attended = self.layer.options.adapter.tokens(marks, view.frames, self.call).flatten()
        return tuple(torch.bincount(attended, minlength=frames + 1)[1:].tolist())
