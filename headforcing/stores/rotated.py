"""A bank that also stores rotated keys: they are rotated at most once per chunk, in however many passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from headforcing.errors import RoleError
from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import CompressedHistory, Tokens
from headforcing.stores.bank import Bank, Kept, PositionsOf
from headforcing.stores.buffered import AT_ONCE, NOTHING, BufferedBank, known_moves
from headforcing.stores.buffers import Size, cut, front, gathered, side_by_side, slides
from headforcing.types import Encode, FrameTable, Heads, Selection, runs

_Holds = tuple[tuple[int, ...], tuple[float, ...]]
"""Rows of the history, and positions of these and the pending chunk."""


@dataclass
class _Copy:
    """Buffers for a part of the history and the pending chunk, and what is in them.

    Attributes:
        k: rotated keys.
        v: values.
        holds: rows of the history, and positions of all frames.
        own: positions of the pending chunk as it was staged last; `None`: it is not there yet.
    """

    k: Tensor
    v: Tensor
    holds: _Holds | None = None
    own: tuple[float, ...] | None = None

    def pending(self) -> tuple[Tensor, Tensor]:
        """Where the pending chunk is, behind the rows that it holds: rotated keys, and values."""
        assert self.holds is not None
        rows, positions = self.holds
        return self.k[:, len(rows) : len(positions)], self.v[:, len(rows) : len(positions)]

    def takes(self, own: tuple[float, ...]) -> bool:
        """Whether its pending chunk sits at these positions."""
        return self.holds is not None and self.holds[1][len(self.holds[0]) :] == own


class RotatedBank(BufferedBank):
    """See the module.

    One more buffer, `rotated`, holds the keys at their present positions. A role that reads per query frame
    has none, because the positions of its keys differ by query frame. What such a role sees, like what any
    role sees that attends to a part of its history, is copied once per chunk. How much that is shows only
    in use: a copy that had to grow moves into one allocation with the others of the layer when the next
    chunk begins; see `share_copies`.

    Compressed tokens are copied right in front of the frames that are read with them.
    """

    def __init__(self, role: HeadRole, heads: Heads, compressed: CompressedHistory | None = None) -> None:
        super().__init__(role, heads, compressed)
        if "query" not in role.depends_on:
            self.buffers["rotated"] = NOTHING
        self._rotated_to: list[float | None] = []  # position of each rotated slot; None: not rotated yet
        self._copies: dict[int | None, _Copy] = {}  # by the number of the query frame in the chunk
        self._last_view: dict[int | None, tuple[Tensor, Tensor]] = {}  # likewise: buffers of keys and values

    def begin(self, table: FrameTable, kept: Selection, chunk: range, positions: PositionsOf) -> None:
        super().begin(table, kept, chunk, positions)
        self._settle(kept, self._next_positions(chunk, positions))
        self._forget_copies()
        self._last_view.clear()

    def move(self, buffers: Mapping[str, Tensor], slots: int) -> None:
        """Moves the first slots into other buffers; copies are made anew."""
        super().move(buffers, slots)
        settled = self._rotated_to[:slots]
        self._rotated_to = [*settled, *[None] * (self._v.shape[1] - len(settled))]
        self._copies.clear()
        self._last_view.clear()

    def free(self) -> None:
        """Frees its buffers and copies."""
        super().free()
        self._rotated_to = []
        self._copies.clear()
        self._last_view.clear()

    def front(self, name: str, tokens: int) -> int:
        """The most compressed tokens the role will ever have, for the buffers that are read with them."""
        return 0 if name == "raw" else self._most_tokens(tokens) or 0

    def prepend(self, query: int | None, tokens: Tokens) -> Tokens:
        """Copies compressed tokens right in front of the frames; they stay if nothing was reserved there.

        Raises:
            RoleError: they are more than the maximum that the role names.
        """
        if self.compressed is None or query not in self._last_view:
            return tokens
        buffers, count, patches = self._last_view[query], tokens[0].shape[1], self._v.shape[2]
        if (most := self._most_tokens(patches)) is None:
            return tokens
        if count > most:
            raise RoleError(
                f"{self.role} shows {count} tokens compressed from frames of {patches}, but said that there "
                f"would be at most {most}: mend {type(self.compressed).__name__}.max_tokens"
            )
        k, v = (front(buffer, count).copy_(x) for buffer, x in zip(buffers, tokens, strict=True))
        return k, v

    def stage(self, k: Tensor, v: Tensor) -> None:
        first, count = len(self.frames), k.shape[1]
        self._rotated_to[first : first + count] = [None] * count
        for copy in self._copies.values():
            copy.own = None
        super().stage(k, v)

    def put(self, kept: Kept) -> None:
        super().put(kept)
        self._rotated_to = [None] * len(self._rotated_to)
        self._forget_copies()

    def view(
        self, rows: Sequence[int], positions: Sequence[float], encode: Encode, query: int | None
    ) -> tuple[Tensor, Tensor]:
        if self._views_all(rows, query):
            k, v = self._last_view[query] = self._all(positions, encode)
        else:
            k, v = self._last_view[query] = self._part(rows, positions, encode, query)
        return k[:, : len(positions)], v[:, : len(positions)]

    def _all(self, positions: Sequence[float], encode: Encode) -> tuple[Tensor, Tensor]:
        """The buffers of rotated keys and of values; only keys at other positions than these are rotated."""
        rotated = self.buffers["rotated"]
        stale = [slot for slot, position in enumerate(positions) if self._rotated_to[slot] != position]
        for first, last in runs(stale):
            self._rotated_to[first:last] = [None] * (last - first)
            rotated[:, first:last] = encode(self._raw[:, first:last], positions[first:last])
            self._rotated_to[first:last] = positions[first:last]
        return rotated, self._v

    def _part(
        self, rows: Sequence[int], positions: Sequence[float], encode: Encode, query: int | None
    ) -> tuple[Tensor, Tensor]:
        """A copy of some rows and the pending chunk; rows are copied anew if they or positions change."""
        copy, own = self._copy(query, len(positions)), tuple(positions[len(rows) :])
        self._put_history([(copy, (tuple(rows), tuple(positions)))], encode)
        if copy.own != own:
            self._put_pending(own, encode)
        return copy.k, copy.v

    def prepare(self, views: Sequence[tuple[Sequence[int], Sequence[float]]], encode: Encode) -> None:
        """Copies the history for all query frames in one step, where they see as many frames."""
        asked = [
            (self._copy(query, len(positions)), (tuple(rows), tuple(positions)))
            for query, (rows, positions) in enumerate(views)
        ]
        if len({len(rows) for rows, _ in views}) == 1:
            self._put_history(asked, encode)

    def _put_history(self, asked: Sequence[tuple[_Copy, _Holds]], encode: Encode) -> None:
        """Puts as many rows of the history into each of some copies, unless they are there."""
        stale = [(copy, holds) for copy, holds in asked if copy.holds != holds]
        for copy, _ in stale:
            copy.holds = copy.own = None
        count = len(stale[0][1][0]) if stale else 0
        if count:
            rows = [row for _, holds in stale for row in holds[0]]
            positions = [position for _, holds in stale for position in holds[1][:count]]
            _put_each([copy.k[:, :count] for copy, _ in stale], encode(gathered(self._raw, rows), positions))
            _put_each([copy.v[:, :count] for copy, _ in stale], gathered(self._v, rows))
        for copy, holds in stale:
            copy.holds = holds

    def _put_pending(self, own: tuple[float, ...], encode: Encode) -> None:
        """Puts the pending chunk into all copies where it sits at these positions, rotated once."""
        k, v = self.staged()
        there = next((copy.pending()[0] for copy in self._copies.values() if copy.own == own), None)
        some = [copy for copy in self._copies.values() if copy.takes(own) and copy.own != own]
        sources = encode(k, own) if there is None else there, v
        places = zip(*(copy.pending() for copy in some), strict=True)
        for source, targets in zip(sources, places, strict=True):
            _put_each(targets, source)
        for copy in some:
            copy.own = own

    def tensors(self) -> list[Tensor]:
        copies = [tensor for copy in list(self._copies.values()) for tensor in (copy.k, copy.v)]
        return [*super().tensors(), *copies]

    def clear(self) -> None:
        super().clear()
        self._rotated_to = [None] * len(self._rotated_to)
        self._forget_copies()

    def copies(self) -> list[tuple[_Copy, Size]]:
        """The copies of parts of the history, and the sizes of their buffers."""
        made = [copy for copy in self._copies.values() if copy.k is not NOTHING]
        return [(copy, self._size(copy.k.shape[1])) for copy in made]

    def _most_tokens(self, patches: int) -> int | None:
        """Most compressed tokens, if the role names a maximum and it is not too large to be reserved."""
        most = None if self.compressed is None else self.compressed.max_tokens(patches)
        return None if most is None or most > AT_ONCE * patches else most

    def _copy(self, query: int | None, slots: int) -> _Copy:
        """The copy for a query frame, with at least so many slots."""
        copy = self._copies.setdefault(query, _Copy(NOTHING, NOTHING))
        if copy.k is NOTHING or copy.k.shape[1] < slots:
            batch, _, tokens, _, dim = self._v.shape
            copy.k, copy.v, copy.holds, copy.own = NOTHING, NOTHING, None, None
            (copy.k,), (copy.v,) = (cut([self._size(slots)], (batch, tokens, dim), self._v) for _ in "kv")
        return copy

    def _size(self, slots: int) -> Size:
        """Of the buffers of a copy."""
        return Size(slots, len(self.heads), self.front("v", self._v.shape[2]))

    def _forget_copies(self) -> None:
        for copy in self._copies.values():
            copy.holds = copy.own = None

    def _next_positions(self, chunk: range, positions: PositionsOf) -> Sequence[float | None]:
        """Positions of the history in the first pass; `None` for a role that sees a part of it."""
        if "query" in self.role.depends_on:
            return [None] * len(self.frames)
        if len(self.role.visible(self.table(chunk), "denoise")) < len(self.frames):
            return [None] * len(self.frames)
        return positions((*self.frames, *chunk), len(chunk))

    def _settle(self, kept: Selection, positions: Sequence[float | None]) -> None:
        """Slides rotated keys along with the rows that stay, where their positions stay."""
        moves = [move for part in known_moves(kept) for move in part]
        settled = [(slot, row) for slot, row in moves if self._rotated_to[row] == positions[slot] is not None]
        self._rotated_to = [None] * len(self._rotated_to)
        if settled:
            self.moves += slides(self.buffers["rotated"], settled)
        for slot, _ in settled:
            self._rotated_to[slot] = positions[slot]


def _put_each(places: Sequence[Tensor], frames: Tensor) -> None:
    """Copies frames to places `[B, n, P, Hr, D]`: `n` to each in turn, or the same `n` to all."""
    count, same = len(places), frames.shape[1] == places[0].shape[1]
    if (whole := side_by_side(places)) is not None:
        whole.copy_(frames if same else frames[0].unflatten(0, (count, -1)))
        return
    for place, some in zip(places, [frames] * count if same else frames.chunk(count, 1), strict=True):
        place.copy_(some)


def share_copies(banks: Iterable[Bank]) -> None:
    """Moves all copies of a layer into one allocation for keys, and another, alike, for values.

    Done after a chunk that needed larger ones; their contents are made anew.
    """
    copies = [found for bank in banks if isinstance(bank, RotatedBank) for found in bank.copies()]
    if len({copy.k.untyped_storage() for copy, _ in copies}) < 2:
        return
    batch, _, tokens, _, dim = copies[0][0].k.shape
    like = copies[0][0].k.new_empty(0)
    for copy, _ in copies:
        copy.k = copy.v = NOTHING
    buffers = [cut([size for _, size in copies], (batch, tokens, dim), like) for _ in "kv"]
    for (copy, _), k, v in zip(copies, *buffers, strict=True):
        copy.k, copy.v, copy.holds, copy.own = k, v, None, None
