"""A bank that remembers what it rotated: at most once per chunk, whatever the number of passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from headforcing.errors import RoleError
from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import CompressedHistory, Tokens
from headforcing.stores.bank import NOTHING, Bank, Place, gathered, known_moves, slide
from headforcing.stores.buffers import Size, cut, front
from headforcing.stores.scenes import Kept
from headforcing.types import Encode, FrameTable, Heads, Selection, runs

_Plan = tuple[tuple[int, ...], tuple[float, ...]]
_Rooms = tuple[Tensor, Tensor]


@dataclass
class _Copy:
    """Rooms for a part of what is kept, and what lies in them: rows of the history, and where they sit."""

    k: Tensor
    v: Tensor
    plan: _Plan | None = None


class RotatedBank(Bank):
    """See the module.

    One more room, `rotated`, holds the keys where they sit now. A role that reads per query frame has none:
    its keys sit elsewhere for every frame that looks. What it sees, like what any role sees that attends to
    a part, is copied once per chunk. Only time shows how much that is: a copy that had to grow is put beside
    the others of the layer when the next chunk begins; see `side_by_side`.

    What a role keeps beside whole frames lies in front of them, wherever they are seen.

    Args:
        role: whose slots these are.
        heads: those that have the role.
        digest: what it keeps beside whole frames.
    """

    def __init__(self, role: HeadRole, heads: Heads, digest: CompressedHistory | None = None) -> None:
        super().__init__(role, heads, digest)
        if "query" not in role.depends_on:
            self.rooms["rotated"] = NOTHING
        self._placed: list[float | None] = []  # where each rotated slot sits; None: not rotated yet
        self._copies: dict[int | None, _Copy] = {}  # by the query frame of the chunk
        self._looked_at: dict[int | None, _Rooms] = {}  # likewise: where keys and values were seen last

    def begin(self, table: FrameTable, kept: Selection, own: range, place: Place) -> None:
        """Keeps what was chosen, and of its rotated keys those that sit where they sat."""
        super().begin(table, kept, own, place)
        self._settle(kept, self._next_positions(own, place))
        self._forget_copies()
        self._looked_at.clear()

    def move(self, rooms: Mapping[str, Tensor]) -> None:
        """Moves into other rooms; copies are made anew."""
        super().move(rooms)
        held = self._placed[: len(self.frames)]
        self._placed = [*held, *[None] * (self._v.shape[1] - len(held))]
        self._copies.clear()
        self._looked_at.clear()

    def leave(self) -> None:
        """Gives up its rooms and copies."""
        super().leave()
        self._placed = []
        self._copies.clear()
        self._looked_at.clear()

    def front(self, name: str, tokens: int) -> int:
        """As many as the role may ever see beside whole frames, where they are seen."""
        return 0 if self.digest is None or name == "raw" else self.digest.max_tokens(tokens) or 0

    def lay(self, which: int | None, tokens: Tokens) -> Tokens:
        """Copies what is seen beside whole frames to where it lies in front of them.

        Args:
            which: number in the chunk of the frame that looks, for a role that reads per query frame.
            tokens: rotated keys, and values; they stay where they are if nobody knew how many would come.

        Raises:
            RoleError: they are more than the role said there would ever be.
        """
        if self.digest is None or which not in self._looked_at:
            return tokens
        rooms, count, patches = self._looked_at[which], tokens[0].shape[1], self._v.shape[2]
        most = self.digest.max_tokens(patches)
        if most is None:
            return tokens
        if count > most:
            raise RoleError(
                f"{self.role} shows {count} tokens beside frames of {patches}, but said that there would be "
                f"at most {most}: mend {type(self.digest).__name__}.max_tokens"
            )
        k, v = (front(room, count).copy_(x) for room, x in zip(rooms, tokens, strict=True))
        return k, v

    def stage(self, k: Tensor, v: Tensor) -> None:
        """Writes the pending chunk, which is not rotated yet."""
        super().stage(k, v)
        first, count = len(self.frames), k.shape[1]
        self._placed[first : first + count] = [None] * count

    def put(self, kept: Kept) -> None:
        """Makes this the history, none of it rotated yet."""
        super().put(kept)
        self._placed = [None] * len(self._placed)
        self._forget_copies()

    def see(self, positions: Sequence[float], encode: Encode) -> tuple[Tensor, Tensor]:
        """Rotated keys and values; only keys that do not sit there yet are rotated."""
        rotated = self.rooms["rotated"]
        stale = [slot for slot, place in enumerate(positions) if self._placed[slot] != place]
        for first, last in runs(stale):
            rotated[:, first:last] = encode(self._raw[:, first:last], positions[first:last])
            self._placed[first:last] = positions[first:last]
        self._looked_at[None] = rotated, self._v
        return rotated[:, : len(positions)], self._v[:, : len(positions)]

    def see_some(
        self, rows: Sequence[int], positions: Sequence[float], encode: Encode, which: int | None
    ) -> tuple[Tensor, Tensor]:
        """The same for a part of the history, copied once until another part or place is asked for."""
        held, slots = len(rows), len(positions)
        own_k, own_v = self.staged(slots - held)
        copy, plan = self._copy(which, slots), (tuple(rows), tuple(positions))
        if copy.plan != plan:
            copy.plan = None
            if rows:
                copy.k[:, :held] = encode(gathered(self._raw, rows), positions[:held])
                copy.v[:, :held] = gathered(self._v, rows)
            copy.plan = plan
        copy.k[:, held:slots] = encode(own_k, positions[held:])
        copy.v[:, held:slots] = own_v
        self._looked_at[which] = copy.k, copy.v
        return copy.k[:, :slots], copy.v[:, :slots]

    def tensors(self) -> list[Tensor]:
        """What it holds, copies for looking included."""
        copies = [tensor for copy in self._copies.values() for tensor in (copy.k, copy.v)]
        return [*super().tensors(), *copies]

    def clear(self) -> None:
        """Forgets everything but rooms and copies' memory."""
        super().clear()
        self._placed = [None] * len(self._placed)
        self._forget_copies()

    def copies(self) -> list[tuple[_Copy, Size]]:
        """The copies that were made for looking, and the size of their rooms."""
        return [(copy, self._size(copy.k.shape[1])) for copy in self._copies.values()]

    def _copy(self, which: int | None, slots: int) -> _Copy:
        """The copy for a query frame, with room for so many slots."""
        copy = self._copies.setdefault(which, _Copy(NOTHING, NOTHING))
        if copy.k is NOTHING or copy.k.shape[1] < slots:
            batch, _, tokens, _, dim = self._v.shape
            copy.k, copy.v, copy.plan = NOTHING, NOTHING, None
            (copy.k,), (copy.v,) = (cut([self._size(slots)], (batch, tokens, dim), self._v) for _ in "kv")
        return copy

    def _size(self, slots: int) -> Size:
        """Of a room of a copy."""
        return Size(slots, len(self.heads), self.front("v", self._v.shape[2]))

    def _forget_copies(self) -> None:
        for copy in self._copies.values():
            copy.plan = None

    def _next_positions(self, own: range, place: Place) -> Sequence[float | None]:
        """Where the history will sit in the first pass; nowhere, for a role that sees a part of it."""
        if "query" in self.role.depends_on:
            return [None] * len(self.frames)
        if len(self.role.visible(self.table(0, own), "denoise")) < len(self.frames):
            return [None] * len(self.frames)
        return place((*self.frames, *own), len(own))

    def _settle(self, kept: Selection, positions: Sequence[float | None]) -> None:
        """Slides rotated keys along with the rows that stay, where their position stays."""
        moves = [move for part in known_moves(kept) for move in part]
        settled = [(slot, row) for slot, row in moves if self._placed[row] == positions[slot] is not None]
        self._placed = [None] * len(self._placed)
        if settled:
            slide(self.rooms["rotated"], settled)
        for slot, _ in settled:
            self._placed[slot] = positions[slot]

    @staticmethod
    def settle(banks: Iterable[Bank]) -> None:
        """Puts all copies of a layer into one piece of memory for keys, and another, alike, for values.

        Behind a chunk that needed larger ones; what lay in them is forgotten.
        """
        copies = [found for bank in banks if isinstance(bank, RotatedBank) for found in bank.copies()]
        if len({copy.k.untyped_storage() for copy, _ in copies}) < 2:
            return
        batch, _, tokens, _, dim = copies[0][0].k.shape
        like = copies[0][0].k.new_empty(0)
        for copy, _ in copies:
            copy.k = copy.v = NOTHING
        rooms = [cut([size for _, size in copies], (batch, tokens, dim), like) for _ in "kv"]
        for (copy, _), k, v in zip(copies, *rooms, strict=True):
            copy.k, copy.v, copy.plan = k, v, None
