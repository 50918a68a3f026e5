"""The slots of one role in the `ring` store: history first, oldest in slot 0, then the pending chunk.

Buffers are allocated once and lie head by head, so that a head's keys are one piece of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headforcing.digest import nbytes
from headforcing.role import HeadRole
from headforcing.scene import Kept
from headforcing.types import Encode, FrameTable, Heads, Pin, Selection, runs

Place = Callable[[Sequence[int | None], int], tuple[float, ...]]
"""Where frames of a view sit, its own ones last, and how many those are."""
_Plan = tuple[tuple[int, ...], tuple[float, ...]]
_NOTHING = torch.empty(0)


class Bank:
    """See the module.

    Args:
        role: whose slots these are.
        heads: those that have the role.

    Attributes:
        frames: of the history, as the role counts them; `None`: chosen by content.
    """

    def __init__(self, role: HeadRole, heads: Heads) -> None:
        self.role, self.heads = role, heads
        self.frames: tuple[int | None, ...] = ()
        self._new = 0
        self._raw = self._rotated = self._v = _NOTHING  # [B, slots, P, Hr, D]
        self._ids = _NOTHING  # [B, slots]: frame numbers, also of frames chosen by content
        self._placed: list[float | None] = []  # where each rotated slot sits; None: not rotated yet
        self._some: dict[int | None, tuple[_Plan, Tensor, Tensor]] = {}  # by query frame

    def table(self, new: int, own: range, pin: Pin | None = None) -> FrameTable:
        """The history as the role is shown it, because the chunk of the frames `own` looks or begins."""
        return FrameTable(self.frames, new, len(own), self._keys, own.start, pin=pin)

    def choose(self, own: range, pin: Pin | None) -> tuple[FrameTable, Selection]:
        """What there is, and what of it stays when the chunk of the frames `own` begins."""
        table = self.table(self._new, own, pin)
        kept = self.role.retain(table)
        return table, kept if isinstance(kept, Selection) else Selection(tuple(kept))

    def begin(self, table: FrameTable, kept: Selection, own: range, place: Place) -> None:
        """Keeps what was chosen of the table."""
        self.frames = kept.frames(table)
        self._move(kept, self._next_positions(own, place))
        self._new = 0
        self._some.clear()

    def stage(self, k: Tensor, v: Tensor) -> None:
        """Writes the heads' part of the pending chunk, `[B, F, P, H, D]`, behind the history."""
        first, last = len(self.frames), len(self.frames) + k.shape[1]
        self._reserve(k, v, last)
        self.heads.take_into(self._raw[:, first:last], k)
        self.heads.take_into(self._v[:, first:last], v)
        self._placed[first:last] = [None] * k.shape[1]

    def append(self, frames: range, inside: range) -> None:
        """Turns the first pending frames, as the host and as the role count them, into history."""
        first = len(self.frames)
        numbers = torch.arange(frames.start, frames.stop, device=self._ids.device)
        self._ids[:, first : first + len(frames)] = numbers
        self.frames = (*self.frames, *inside)
        self._new = len(frames)

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies of keys before RoPE and values of history rows, `[B, rows, P, Hr, D]`."""
        k, v = (torch.cat([x[:, :0], *(x[:, a:b] for a, b in runs(rows))], 1) for x in (self._raw, self._v))
        return k, v

    def take(self, rows: Sequence[int]) -> Kept:
        """Copies of history rows."""
        return Kept(tuple(self.frames[row] for row in rows), *self.rows(rows), self._ids[:, list(rows)])

    def put(self, kept: Kept) -> None:
        """Makes this the history."""
        held = len(kept.frames)
        for buffer, x in ((self._raw, kept.k), (self._v, kept.v), (self._ids, kept.numbers)):
            buffer[:, :held] = x
        self.frames, self._new = kept.frames, 0
        self._placed = [None] * len(self._placed)
        self._some.clear()

    def staged(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values of the pending chunk."""
        own = slice(len(self.frames), len(self.frames) + chunk)
        return self._raw[:, own], self._v[:, own]

    def see(self, positions: Sequence[float], encode: Encode) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of the history and the pending chunk."""
        stale = [slot for slot, place in enumerate(positions) if self._placed[slot] != place]
        for first, last in runs(stale):
            self._rotated[:, first:last] = encode(self._raw[:, first:last], positions[first:last])
            self._placed[first:last] = positions[first:last]
        return self._rotated[:, : len(positions)], self._v[:, : len(positions)]

    def see_some(
        self, rows: Sequence[int], positions: Sequence[float], encode: Encode, query: int | None
    ) -> tuple[Tensor, Tensor]:
        """The same for a part of the history, packed once per chunk and query frame."""
        held = len(rows)
        raw, v = self.staged(len(positions) - held)
        plan = (tuple(rows), tuple(positions))
        if query not in self._some or self._some[query][0] != plan:
            self._some[query] = (plan, *self._packed(rows, positions, encode, len(positions)))
        _, some_k, some_v = self._some[query]
        some_k[:, held:] = encode(raw, positions[held:])
        if held == len(self.frames):
            return some_k, self._v[:, : len(positions)]
        some_v[:, held:] = v
        return some_k, some_v

    def _packed(
        self, rows: Sequence[int], positions: Sequence[float], encode: Encode, slots: int
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys of some rows, and their values where they are not all of them, with room behind."""
        shape = (self._v.shape[0], slots, *self._v.shape[2:])
        every = len(rows) == len(self.frames)
        with torch.inference_mode(False):
            k = _slots(shape, self._v)
            v = k.new_empty(0) if every else _slots(shape, self._v)
        past, values = ([x[:, first:last] for first, last in runs(rows)] for x in (self._raw, self._v))
        if rows:
            k[:, : len(rows)] = encode(torch.cat(past, dim=1), positions[: len(rows)])
        if rows and not every:
            v[:, : len(rows)] = torch.cat(values, dim=1)
        return k, v

    def numbers(self) -> list[list[int]]:
        """Frames held, per sample, as the host counts them. Reads the device."""
        held: list[list[int]] = [] if self._ids is _NOTHING else self._ids[:, : len(self.frames)].tolist()
        return held

    def nbytes(self) -> int:
        """Bytes held, copies for looking included."""
        packed = [tensor for _, *some in self._some.values() for tensor in some]
        return nbytes([*self._buffers(), *packed])

    def clear(self) -> None:
        """Forgets everything but the buffers."""
        self.frames = ()
        self._new = 0
        self._placed = [None] * len(self._placed)
        self._some.clear()

    def _keys(self, rows: Sequence[int]) -> Tensor:
        """Keys of neighbouring history rows, `[B, rows, P, Hr, D]`."""
        return self._raw[:, rows[0] : rows[-1] + 1]

    def _next_positions(self, own: range, place: Place) -> Sequence[float | None]:
        """Where the history will sit in the first pass; nowhere, for a role that sees a part of it."""
        if self.role.reads_per_query:
            return [None] * len(self.frames)
        if len(self.role.attend(self.table(0, own), "denoise")) < len(self.frames):
            return [None] * len(self.frames)
        return place((*self.frames, *own), len(own))

    def _move(self, selection: Selection, positions: Sequence[float | None]) -> None:
        """Slides the selected rows to the front; rotated keys only where their position stays."""
        chosen = 0 if selection.chosen is None else selection.chosen.shape[1]
        after = len(selection.before) + chosen
        kept = [*enumerate(selection.before), *enumerate(selection.after, after)]  # (slot, row)
        settled = [(slot, row) for slot, row in kept if self._placed[row] == positions[slot] is not None]
        for buffer in (self._raw, self._v, self._ids):
            picked = None if selection.chosen is None else _pick(buffer, selection.chosen)
            _slide(buffer, kept[: len(selection.before)])
            if picked is not None:
                buffer[:, len(selection.before) : after] = picked
            _slide(buffer, kept[len(selection.before) :])
        _slide(self._rotated, settled)
        self._placed = [None] * len(self._placed)
        for slot, _ in settled:
            self._placed[slot] = positions[slot]

    def _reserve(self, k: Tensor, v: Tensor, slots: int) -> None:
        """Makes room for `slots` frames like those of `k` and `v`, keeping the history."""
        batch, chunk, tokens, _, dim = k.shape
        fits = self._raw.shape[:1] + self._raw.shape[2:] == (batch, tokens, len(self.heads), dim)
        fits = fits and all(
            (b.dtype, b.device) == (x.dtype, x.device) for b, x in ((self._raw, k), (self._v, v))
        )
        if fits and slots <= self._raw.shape[1]:
            return
        capacity = self.role.capacity(chunk)
        slots = max(slots, 2 * len(self._placed) if capacity is None else capacity + chunk)
        shape = (batch, slots, tokens, len(self.heads), dim)
        with torch.inference_mode(False):
            raw, values = _slots(shape, k), _slots(shape, v)
            rotated = values.new_empty(0) if self.role.reads_per_query else _slots(shape, v)
            ids = torch.empty(shape[:2], dtype=torch.long, device=k.device)
        fresh = (raw, rotated, values, ids)
        if self.frames:
            held = slice(0, len(self.frames))
            for new, old in zip(fresh, self._buffers(), strict=True):
                if new.numel():
                    new[:, held] = old[:, held]
        self._raw, self._rotated, self._v, self._ids = fresh
        self._placed = [*self._placed[: len(self.frames)], *[None] * (slots - len(self.frames))]

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._raw, self._rotated, self._v, self._ids


