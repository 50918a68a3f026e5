"""A bank in buffers that are allocated once: history first, oldest in slot 0, then the pending chunk.

The pending chunk is written right after the history, so a view of all rows is one slice: no gather and no
`cat` per pass. When a chunk begins, the frames that stay slide to the front, as in the rolling KV cache
upstream.

A role has buffers for `capacity + chunk` frames. Keys before RoPE of all roles of a layer share one
allocation, values another one, and so on; see `headforcing.stores.buffers`. They are made when the first
chunk comes and stay where they are, also for the next video. All of them move, with their contents, when a
role without a capacity, with one above `AT_ONCE`, or a longer chunk requires more, or when a role requires
less from now on because compressed tokens took the place of some frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import CompressedHistory
from headforcing.stores.bank import Bank, Kept, PositionsOf
from headforcing.stores.buffers import Size, cut, gathered, of_rows, picked, slides
from headforcing.types import Encode, FrameTable, Heads, Selection

NOTHING = torch.empty(0)
AT_ONCE = 128
"""Most frames that buffers are made for before they are needed; a role that may keep more has them grow."""


class BufferedBank(Bank):
    """Keys before RoPE, and values; all that a pass reads is rotated in this pass.

    Args:
        role: whose frames these are.
        heads: those that have the role.
        compressed: the compressed history of the role.

    Attributes:
        buffers: `[B, slots, P, Hr, D]`: keys before RoPE, `raw`, and values, `v`.
    """

    def __init__(self, role: HeadRole, heads: Heads, compressed: CompressedHistory | None = None) -> None:
        super().__init__(role, heads, compressed)
        self.buffers: dict[str, Tensor] = {"raw": NOTHING, "v": NOTHING}
        self._ids = NOTHING  # [B, slots]: frame numbers, also of frames chosen by content
        self._pending = 0  # frames of the pending chunk
        self._largest: int | None = None  # most slots needed since compressed tokens took the place of frames

    @property
    def _raw(self) -> Tensor:
        return self.buffers["raw"]

    @property
    def _v(self) -> Tensor:
        return self.buffers["v"]

    def begin(self, table: FrameTable, kept: Selection, chunk: range, positions: PositionsOf) -> None:
        super().begin(table, kept, chunk, positions)
        for buffer in (self._raw, self._v, self._ids):
            self.moves += _select(buffer, kept)
        if self.compressed is not None and self.compressed.gap:
            self._shrink_buffers(len(chunk))

    def _shrink_buffers(self, chunk: int) -> None:
        """Shrinks the buffers, from the next chunk on, to the largest size needed so far.

        Reset by `put` and `clear`. `chunk`: frames of the chunk that begins now.
        """
        self._largest = max(self._largest or 0, len(self.frames) + chunk)

    def slots(self, k: Tensor, v: Tensor) -> int:
        """Slots of its buffers, if these fit frames like those of `k` and `v`, `[B, F, P, H, D]`; else 0."""
        batch, _, tokens, _, dim = k.shape
        shape = (batch, tokens, len(self.heads), dim)
        alike = all(
            (buffer.shape[:1] + buffer.shape[2:], buffer.dtype, buffer.device) == (shape, x.dtype, x.device)
            for buffer, x in ((self._raw, k), (self._v, v))
        )
        return self._raw.shape[1] if alike else 0

    def wanted(self, k: Tensor, v: Tensor) -> int:
        """Slots it should have for such a chunk after its history; those it has, if they suffice."""
        slots, needed, chunk = self.slots(k, v), len(self.frames) + k.shape[1], k.shape[1]
        if self._largest is not None:
            return max(needed, self._largest)
        if needed <= slots:
            return slots
        capacity = self.role.capacity(chunk)
        if capacity is not None and (capacity <= AT_ONCE or capacity + chunk < 2 * slots):
            return max(needed, capacity + chunk)
        return max(needed, 2 * slots)

    def front(self, name: str, tokens: int) -> int:
        """Tokens that fit in front of a buffer for frames of `tokens` tokens; none here."""
        return 0

    def move(self, buffers: Mapping[str, Tensor], slots: int) -> None:
        """Moves the first slots into other buffers."""
        old = {**self.buffers, "ids": self._ids}
        with torch.inference_mode(False):
            ids = torch.empty(buffers["v"].shape[:2], dtype=torch.long, device=buffers["v"].device)
        for name, buffer in {**buffers, "ids": ids}.items():
            if slots:
                self.moves.append(partial(buffer[:, :slots].copy_, old[name][:, :slots]))
        self.buffers, self._ids = dict(buffers), ids

    def free(self) -> None:
        """Frees its buffers, with their contents."""
        self.buffers, self._ids = dict.fromkeys(self.buffers, NOTHING), NOTHING

    def stage(self, k: Tensor, v: Tensor) -> None:
        self._pending = k.shape[1]
        for buffer, x in zip(self.staged(), (k, v), strict=True):
            self.moves.append(partial(self.heads.take_into, buffer, x))

    def staged(self) -> tuple[Tensor, Tensor]:
        own = slice(len(self.frames), len(self.frames) + self._pending)
        return self._raw[:, own], self._v[:, own]

    def append(self, frames: range, inside: range) -> None:
        first = len(self.frames)
        numbers = torch.arange(frames.start, frames.stop, device=self._ids.device)
        self._ids[:, first : first + len(frames)] = numbers
        super().append(frames, inside)

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return of_rows(self._raw, rows), of_rows(self._v, rows)

    def keys(self, rows: Sequence[int]) -> Tensor:
        return self._raw[:, rows[0] : rows[-1] + 1]

    def take(self, rows: Sequence[int]) -> Kept:
        frames = tuple(self.frames[row] for row in rows)
        return Kept(frames, *self.rows(rows), of_rows(self._ids, rows))

    def put(self, kept: Kept) -> None:
        super().put(kept)
        for buffer, x in ((self._raw, kept.k), (self._v, kept.v), (self._ids, kept.numbers)):
            buffer[:, : len(kept.frames)] = x
        self._largest = None

    def view(
        self, rows: Sequence[int], positions: Sequence[float], encode: Encode, query: int | None
    ) -> tuple[Tensor, Tensor]:
        if self._views_all(rows, query):
            k, v = (x[:, : len(positions)] for x in (self._raw, self._v))
        else:
            own = range(len(self.frames), len(self.frames) + self._pending)
            k, v = (gathered(x, [*rows, *own]) for x in (self._raw, self._v))
        return encode(k, positions).to(v.dtype), v

    def _views_all(self, rows: Sequence[int], query: int | None) -> bool:
        return query is None and len(rows) == len(self.frames)

    def numbers(self) -> list[list[int]]:
        stored: list[list[int]] = [] if self._ids is NOTHING else self._ids[:, : len(self.frames)].tolist()
        return stored

    def tensors(self) -> list[Tensor]:
        return [*self.buffers.values(), self._ids]

    def clear(self) -> None:
        super().clear()
        self._largest = None


def free_unfit(every: Iterable[Bank], k: Tensor, v: Tensor) -> None:
    """Frees the buffers of empty banks, before there are new ones, if they do not fit such a chunk."""
    banks = _buffered(every)
    if [bank.wanted(k, v) for bank in banks] != [bank.slots(k, v) for bank in banks]:
        for bank in banks:
            bank.free()


def allocate(every: Iterable[Bank], k: Tensor, v: Tensor) -> None:
    """Gives the banks of a layer buffers for a chunk `[B, F, P, H, D]`, if one of them has none that fit."""
    banks = _buffered(every)
    wanted = [bank.wanted(k, v) for bank in banks]
    if wanted != [bank.slots(k, v) for bank in banks]:
        _move(banks, wanted, (k, v), [len(bank.frames) for bank in banks])


def separate(every: Iterable[Bank]) -> None:
    """Gives the banks of a layer other buffers with the same contents; the old ones stay as they are."""
    banks = _buffered(every)
    if banks:
        slots = [bank.buffers["v"].shape[1] for bank in banks]
        _move(banks, slots, (banks[0].buffers["raw"], banks[0].buffers["v"]), slots)


def _buffered(every: Iterable[Bank]) -> list[BufferedBank]:
    return [bank for bank in every if isinstance(bank, BufferedBank)]


def _move(
    banks: Sequence[BufferedBank], slots: Sequence[int], like: tuple[Tensor, Tensor], stored: Sequence[int]
) -> None:
    """Moves the stored slots of the banks of a layer into new buffers for such keys and values."""
    k, v = like
    frame = (k.shape[0], k.shape[2], k.shape[4])
    buffers: list[dict[str, Tensor]] = [{} for _ in banks]
    for name in dict.fromkeys(name for bank in banks for name in bank.buffers):
        some = [index for index, bank in enumerate(banks) if name in bank.buffers]
        sizes = [
            Size(slots[index], len(banks[index].heads), banks[index].front(name, k.shape[2]))
            for index in some
        ]
        for index, buffer in zip(some, cut(sizes, frame, k if name == "raw" else v), strict=True):
            buffers[index][name] = buffer
    for bank, own, count in zip(banks, buffers, stored, strict=True):
        bank.move(own, count)


def known_moves(kept: Selection) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """`(slot, row)` of kept rows that were not chosen by content: before those that were, and after."""
    after = len(kept.before) + (0 if kept.chosen is None else kept.chosen.shape[1])
    return list(enumerate(kept.before)), list(enumerate(kept.after, after))


def _select(buffer: Tensor, kept: Selection) -> list[Callable[[], object]]:
    """Moves that slide the selected rows to the front."""
    before, after = known_moves(kept)
    if kept.chosen is None:
        return [*slides(buffer, before), *slides(buffer, after)]
    chosen = picked(buffer, kept.chosen)
    there = buffer[:, len(before) : len(before) + chosen.shape[1]]
    return [*slides(buffer, before), partial(there.copy_, chosen), *slides(buffer, after)]
