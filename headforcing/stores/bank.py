"""A bank: the history of one role in one layer, and its part of the pending chunk; a kind per store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import CompressedHistory, Tokens
from headforcing.types import Chunk, Encode, FrameTable, Heads, Pin, Selection

PositionsOf = Callable[[Sequence[int | None], int], tuple[float, ...]]
"""RoPE positions of frames, and how many of the last ones are the current chunk."""


@dataclass(frozen=True)
class Kept:
    """Whole frames of one role, copied out of its bank.

    Attributes:
        frames: as the role counts them; `None`: chosen by content.
        k: keys before RoPE, `[B, m, P, Hr, D]`.
        v: values, likewise.
        numbers: as the base model counts them, `[B, m]`.
    """

    frames: tuple[int | None, ...]
    k: Tensor
    v: Tensor
    numbers: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds."""
        return self.k, self.v, self.numbers

    def restarted(self) -> Kept:
        """Counted from 0."""
        return replace(self, frames=tuple(None if f is None else row for row, f in enumerate(self.frames)))


class Bank(ABC):
    """The history of one role, oldest frame first, and the role's part of the pending chunk.

    A store says when frames come and go; a bank holds their tensors. `begin`, `append`, `put` and `clear`
    count the frames here and move the tensors in subclasses, which extend them.

    A store changes a fork of its banks and then takes it over (`headforcing.stores.fork`). So until `settle`
    a bank must not overwrite stored frames: such writes go to `moves`. `put` may write at once, because a
    store gives its banks buffers of their own first.

    Args:
        role: whose frames these are.
        heads: those that have the role.
        compressed: the compressed history of the role.

    Attributes:
        frames: of the history, as the role counts them; `None`: chosen by content.
        moves: what is still to be written, in order. Each may run again after it ran, before the next one.
    """

    def __init__(self, role: HeadRole, heads: Heads, compressed: CompressedHistory | None = None) -> None:
        self.role, self.heads, self.compressed = role, heads, compressed
        self.frames: tuple[int | None, ...] = ()
        self.moves: list[Callable[[], object]] = []
        self._new = 0

    def table(self, chunk: range, pin: Pin | None = None, query: int | None = None) -> FrameTable:
        """The history as the role sees it in a pass over the frames `chunk`."""
        return FrameTable(self.frames, 0, len(chunk), self.keys, chunk.start, query, pin)

    def choose(self, chunk: range, pin: Pin | None, gap: int) -> tuple[FrameTable, Selection]:
        """The history when the frames `chunk` begin, and the rows of it that the role keeps.

        `gap`: positions that the role's compressed tokens take.
        """
        table = replace(self.table(chunk, pin), new=self._new, gap=gap)
        kept = self.role.retain(table)
        return table, kept if isinstance(kept, Selection) else Selection(tuple(kept))

    def begin(self, table: FrameTable, kept: Selection, chunk: range, positions: PositionsOf) -> None:
        """Evicts all rows of the table but those that are kept, because the frames `chunk` begin.

        `positions` tells where frames sit from now on.
        """
        self.frames, self._new = kept.frames(table), 0

    def settle(self) -> None:
        """Does the moves; one that was interrupted is done again."""
        while self.moves:
            self.moves[0]()
            del self.moves[0]

    @abstractmethod
    def stage(self, k: Tensor, v: Tensor) -> None:
        """Takes the heads' part of the pending chunk, `[B, F, P, H, D]`, in place of the one before."""

    @abstractmethod
    def staged(self) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values of the pending chunk, `[B, F, P, Hr, D]`."""

    def append(self, frames: range, inside: range) -> None:
        """Turns the first pending frames, as base model and role count them, into history."""
        self.frames, self._new = (*self.frames, *inside), len(frames)

    @abstractmethod
    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies of keys before RoPE and values of history rows, `[B, rows, P, Hr, D]`."""

    def keys(self, rows: Sequence[int]) -> Tensor:
        """Keys before RoPE of neighbouring history rows, for roles that choose by content."""
        return self.rows(rows)[0]

    @abstractmethod
    def take(self, rows: Sequence[int]) -> Kept:
        """Copies of history rows, with their numbers."""

    def put(self, kept: Kept) -> None:
        """Replaces the history."""
        self.frames, self._new = kept.frames, 0

    def prepare(  # noqa: B027 - optional on purpose
        self, views: Sequence[tuple[Sequence[int], Sequence[float]]], encode: Encode
    ) -> None:
        """Does at once what views of all query frames of the chunk require; default: nothing.

        Args:
            views: rows and positions of each; see `view`.
            encode: rotates keys to positions.
        """

    @abstractmethod
    def view(
        self, rows: Sequence[int], positions: Sequence[float], encode: Encode, query: int | None
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of some history rows and the pending chunk.

        Args:
            rows: of the history.
            positions: of the rows and the pending chunk.
            encode: rotates keys to positions.
            query: number in the chunk of the query frame, for a role that reads per query frame.
        """

    def prepend(self, query: int | None, tokens: Tokens) -> Tokens:
        """Copies compressed tokens to where attention reads them; default: they stay where they are.

        Args:
            query: as in the call of `view` before.
            tokens: rotated keys, and values.
        """
        return tokens

    @abstractmethod
    def numbers(self) -> list[list[int]]:
        """Frames of the history, per sample, as the base model counts them. Reads the device."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All tensors it holds."""

    def clear(self) -> None:
        """Forgets history and pending chunk; memory may stay for the next video."""
        self.moves.clear()
        self.frames, self._new = (), 0


def copied(every: Iterable[Bank], start: int) -> Chunk:
    """A copy of the pending chunk of the banks of a layer, which begins at `start`, all heads together."""
    parts = [(bank.heads, *bank.staged()) for bank in every]
    count = sum(len(heads) for heads, _, _ in parts)
    k, v = (x.new_empty(*x.shape[:3], count, x.shape[4]) for x in parts[0][1:])
    for heads, part_k, part_v in parts:
        heads.put(k, part_k)
        heads.put(v, part_v)
    return Chunk(start, k, v)
