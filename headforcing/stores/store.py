"""KV stores: the only owners of state. One per layer and stream.

A store keeps the pending chunk apart from the history. Denoising rewrites the pending chunk as often as it
likes; roles choose and evict once, when a later chunk begins. So a noisy pass leaves no trace, and nothing
has to be rolled back.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from headforcing.errors import StreamError
from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import Tokens, nbytes
from headforcing.roles.windows import check_pin
from headforcing.stores.bank import Bank, copied
from headforcing.stores.buffered import allocate, free_unfit, separate
from headforcing.stores.checks import FiniteCheck, FiniteGuard, Shape, begins_video, check_order, rolls
from headforcing.stores.compressed import CompressedHistories
from headforcing.stores.fork import fork_store
from headforcing.stores.placement import Placement
from headforcing.stores.rotated import share_copies
from headforcing.stores.scenes import Scenes
from headforcing.stores.shifts import Shifts
from headforcing.stores.switch import Switch
from headforcing.types import Chunk, Edit, Encode, Grid, Heads, KVView, Phase, Pin


class KVStore(ABC):
    """The memory of one layer on one stream: a bank of frames per role.

    The order of chunks, their shape and whether they are finite are checked here, before anything changes. A
    subclass answers one question: which bank holds the frames of a role.

    Args:
        heads: which heads have which role; together every head of the layer, each once.
        window: frames the model was trained on.
        layer: number of the layer, for messages.

    Attributes:
        compressed: the compressed histories of the roles.
        scenes: marks, and the prompt switch that was requested.
        prompt_pending: a switch took effect and cross-attention has not projected the new prompt yet.
        unfinished: whether the first chunk of a window of several chunks still gets its clean pass.
    """

    def __init__(self, heads: Mapping[HeadRole, Heads], *, window: int, layer: int) -> None:
        self.heads = dict(heads)
        self.window = window
        self.layer = layer
        self.prompt_pending = self.unfinished = False
        self.compressed = CompressedHistories(heads, layer)
        self._banks = {role: self.new_bank(role, own) for role, own in heads.items()}
        self.scenes = Scenes(self._banks, self.compressed)
        self._shifts = Shifts()
        self._placement = Placement(self._banks, self.scenes, self.compressed, self._shifts, window)
        self._grid: Grid | None = None
        self._queries: Tensor | None = None
        self._pending: range | None = None
        self._again: Chunk | None = None  # a pass over the pending chunk that is not finished
        self._shape: Shape | None = None
        self._end = 0
        self._apart = False
        self._finite = FiniteGuard(self._banks.values(), layer)

    @abstractmethod
    def new_bank(self, role: HeadRole, heads: Heads) -> Bank:
        """The bank, still empty, that holds the frames of `role`; asked once per role.

        `self.compressed.get(role)` is the role's compressed history.
        """

    def write(self, chunk: Chunk) -> None:
        """Takes one pass over a chunk.

        The pending chunk again: overwrites it; if it rolls, also with another length. The next chunk, also
        one that begins inside the pending one: commits the frames before it first. Frame 0 again after
        growth, or with another shape: begins a new video.

        Raises:
            ChunkOrderError: a frame would be skipped or lost, or the chunk lies in the past.
            StreamShapeError: batch, tokens, heads or dtype differ from the chunks before.
            NonFiniteKVError: the pending chunk holds NaN or infinity; it stays pending.
            WindowError: a role with so long a chunk exceeds the window.
        """
        shape = Shape.of(chunk)
        self.compressed.check(chunk, self._grid if chunk.start else None)
        if self._comes_again(chunk, shape):
            self._again = chunk  # from here on `settle` finishes it, now or after an interrupt
            self.settle()
            return
        again = self.scenes.rerun(self.frames_so_far)
        if self.begins_video(chunk):
            self._check_roles(shape.frames, pinned=False)
            self.reset()
            free_unfit(self._banks.values(), chunk.k, chunk.v)
        self.settle()
        after = fork_store(self)
        after._take(chunk, shape, again)
        self._take_over(after)

    def _take(self, chunk: Chunk, shape: Shape, again: int | None) -> None:
        """Does to a fork what `write` says; `again`: first of the recomputed frames, if any."""
        before = self._pending
        if again is None and rolls(chunk, self._pending):
            shape.check_follows(self._shape, self.layer)
            self._check_roles(shape.frames)
            self._begin(chunk.frames)
        elif self._pending is None and chunk.start == 0 and again != 0:
            self._begin(chunk.frames)
        elif chunk.frames == self._pending and again != chunk.start:
            shape.check_follows(self._shape, self.layer)
        else:
            check_order(chunk.frames, self._pending, self._end, again, self.layer)
            shape.check_follows(self._shape, self.layer)
            if not (again == 0 or chunk.alone) or shape.frames > self.window:
                self._check_roles(shape.frames)
            if self.scenes.due:
                self._set_apart()
            self._commit_before(chunk.start)
            if again is None:  # roles choose first: a switch keeps what they would have kept
                self._begin(chunk.frames)
            if self._apply_switch(chunk.start):
                self._begin(chunk.frames)
        allocate(self._banks.values(), chunk.k, chunk.v)
        self._stage(chunk)
        self._shifts.note(chunk.start, chunk.shift)
        self.unfinished = chunk.rolling and (before is None or chunk.frames.stop > before.stop)
        self._pending, self._shape = chunk.frames, shape
        self._finite.wrote(chunk)
        self._grid, self._queries = chunk.grid, chunk.q if self.compressed.want_queries else None

    def _comes_again(self, chunk: Chunk, shape: Shape) -> bool:
        """Whether it is the pending chunk once more, so that nothing is decided anew."""
        same = chunk.frames == self._pending and shape == self._shape and chunk.grid == self._grid
        return same and self.scenes.rerun(self.frames_so_far) is None and self._shifts.still(chunk.shift)

    def commit(self) -> None:
        """Ends the pending chunk, as if the next chunk of the same length began.

        Raises:
            NonFiniteKVError: the pending chunk holds NaN or infinity; it stays pending.
        """
        if self._pending is not None:
            self.settle()
            after, end, chunk = fork_store(self), self._pending.stop, len(self._pending)
            after._commit_before(end)
            after._begin(range(end, end + chunk))
            self._take_over(after)

    def begins_video(self, chunk: Chunk) -> bool:
        """Whether `write` of this chunk would forget the video so far."""
        return begins_video(chunk, self._pending, self._shape, self.scenes.rerun(self.frames_so_far))

    def check(self, wait: bool = False) -> None:
        """Checks the pending chunk before it is committed; one reduction per role for keys, one for values.

        On an accelerator the result is read one chunk later, without a host wait.

        Args:
            wait: whether to wait for it now.

        Raises:
            NonFiniteKVError: the pending chunk holds NaN or infinity; it stays pending. Or a committed one
                did: this history is broken.
        """
        self.settle()
        self._finite.check(wait)

    def unreported(self) -> list[FiniteCheck]:
        """Checks of this video whose results were not reported, that of the pending chunk included."""
        self.settle()
        return self._finite.unreported()

    def reset(self) -> None:
        """Forgets everything; buffers may stay for the next video."""
        self._pending = self._again = None  # first: from now on nothing but a new video can begin
        self._end, self.prompt_pending, self.unfinished = 0, False, False
        self._placement.forget()
        parts: list[Any] = [self._finite, self.compressed, self.scenes, self._shifts, *self._banks.values()]
        for part in parts:
            part.clear()

    def edit(self, edit: Edit, start: int) -> None:
        """Follows what the base model did to its KV cache before it runs frames from `start` on.

        Raises:
            StreamError: the cache was emptied, and frames come that do not replace the pending chunk.
        """
        if isinstance(edit, Pin):
            self.scenes.hold(edit)
            self._placement.forget()
            return
        if self._pending is None or self._pending.start < start:
            what = "no chunk is" if self._pending is None else f"frames from {self._pending.start} on are not"
            raise StreamError(
                f"layer {self.layer}: the base model emptied its KV cache before frame {start}, but {what} "
                "recomputed: reset the stream with handle.reset()"
            )
        self.settle()
        after, pending = fork_store(self), copied(self._banks.values(), self._pending.start)
        after._set_apart()
        after.scenes.empty(edit.keep, start, self._grid)
        allocate(after._banks.values(), pending.k, pending.v)
        after._stage(pending)
        self._take_over(after)

    def settle(self) -> None:
        """Finishes what an earlier call was interrupted in, so that the store is as if it were not."""
        for bank in self._banks.values():
            bank.settle()
        if (chunk := self._again) is not None:
            self._finite.wrote(chunk)
            self._stage(chunk)
            for bank in self._banks.values():
                bank.settle()
            self.unfinished, self._queries = False, chunk.q if self.compressed.want_queries else None
            self._again = None

    def check_switch(self, switch: Switch, due: Sequence[str] = ()) -> None:
        """Checks that a prompt switch is possible now; `due`: marks that will be made before it.

        Raises:
            StreamError: there is no such mark, or recomputed frames cannot be told from others.
        """
        self.scenes.check(switch, self.frames_so_far, self.layer, due)

    @property
    def pending(self) -> range | None:
        """Frames of the chunk that is still being written."""
        return self._pending

    @property
    def interrupted(self) -> bool:
        """Whether the last pass over the pending chunk was interrupted here; `settle` finishes it."""
        return self._again is not None

    @property
    def committed(self) -> int:
        """Frames of the video that are finished, stored or not."""
        return self._end

    @property
    def frames_so_far(self) -> int:
        """Frames of the video so far, the pending chunk included."""
        return self._end if self._pending is None else self._pending.stop

    def view(self, role: HeadRole, phase: Phase, encode: Encode, query: int | None = None) -> KVView:
        """The frames that the heads of `role` attend to now, current chunk last, keys rotated by `encode`.

        Args:
            role: whose heads.
            phase: which pass this is.
            encode: rotates keys to positions.
            query: the query frame, for a role that reads per query frame.
        """
        assert self._pending is not None
        bank, own, plan_of = self._banks[role], self._pending, self._placement.plan
        if query == own.start:  # the first one of a role that reads per query frame: all of them follow
            each = [plan_of(role, own, phase, one) for one in own]
            bank.prepare([(one.rows, one.positions) for one in each], encode)
        plan, number = plan_of(role, own, phase, query), None if query is None else query - own.start
        return KVView(plan.frames, plan.positions, *bank.view(plan.rows, plan.positions, encode, number))

    def view_compressed(self, role: HeadRole, encode: Encode, query: int | None = None) -> Tokens | None:
        """Compressed tokens that the heads of `role` attend to: rotated keys, values `[B, m, Hr, D]`.

        Called after `view`, with its arguments; the next chunk may overwrite the memory.
        """
        assert self._pending is not None
        own, query = self._placement.inside(role, self._pending, query)
        prepend = functools.partial(self._banks[role].prepend, None if query is None else query - own.start)
        return self.compressed.view(role, own.start, query, encode, prepend)

    def frames(self, role: HeadRole) -> list[list[int]]:
        """Frames stored for `role`, per sample, oldest first. Reads the device: for people, not paths."""
        self.settle()
        return self._banks[role].numbers()

    def nbytes(self) -> int:
        """Bytes stored, counted from the memory behind the tensors; marks included."""
        held = [tensor for bank in self._banks.values() for tensor in bank.tensors()]
        held += [] if self._queries is None else [self._queries]
        return nbytes([*held, *self.compressed.tensors(), *self.scenes.tensors()])

    def _check_roles(self, chunk: int, pinned: bool = True) -> None:
        for role in self.heads:
            role.fit(self.window, chunk)
            if pinned and (pin := self.scenes.pin(role)) is not None:
                check_pin(role, pin, chunk)

    def _commit_before(self, start: int) -> None:
        """Turns the pending frames before `start` into history, unselected."""
        if self._pending is None:
            return
        if start <= self._pending.start:  # all of it is recomputed
            self._pending = None
            self._finite.drop()
            return
        self.check()
        done = range(self._pending.start, start)
        for role, bank in self._banks.items():
            inside = self.scenes.inside(role, done)
            if self.compressed.get(role) is not None:
                q = None if self._queries is None else bank.heads.take(self._queries)
                self.compressed.add(role, inside, Chunk(done.start, *bank.staged(), self._grid, q))
            bank.append(done, inside)
        self.compressed.forget_views()
        self._end, self._pending = start, None
        self._finite.commit()

    def _begin(self, chunk: range) -> None:
        """Every role chooses what it keeps, and evicts the rest, because the frames `chunk` begin."""
        self.compressed.forget_views()
        for role, bank in self._banks.items():
            inside = self.scenes.inside(role, chunk)
            table, kept = bank.choose(inside, self.scenes.pin(role), self.compressed.gap(role))
            self.compressed.evicted(role, kept, table, bank.rows, self._grid)
            bank.begin(table, kept, inside, functools.partial(self._placement.positions, role))
        share_copies(self._banks.values())
        if self._apart:
            self.settle()

    def _apply_switch(self, start: int) -> bool:
        """Makes requested marks and switches before frame `start`; returns whether frames were dropped."""
        switch = self.scenes.apply_switch(start, self._grid)
        self._end, self.prompt_pending = start, self.prompt_pending or switch is not None
        return switch is not None and switch.mode != "continue"

    def _set_apart(self) -> None:
        """Copies the buffers of a fork, which then may read what it wrote."""
        separate(self._banks.values())
        self.settle()
        self._apart = True

    def _take_over(self, after: KVStore) -> None:
        """Becomes what its fork is, in one step that nothing interrupts, then does the moves."""
        after._apart = False
        self.__dict__.update(after.__dict__)
        self.settle()

    def _stage(self, chunk: Chunk) -> None:
        """Overwrites the pending chunk, for which there is room."""
        for bank in self._banks.values():
            bank.stage(chunk.k, chunk.v)
