"""Key-value stores: the only owners of state. One per layer and stream.

A store holds the pending chunk apart from the history. Denoising rewrites the pending chunk as often
as it likes; eviction and every choice happen once, when a later chunk begins. So a noisy pass leaves
no trace, and nothing has to be rolled back.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from headforcing.errors import StreamError
from headforcing.roles.base import HeadRole, visible_rows
from headforcing.roles.compressed import Tokens, nbytes
from headforcing.roles.windows import check_pin
from headforcing.stores.bank import Bank, make_room
from headforcing.stores.checks import FiniteCheck, Shape, check_order
from headforcing.stores.compressed import Digests
from headforcing.stores.scenes import Scenes
from headforcing.stores.switch import Shifts, Switch
from headforcing.types import Chunk, Edit, Encode, Grid, Heads, KVView, Phase, Pin


class KVStore(ABC):
    """The memory of one layer on one stream.

    The order of chunks, the shape of what comes and the health of what is committed are checked here,
    before anything changes. A bank per role holds the tensors; a subclass says which kind.

    Args:
        heads: which heads have which role; together every head of the layer, each once.
        window: frames the model was trained on.
        layer: number of the layer, for messages.

    Attributes:
        digests: what roles keep beside whole frames.
        scenes: marks, and the prompt switch that was asked for.
        turned: whether a chunk began behind a prompt switch, and its prompt was not projected since.
    """

    def __init__(self, heads: Mapping[HeadRole, Heads], *, window: int, layer: int) -> None:
        self.heads = dict(heads)
        self.turned = False
        self.digests = Digests(heads, layer)
        self._banks = {role: self.new_bank(role, own) for role, own in heads.items()}
        self.scenes = Scenes(self._banks)
        self._shifts = Shifts()
        self._grid: Grid | None = None
        self._queries: Tensor | None = None
        self.window = window
        self.layer = layer
        self._pending: range | None = None
        self._shape: Shape | None = None
        self._end = 0
        self._moving = False
        self._checked = False
        self._finite: FiniteCheck | None = None

    @abstractmethod
    def new_bank(self, role: HeadRole, heads: Heads) -> Bank:
        """An empty bank for the frames of a role; the one question that a store answers."""

    def write(self, chunk: Chunk) -> None:
        """Takes one pass over a chunk.

        The pending chunk again: overwrites it; where it rolls, also with another length. The next chunk, also
        one that begins inside the pending one: commits the frames before it first. Frame 0 again after
        growth, or with another shape: begins a new video.

        Raises:
            ChunkOrderError: a frame would be skipped or lost, or the chunk lies in the past.
            StreamShapeError: batch, tokens, heads or dtype differ from the chunks before.
            NonFiniteKVError: the pending chunk holds NaN or infinity; it stays pending.
            WindowError: a role has no room beside so long a chunk.
        """
        if self._moving:
            raise StreamError(
                f"layer {self.layer}: an earlier commit was interrupted while frames moved, so this "
                "history is lost: reset the stream and start the video again"
            )
        shape = Shape.of(chunk)
        self.digests.check(chunk, self._grid if chunk.start else None)
        again = self.scenes.rerun(self.frames_so_far)
        if again is None and self._rolls(chunk):
            shape.check_follows(self._shape, self.layer)
            self._check_roles(shape.frames)
            self._make_room(chunk.frames)
        elif self._begins_video(chunk, shape) and again != 0:
            self._check_roles(shape.frames, pinned=False)
            self.reset()
            self._make_room(chunk.frames)
        elif chunk.frames == self._pending and again != chunk.start:
            shape.check_follows(self._shape, self.layer)
        else:
            check_order(chunk.frames, self._pending, self._end, again, self.layer)
            shape.check_follows(self._shape, self.layer)
            if not (again == 0 or chunk.alone) or shape.frames > self.window:
                self._check_roles(shape.frames)
            self._commit_before(chunk.start)
            if again is None:  # roles choose first: a switch keeps what they would have kept
                self._make_room(chunk.frames)
            if self._turn(chunk.start):
                self._make_room(chunk.frames)
        self._stage(chunk)
        self._shifts.note(chunk.start, chunk.shift)
        self._pending, self._shape, self._checked = chunk.frames, shape, False
        self._grid, self._queries = chunk.grid, chunk.q if self.digests.want_queries else None

    def commit(self) -> None:
        """Ends the pending chunk, as if the next chunk of the same length began.

        Raises:
            NonFiniteKVError: the pending chunk holds NaN or infinity; it stays pending.
        """
        if self._pending is not None:
            end, chunk = self._pending.stop, len(self._pending)
            self._commit_before(end)
            self._make_room(range(end, end + chunk))

    def check(self) -> None:
        """Looks at the pending chunk before it is committed; one reduction per role, once per pass.

        On an accelerator the verdict is read one chunk later, without a sync.

        Raises:
            NonFiniteKVError: the pending chunk holds NaN or infinity; it stays pending.
        """
        if self._pending is None or self._checked:
            return
        late, self._finite = self._finite, None
        if late is not None:
            late.check("were committed before this was known: reset the stream")
        flag = FiniteCheck.of(
            [(bank.heads, *bank.staged(len(self._pending))) for bank in self._banks.values()],
            self.layer,
            self._pending,
        )
        if flag.ready:
            flag.check("were not committed: write the chunk again, or reset the stream")
        else:
            self._finite = flag
        self._checked = True

    def reset(self) -> None:
        """Forgets everything; buffers may stay for the next video."""
        self._pending = None
        self._end = 0
        self._moving = self.turned = False
        self._finite = None
        self.digests.clear()
        self.scenes.clear()
        self._shifts.clear()
        for bank in self._banks.values():
            bank.clear()

    def edit(self, edit: Edit, start: int) -> None:
        """Follows what the host did to its cache before it runs frames from `start` on.

        Raises:
            StreamError: the cache was emptied, and frames come that do not replace the pending chunk.
        """
        if isinstance(edit, Pin):
            self.scenes.hold(edit)
            return
        if self._pending is None or self._pending.start < start:
            what = "no chunk is" if self._pending is None else f"frames from {self._pending.start} on are not"
            raise StreamError(
                f"layer {self.layer}: the host emptied its cache before frame {start}, but {what} run again: "
                "reset the stream with handle.reset()"
            )
        pending = self._whole(self._pending, self._grid)
        self._moving = True
        self.scenes.empty(edit.keep, start)
        self.digests.clear()
        self._stage(pending)
        self._moving = False

    def check_switch(self, switch: Switch) -> None:
        """Looks whether a prompt switch is possible now.

        Raises:
            StreamError: there is no such mark, or frames that come again cannot be told from others.
        """
        self.scenes.check(switch, self.frames_so_far, self.layer)

    @property
    def pending(self) -> range | None:
        """Frames of the chunk that is still being written."""
        return self._pending

    @property
    def committed(self) -> int:
        """Frames of the video that are finished, kept or not."""
        return self._end

    @property
    def frames_so_far(self) -> int:
        """Frames of the video so far, the pending chunk included."""
        return self._end if self._pending is None else self._pending.stop

    def view(self, role: HeadRole, phase: Phase, encode: Encode, query: int | None = None) -> KVView:
        """What the heads of `role` see now, own chunk last, keys rotated by `encode`.

        Args:
            role: whose heads.
            phase: which pass this is.
            encode: rotates keys to positions.
            query: the frame that looks, for a role that reads per query frame.
        """
        bank = self._banks[role]
        own, asked = self._inside(role, query)
        table = bank.table(0, own, self.scenes.pin(role))
        rows = tuple(visible_rows(role, dataclasses.replace(table, query=asked), phase))
        frames = (*(bank.frames[row] for row in rows), *own)
        positions = self._place(role, frames, len(own), asked)
        if asked is None and len(rows) == len(bank.frames):
            k, v = bank.see(positions, encode)
        else:
            k, v = bank.see_some(rows, positions, encode, None if asked is None else asked - own.start)
        return KVView(self.scenes.outside(role, frames), positions, k, v)

    def frames(self, role: HeadRole) -> list[list[int]]:
        """History held for `role`, per sample, oldest first. Reads the device: for people, not paths."""
        return self._banks[role].numbers()

    def view_digest(self, role: HeadRole, encode: Encode, query: int | None = None) -> Tokens | None:
        """What the heads of `role` see beside whole frames: rotated keys, values `[B, m, Hr, D]`.

        Asked for behind `view`; the next chunk may take the same memory.

        Args:
            role: whose heads.
            encode: rotates keys to positions.
            query: the frame that looks, for a role that reads per query frame.
        """
        own, asked = self._inside(role, query)
        which = None if asked is None else asked - own.start
        return self.digests.see(
            role, own.start, asked, encode, functools.partial(self._banks[role].lay, which)
        )

    def nbytes(self) -> int:
        """Bytes held, counted from the memory behind the tensors; marks included."""
        queries = [] if self._queries is None else [self._queries]
        held = [tensor for bank in self._banks.values() for tensor in bank.tensors()]
        return nbytes([*held, *self.digests.tensors(), *self.scenes.tensors(), *queries])

    def _rolls(self, chunk: Chunk) -> bool:
        """Whether it is the pending chunk with other frames behind its first ones."""
        pending = self._pending
        if not chunk.rolling or pending is None:
            return False
        return pending.start == chunk.start and pending.stop != chunk.frames.stop

    def _begins_video(self, chunk: Chunk, shape: Shape) -> bool:
        if chunk.start != 0:
            return False
        return self._pending is None or self._pending != chunk.frames or self._shape != shape

    def _inside(self, role: HeadRole, query: int | None) -> tuple[range, int | None]:
        """The pending chunk and a query frame, as a role counts them."""
        assert self._pending is not None
        own = self.scenes.inside(role, self._pending)
        return own, None if query is None else own.start + query - self._pending.start

    def _place(
        self, role: HeadRole, frames: Sequence[int | None], chunk: int, query: int | None = None
    ) -> tuple[float, ...]:
        """Where the frames of a view sit, the `chunk` own ones last, all as the role counts them."""
        more = {} if query is None else {"query": query}
        if (digest := self.digests.get(role)) is not None:
            more["gap"] = digest.gap
        placed = role.positions_of(frames, chunk, self.window, **more)
        return self._shifts.moved(placed, self.scenes.outside(role, frames), role.positions)

    def _turn(self, start: int) -> bool:
        """Marks and switches that were asked for, because a chunk begins at `start`; whether frames went."""
        self._moving = True
        switch = self.scenes.turn(start)
        went = switch is not None and switch.mode != "continue"
        if went:
            self.digests.clear()
        self._end, self.turned = start, self.turned or switch is not None
        self._moving = False
        return went

    def _check_roles(self, chunk: int, pinned: bool = True) -> None:
        for role in self.heads:
            role.fit(self.window, chunk)
            if pinned and (pin := self.scenes.pin(role)) is not None:
                check_pin(role, pin, chunk)

    def _commit_before(self, start: int) -> None:
        if self._pending is None:
            return
        if start <= self._pending.start:  # it runs again as a whole
            self._pending = None
            return
        self.check()
        done = range(self._pending.start, start)
        self._moving = True
        for role, bank in self._banks.items():
            inside = self.scenes.inside(role, done)
            if self.digests.get(role) is not None:
                q = None if self._queries is None else bank.heads.take(self._queries)
                k, v = bank.staged(len(self._pending))
                self.digests.add(role, inside, Chunk(done.start, k, v, self._grid, q))
            bank.append(done, inside)
        self.digests.refresh()
        self._end, self._pending = start, None
        self._moving = False

    def _make_room(self, own: range) -> None:
        self._moving = True
        self.digests.refresh()
        for role, bank in self._banks.items():
            inside = self.scenes.inside(role, own)
            table, kept = bank.choose(inside, self.scenes.pin(role))
            self.digests.evicted(role, kept, table, bank.rows, self._grid)
            bank.begin(table, kept, inside, functools.partial(self._place, role))
            digest = self.digests.get(role)
            if digest is not None and digest.gap:
                bank.tighten(len(own))
        bank.settle(self._banks.values())
        self._moving = False

    def _stage(self, chunk: Chunk) -> None:
        """Overwrites the pending chunk."""
        make_room([*self._banks.values()], chunk.k, chunk.v)
        for bank in self._banks.values():
            bank.stage(chunk.k, chunk.v)

    def _whole(self, pending: range, grid: Grid | None) -> Chunk:
        """A copy of the pending chunk, all heads together."""
        parts = [(bank.heads, *bank.staged(len(pending))) for bank in self._banks.values()]
        count = sum(len(heads) for heads, _, _ in parts)
        k, v = (x.new_empty(*x.shape[:3], count, x.shape[4]) for x in parts[0][1:])
        for heads, part_k, part_v in parts:
            heads.put(k, part_k)
            heads.put(v, part_v)
        return Chunk(pending.start, k, v, grid)
