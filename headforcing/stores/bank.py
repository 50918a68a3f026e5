"""The buffers of one role in one layer: history first, oldest in slot 0, then the pending chunk.

The pending chunk is written right after the history, so a view is one slice: no gather, no `cat` per pass.
When a chunk begins, the frames that stay slide to the front, as in the base model's rolling KV cache.

A role has a buffer of `capacity + chunk` frames for keys before RoPE and one for values. The buffers of all
roles of a layer are cut out of one allocation, the longest first; see `headforcing.stores.buffers`. They are
allocated when the first chunk comes and stay where they are, also for the next video, unless a role without a
capacity or a longer chunk needs more, or a role needs less from now on because compressed tokens took the
place of frames: then all of them move, with their contents.

Here the visible keys are rotated in every pass; `headforcing.stores.rotated` keeps them rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import CompressedHistory, Tokens
from headforcing.stores.buffers import Size, cut
from headforcing.stores.scenes import Kept
from headforcing.types import Encode, FrameTable, Heads, Pin, Selection, runs

Place = Callable[[Sequence[int | None], int], tuple[float, ...]]
"""Where frames of a view sit, its own ones last, and how many those are."""
NOTHING = torch.empty(0)


class Bank:
    """See the module.

    Args:
        role: whose slots these are.
        heads: those that have the role.
        digest: what it keeps beside whole frames.

    Attributes:
        frames: of the history, as the role counts them; `None`: chosen by content.
        rooms: `[B, slots, P, Hr, D]`: `raw` keys and values `v`.
    """

    def __init__(self, role: HeadRole, heads: Heads, digest: CompressedHistory | None = None) -> None:
        self.role, self.heads, self.digest = role, heads, digest
        self.frames: tuple[int | None, ...] = ()
        self.rooms: dict[str, Tensor] = {"raw": NOTHING, "v": NOTHING}
        self._ids = NOTHING  # [B, slots]: frame numbers, also of frames chosen by content
        self._new = 0
        self._most: int | None = None  # slots needed since something else took the place of frames

    @property
    def _raw(self) -> Tensor:
        return self.rooms["raw"]

    @property
    def _v(self) -> Tensor:
        return self.rooms["v"]

    def table(self, new: int, own: range, pin: Pin | None = None) -> FrameTable:
        """The history as the role is shown it, because the chunk of the frames `own` looks or begins."""
        return FrameTable(self.frames, new, len(own), self._keys, own.start, pin=pin)

    def choose(self, own: range, pin: Pin | None) -> tuple[FrameTable, Selection]:
        """What there is, and what of it stays when the chunk of the frames `own` begins."""
        table = self.table(self._new, own, pin)
        kept = self.role.retain(table)
        return table, kept if isinstance(kept, Selection) else Selection(tuple(kept))

    def begin(self, table: FrameTable, kept: Selection, own: range, place: Place) -> None:
        """Keeps what was chosen of the table, because the chunk of the frames `own` begins.

        `place` tells where they will sit.
        """
        self.frames = kept.frames(table)
        for buffer in (self._raw, self._v, self._ids):
            _select(buffer, kept)
        self._new = 0

    def tighten(self, chunk: int) -> None:
        """From the next chunk on, room for no more than was needed at any call so far, and is now.

        Until history is replaced or forgotten. `chunk`: frames of the chunk that begins behind it.
        """
        self._most = max(self._most or 0, len(self.frames) + chunk)

    def slots(self, k: Tensor, v: Tensor) -> int:
        """Slots it has for frames like those of `k` and `v [B, F, P, H, D]`."""
        batch, _, tokens, _, dim = k.shape
        shape = (batch, tokens, len(self.heads), dim)
        alike = all(
            (room.shape[:1] + room.shape[2:], room.dtype, room.device) == (shape, x.dtype, x.device)
            for room, x in ((self._raw, k), (self._v, v))
        )
        return self._raw.shape[1] if alike else 0

    def wanted(self, k: Tensor, v: Tensor) -> int:
        """Slots it needs with a chunk of such frames behind its history; those it has, where they do."""
        slots, needed, chunk = self.slots(k, v), len(self.frames) + k.shape[1], k.shape[1]
        if self._most is not None:
            return max(needed, self._most)
        if needed <= slots:
            return slots
        capacity = self.role.capacity(chunk)
        return max(needed, 2 * slots if capacity is None else capacity + chunk)

    def front(self, name: str, tokens: int) -> int:
        """Tokens for which a room has place before the first of its frames of `tokens` tokens; none here."""
        return 0

    def move(self, rooms: Mapping[str, Tensor]) -> None:
        """Moves into other rooms, with the history."""
        held = slice(0, len(self.frames))
        old = {**self.rooms, "ids": self._ids}
        with torch.inference_mode(False):
            ids = torch.empty(rooms["v"].shape[:2], dtype=torch.long, device=rooms["v"].device)
        for name, room in {**rooms, "ids": ids}.items():
            if self.frames:
                room[:, held] = old[name][:, held]
        self.rooms, self._ids = dict(rooms), ids

    def leave(self) -> None:
        """Gives up its rooms, and all that is in them."""
        self.rooms, self._ids = dict.fromkeys(self.rooms, NOTHING), NOTHING

    def stage(self, k: Tensor, v: Tensor) -> None:
        """Writes the heads' part of the pending chunk, `[B, F, P, H, D]`, behind the history."""
        own = slice(len(self.frames), len(self.frames) + k.shape[1])
        self.heads.take_into(self._raw[:, own], k)
        self.heads.take_into(self._v[:, own], v)

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
        self.frames, self._new, self._most = kept.frames, 0, None

    def staged(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values of the pending chunk."""
        own = slice(len(self.frames), len(self.frames) + chunk)
        return self._raw[:, own], self._v[:, own]

    def see(self, positions: Sequence[float], encode: Encode) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of the history and the pending chunk."""
        k, v = self._raw[:, : len(positions)], self._v[:, : len(positions)]
        return encode(k, positions).to(v.dtype), v

    def see_some(
        self, rows: Sequence[int], positions: Sequence[float], encode: Encode, which: int | None
    ) -> tuple[Tensor, Tensor]:
        """The same for a part of the history.

        Args:
            rows: of the history.
            positions: of the rows and the pending chunk.
            encode: rotates keys to positions.
            which: number in the chunk of the frame that looks, for a role that reads per query frame.
        """
        own = range(len(self.frames), len(self.frames) + len(positions) - len(rows))
        k, v = (gathered(x, [*rows, *own]) for x in (self._raw, self._v))
        return encode(k, positions).to(v.dtype), v

    def numbers(self) -> list[list[int]]:
        """Frames held, per sample, as the host counts them. Reads the device."""
        held: list[list[int]] = [] if self._ids is NOTHING else self._ids[:, : len(self.frames)].tolist()
        return held

    def lay(self, which: int | None, tokens: Tokens) -> Tokens:
        """Where what is seen beside whole frames lies, by query frame `which`; here: where it was."""
        return tokens

    @staticmethod
    def settle(banks: Iterable[Bank]) -> None:
        """Puts in order what all banks of a layer hold, once they have begun a chunk."""

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [*self.rooms.values(), self._ids]

    def clear(self) -> None:
        """Forgets everything but the rooms."""
        self.frames = ()
        self._new, self._most = 0, None

    def _keys(self, rows: Sequence[int]) -> Tensor:
        """Keys of neighbouring history rows, `[B, rows, P, Hr, D]`."""
        return self._raw[:, rows[0] : rows[-1] + 1]


def gathered(room: Tensor, slots: Sequence[int]) -> Tensor:
    """A copy of some slots that lies head by head, `[B, n, P, Hr, D]`."""
    batch, _, tokens, heads, dim = room.shape
    (copy,) = cut([Size(len(slots), heads)], (batch, tokens, dim), room)
    first = 0
    for start, stop in runs(slots):
        copy[:, first : first + stop - start] = room[:, start:stop]
        first += stop - start
    return copy


def slide(buffer: Tensor, moves: Sequence[tuple[int, int]]) -> None:
    """Copies rows to slots that are never later, `(slot, row)` ascending."""
    for slot, row, count in _blocks(moves):
        buffer[:, slot : slot + count] = buffer[:, row : row + count]


def known_moves(kept: Selection) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """`(slot, row)` of what stays without having been chosen by content: before what was, and after it."""
    after = len(kept.before) + (0 if kept.chosen is None else kept.chosen.shape[1])
    return list(enumerate(kept.before)), list(enumerate(kept.after, after))


def _select(buffer: Tensor, kept: Selection) -> None:
    """Slides the selected rows to the front."""
    before, after = known_moves(kept)
    picked = None if kept.chosen is None else _pick(buffer, kept.chosen)
    slide(buffer, before)
    if picked is not None:
        buffer[:, len(before) : len(before) + picked.shape[1]] = picked
    slide(buffer, after)


def _pick(buffer: Tensor, rows: Tensor) -> Tensor:
    """Rows chosen per sample, `[B, slots, ...]` and `[B, m] -> [B, m, ...]`."""
    return torch.stack([sample.index_select(0, own) for sample, own in zip(buffer, rows, strict=True)])


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


def make_room(banks: Sequence[Bank], k: Tensor, v: Tensor) -> None:
    """Gives the banks of a layer rooms for a chunk `[B, F, P, H, D]`, if one of them has none."""
    wanted = [bank.wanted(k, v) for bank in banks]
    if wanted == [bank.slots(k, v) for bank in banks]:
        return
    if not any(bank.frames for bank in banks):  # nothing to take along: let go before there is more
        for bank in banks:
            bank.leave()
    frame = (k.shape[0], k.shape[2], k.shape[4])
    rooms: list[dict[str, Tensor]] = [{} for _ in banks]
    for name in dict.fromkeys(name for bank in banks for name in bank.rooms):
        some = [index for index, bank in enumerate(banks) if name in bank.rooms]
        sizes = [
            Size(wanted[index], len(banks[index].heads), banks[index].front(name, k.shape[2]))
            for index in some
        ]
        for index, room in zip(some, cut(sizes, frame, k if name == "raw" else v), strict=True):
            rooms[index][name] = room
    for bank, own in zip(banks, rooms, strict=True):
        bank.move(own)
