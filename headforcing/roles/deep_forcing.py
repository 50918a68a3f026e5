"""The role of Deep Forcing (arXiv:2512.05081): a deep sink, tokens that queries attend to, last frames.

From the paper, and from the copy of its code in Relax Forcing. When the window is full, two frames' worth of
single tokens is selected from all that lies between the first ten and the last four frames: those with the
largest sum of query times key over the queries of the last four frames, all heads together. Selected tokens
compete again whenever the window is full.

Our choices: queries are those of committed frames, not of the noisy chunk, so that noisy passes leave no
trace; selected tokens share one position right after the first frames, as the paper names none; no token is
dropped for having been selected seven times, which only the code does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headforcing.errors import RoleError, WindowError
from headforcing.roles.base import HeadRole, ends
from headforcing.roles.compressed import CompressedHistory, Past, Tokens, wide_dtype
from headforcing.types import Encode, FrameTable


@dataclass(frozen=True)
class Participating(HeadRole):
    """First frames, tokens that recent queries attend to, last frames; `window` in all.

    Attributes:
        window: frames attended to, current chunk and selected tokens included.
        sink: first frames of the video.
        recent: last frames that are left when the window was full, current chunk included.
        chosen: tokens selected from all between, in frames.
    """

    window: int = 21
    sink: int = 10
    recent: int = 4
    chosen: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "compact":
            raise RoleError(f"{self}: tokens of many frames share a position, use positions='compact'")
        if not self.chosen or not self.recent:
            raise RoleError(f"{self}: expected chosen and recent of at least 1")

    def capacity(self, chunk: int) -> int | None:
        """Whole frames; selected tokens replace some of them and never come on top."""
        return self.window - chunk

    def retain(self, table: FrameTable) -> Sequence[int]:
        chosen = self.chosen if table.gap else 0
        if len(table) + chosen + table.chunk <= self.window:
            return range(len(table))
        return ends(table, self.sink, max(self.recent - table.chunk, 0))

    def fit(self, window: int, chunk: int) -> HeadRole:
        least = self.sink + self.chosen + max(self.recent, chunk)
        if self.window < least:
            raise WindowError(
                f"{self} requires a window of at least {least} frames for a chunk of {chunk}: "
                "give it fewer first or chosen frames"
            )
        return super().fit(window, chunk)

    def compressed(self) -> CompressedHistory | None:
        return Chosen(self)


class Chosen(CompressedHistory):
    """The selected tokens, and evicted frames that the next selection is made from."""

    wants_queries = True

    def __init__(self, role: Participating) -> None:
        self.role = role
        self._queries: Tensor | None = None  # [B, recent, queries of a frame, Hr, D]
        self._frames: list[Past] = []
        self._kept: Tokens | None = None

    def max_tokens(self, patches: int) -> int:
        return self.role.chosen * patches

    @property
    def gap(self) -> int:
        """One position for all of them."""
        return 1 if self._frames or self._kept is not None else 0

    def add(self, past: Past) -> None:
        """Keeps the queries of the last frames."""
        assert past.q is not None  # asked for by wants_queries
        asked = past.q if self._queries is None else torch.cat([self._queries, past.q], 1)
        self._queries = asked[:, -self.role.recent :].clone()

    def evicted(self, past: Past) -> None:
        """Keeps them for the next selection; right after a recache no query is known, and none is made."""
        if self._queries is not None:
            self._frames.append(past)

    def view(self, start: int, query: int | None, encode: Encode) -> Tokens | None:
        """The selected tokens, oldest first; selected when they are attended to for the first time."""
        if self._frames:
            self._kept = self._choose(encode)
            self._frames = []
        return self._kept

    def tensors(self) -> Iterator[Tensor]:
        yield from () if self._queries is None else (self._queries,)
        for past in self._frames:
            yield from (past.k, past.v)
        yield from self._kept or ()

    def clear(self) -> None:
        self._queries, self._frames, self._kept = None, [], None

    def _choose(self, encode: Encode) -> Tokens:
        assert self._queries is not None
        position, tokens = self.role.sink, self.role.chosen * self._frames[0].k.shape[2]
        held = [] if self._kept is None else [self._kept]
        for past in self._frames:
            k = encode(past.k, (position,) * past.k.shape[1]).to(past.v.dtype)
            held.append((k.flatten(1, 2), past.v.flatten(1, 2)))
        k, v = torch.cat([k for k, _ in held], 1), torch.cat([v for _, v in held], 1)
        after = tuple(range(position + 1, position + 1 + self._queries.shape[1]))
        wide = wide_dtype(k)
        asked = encode(self._queries, after).sum((1, 2), dtype=wide)  # [B, Hr, D]
        scores = torch.einsum("bmhd,bhd->bm", k.to(wide), asked)
        best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :tokens]
        rows = torch.sort(best, dim=1).values[:, :, None, None].expand(-1, -1, *v.shape[2:])
        return k.gather(1, rows), v.gather(1, rows)