def _slots(shape: Sequence[int], like: Tensor) -> Tensor:
    """Room for frames `[B, slots, P, H, D]` that lies head by head, as attention reads it."""
    batch, slots, tokens, heads, dim = shape
    room = torch.empty((batch, heads, slots, tokens, dim), dtype=like.dtype, device=like.device)
    return room.permute(0, 2, 3, 1, 4)


def _pick(buffer: Tensor, rows: Tensor) -> Tensor:
    """Rows chosen per sample, `[B, slots, ...]` and `[B, m] -> [B, m, ...]`."""
    sample = torch.arange(rows.shape[0], device=rows.device)[:, None] * buffer.shape[1]
    picked = buffer.flatten(0, 1).index_select(0, (rows + sample).flatten())
    return picked.view(*rows.shape, *buffer.shape[2:])


def _slide(buffer: Tensor, moves: Sequence[tuple[int, int]]) -> None:
    """Copies rows to slots that are never later, `(slot, row)` ascending."""
    for slot, row, count in _blocks(moves):
        buffer[:, slot : slot + count] = buffer[:, row : row + count]


def _blocks(moves: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Joins neighbours into `(slot, row, count)`, never so long that a block overlaps itself."""
    blocks: list[tuple[int, int, int]] = []
    for slot, row in moves:
        if slot == row:
            continue
        to, source, count = blocks[-1] if blocks else (0, 0, 0)
        if (slot, row) == (to + count, source + count) and 0 < count < row - slot:
            blocks[-1] = (to, source, count + 1)
        else:
            blocks.append((slot, row, 1))
    return blocks
