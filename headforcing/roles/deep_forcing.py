"""The role of Deep Forcing (arXiv:2512.05081): a deep sink, the tokens that queries ask for, last frames.

From the paper, and from the copy of its code in Relax Forcing: when the window is full, all that is kept of
the frames between the first ten and the last four are two frames' worth of single tokens, those with the
largest sum of query times key over the queries of the last four frames, all heads together; tokens compete
again whenever the window is full. Our choices: the queries are those of finished frames, not of the noisy
chunk, so that noisy passes leave no trace; chosen tokens share one place right behind the first frames, as
the paper does not say which place each takes; no token is dropped for having been chosen seven times, which
only the code does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headforcing.errors import RoleError, WindowError
from headforcing.roles.base import HeadRole, ends
from headforcing.roles.compressed import CompressedHistory, Past, Tokens
from headforcing.types import Encode, FrameTable


@dataclass(frozen=True)
class Participating(HeadRole):
    """First frames, tokens that recent queries ask for, last frames; `window` in all.

    Attributes:
        window: frames seen, own chunk and chosen tokens included.
        sink: first frames of the video.
        recent: last frames that are left when the window was full, own chunk included.
        chosen: tokens chosen of all between, in frames.
    """

    window: int = 21
    sink: int = 10
    recent: int = 4
    chosen: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "compact":
            raise RoleError(f"{self}: tokens of many frames share a place, use positions='compact'")
        if not self.chosen or not self.recent:
            raise RoleError(f"{self}: expected chosen and recent of at least 1")

    def capacity(self, chunk: int) -> int | None:
        """Whole frames kept; chosen tokens come in their place, never on top."""
        return self.window - chunk

    def retain(self, table: FrameTable) -> Sequence[int]:
        """Everything while it fits, then first and last frames."""
        rows = len(table)
        chosen = 0 if table.frames == tuple(range(rows)) else self.chosen
        if rows + chosen + table.chunk <= self.window:
            return range(rows)
        return ends(table, self.sink, max(self.recent - table.chunk, 0))

    def fit(self, window: int, chunk: int) -> HeadRole:
        """The role, if there is room for all of it.

        Raises:
            WindowError: there is not.
        """
        least = self.sink + self.chosen + max(self.recent, chunk)
        if self.window < least:
            raise WindowError(f"{self} needs a window of at least {least} frames for a chunk of {chunk}")
        return super().fit(window, chunk)

    def compressed(self) -> CompressedHistory | None:
        """See the class."""
        return Chosen(self)


class Chosen(CompressedHistory):
    """The tokens that were chosen, and the frames of which the next ones are chosen."""

    wants_queries = True

    def __init__(self, role: Participating) -> None:
        self.role = role
        self._queries: Tensor | None = None  # [B, recent, P, Hr, D]
        self._frames: list[Past] = []
        self._kept: Tokens | None = None

    def max_tokens(self, patches: int) -> int:
        """As many as the role says."""
        return self.role.chosen * patches

    @property
    def gap(self) -> int:
        """One, for all of them."""
        return 1 if self._frames or self._kept is not None else 0

    def add(self, past: Past) -> None:
        """Takes the queries of finished frames."""
        assert past.q is not None  # checked
        asked = past.q if self._queries is None else torch.cat([self._queries, past.q], 1)
        self._queries = asked[:, -self.role.recent :].clone()

    def evicted(self, past: Past) -> None:
        """Takes frames to choose of."""
        self._frames.append(past)

    def view(self, start: int, query: int | None, encode: Encode) -> Tokens | None:
        """What was chosen, in the order of time; chosen when it is seen first."""
        if self._frames:
            self._kept = self._choose(encode)
            self._frames = []
        return self._kept

    def tensors(self) -> Iterator[Tensor]:
        """Queries, frames to choose of, and what was chosen."""
        yield from () if self._queries is None else (self._queries,)
        for past in self._frames:
            yield from (past.k, past.v)
        yield from self._kept or ()

    def clear(self) -> None:
        """Forgets everything."""
        self._queries, self._frames, self._kept = None, [], None

    def _choose(self, encode: Encode) -> Tokens:
        assert self._queries is not None
        place, tokens = self.role.sink, self.role.chosen * self._queries.shape[2]
        held = [] if self._kept is None else [self._kept]
        for past in self._frames:
            k = encode(past.k, (place,) * past.k.shape[1]).to(past.v.dtype)
            held.append((k.flatten(1, 2), past.v.flatten(1, 2)))
        k, v = torch.cat([k for k, _ in held], 1), torch.cat([v for _, v in held], 1)
        behind = tuple(range(place + 1, place + 1 + self._queries.shape[1]))
        asked = encode(self._queries, behind).sum((1, 2), dtype=torch.float32)  # [B, Hr, D]
        scores = torch.einsum("bmhd,bhd->bm", k.float(), asked)
        best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :tokens]
        rows = torch.sort(best, dim=1).values[:, :, None, None].expand(-1, -1, *v.shape[2:])
        return k.gather(1, rows), v.gather(1, rows)
