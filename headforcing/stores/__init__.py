"""Key-value stores: the only owners of state. One per layer and stream.

A store holds the pending chunk apart from the history. Denoising rewrites the pending chunk as often
as it likes; eviction and every choice happen once, when a later chunk begins. So a noisy pass leaves
no trace, and nothing has to be rolled back.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headforcing.errors import (
    ChunkOrderError,
    StreamError,
    StreamShapeError,
)
from headforcing.health import HostFlag
from headforcing.lookup import named_module
from headforcing.merge import Blocks
from headforcing.roles import HeadRole
from headforcing.types import BlockView, Chunk, Encode, Grid, Heads, KVView, Phase


class KVStore(ABC):
    """The memory of one layer on one stream.

    The order of chunks, the shape of what comes and the health of what is committed are checked here,
    before anything changes. Subclasses only hold tensors.

    Args:
        heads: which heads have which role; together every head of the layer, each once.
        window: frames the model was trained on.
        layer: number of the layer, for messages.
    """

    def __init__(self, heads: Mapping[HeadRole, Heads], *, window: int, layer: int) -> None:
        self.heads = dict(heads)
        self._blocks = {role: Blocks(role.merge) for role in heads if role.merge is not None}
        self._grid: Grid | None = None
        self.window = window
        self.layer = layer
        self._pending: range | None = None
        self._shape: _Shape | None = None
        self._end = 0
        self._moving = False
        self._checked = False
        self._finite: HostFlag | None = None

    def write(self, chunk: Chunk) -> None:
        """Takes one pass over a chunk.

        The pending chunk again: overwrites it. The next chunk, also one that begins inside the pending
        one: commits the frames before it first. Frame 0 again after growth, or with another shape:
        begins a new video.

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
        shape = _Shape.of(chunk)
        for blocks in self._blocks.values():
            blocks.check(chunk.grid, self._grid if chunk.start else None)
        if self._begins_video(chunk, shape):
            self._check_roles(shape.frames)
            self.reset()
            self._make_room(chunk.frames)
        elif chunk.frames == self._pending:
            self._check_shape(shape)
        else:
            self._check_order(chunk)
            self._check_shape(shape)
            self._check_roles(shape.frames)
            self._commit_before(chunk.start)
            self._make_room(chunk.frames)
        self._stage(chunk)
        self._pending, self._shape, self._checked = chunk.frames, shape, False
        self._grid = chunk.grid

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
        sums: list[Tensor] = []
        heads: list[int] = []
        for role, k, v in self._staged():
            sums += [x.sum(-1, dtype=torch.float32).sum((0, 1, 2)) for x in (k, v)]  # [Hr]
            heads += self.heads[role].indices * 2
        flag = HostFlag(torch.cat(sums), tuple(heads), self.layer, self._pending)
        if flag.ready:
            flag.check("were not committed: write the chunk again, or reset the stream")
        else:
            self._finite = flag
        self._checked = True

    def reset(self) -> None:
        """Forgets everything; buffers may stay for the next video."""
        self._pending = None
        self._end = 0
        self._moving = False
        self._finite = None
        for blocks in self._blocks.values():
            blocks.clear()
        self._clear()

    @property
    def pending(self) -> range | None:
        """Frames of the chunk that is still being written."""
        return self._pending

    @property
    def committed(self) -> int:
        """Frames of the video that are finished, kept or not."""
        return self._end

    @abstractmethod
    def view(self, role: HeadRole, phase: Phase, encode: Encode, query: int | None = None) -> KVView:
        """What the heads of `role` see now, own chunk last, keys rotated by `encode`.

        Args:
            role: whose heads.
            phase: which pass this is.
            encode: rotates keys to positions.
            query: the frame that looks, for a role that reads per query frame.
        """

    @abstractmethod
    def frames(self, role: HeadRole) -> list[list[int]]:
        """History held for `role`, per sample, oldest first. Reads the device: for people, not paths."""

    def view_blocks(self, role: HeadRole, query: int) -> BlockView | None:
        """What the heads of `role` see merged; keys are not rotated.

        Args:
            role: whose heads.
            query: the frame that looks.
        """
        blocks = self._blocks.get(role)
        if blocks is None or self._pending is None:
            return None
        starts = list(role.read_blocks(list(blocks.starts), self._pending.start))
        return BlockView(role.place_blocks(starts, query), *blocks.take(starts)) if starts else None

    def nbytes(self) -> int:
        """Bytes held, counted from the tensors."""
        return self._nbytes() + sum(blocks.nbytes() for blocks in self._blocks.values())

    @abstractmethod
    def _nbytes(self) -> int:
        """Bytes held for whole frames."""

    @abstractmethod
    def _begin(self, own: range) -> None:
        """Asks every role what stays, because the chunk of the frames `own` begins."""

    @abstractmethod
    def _stage(self, chunk: Chunk) -> None:
        """Overwrites the pending chunk."""

    @abstractmethod
    def _append(self, frames: range) -> None:
        """Turns the first frames of the pending chunk into history, unselected."""

    @abstractmethod
    def _staged(self) -> Iterator[tuple[HeadRole, Tensor, Tensor]]:
        """Role, keys and values of the pending chunk, `[B, F, P, Hr, D]`."""

    @abstractmethod
    def _clear(self) -> None:
        """Forgets history and pending chunk."""

    def _begins_video(self, chunk: Chunk, shape: _Shape) -> bool:
        if chunk.start != 0:
            return False
        return self._pending is None or self._pending != chunk.frames or self._shape != shape

    def _check_order(self, chunk: Chunk) -> None:
        pending = range(self._end - 1, self._end) if self._pending is None else self._pending
        if self._pending is not None and chunk.start == pending.start:
            raise ChunkOrderError(
                f"layer {self.layer}: the chunk at frame {chunk.start} comes again with "
                f"{len(chunk.frames)} frames, expected {len(pending)}: a chunk keeps its length"
            )
        if not pending.start < chunk.start <= pending.stop:
            again = "" if self._pending is None else f" (or {pending.start} again)"
            raise ChunkOrderError(
                f"layer {self.layer}: a chunk starts at frame {chunk.start}, expected {pending.stop}{again}: "
                "chunks come in order, a new video starts at frame 0"
            )
        if chunk.frames.stop < pending.stop:
            raise ChunkOrderError(
                f"layer {self.layer}: a chunk ends before frame {chunk.frames.stop}, expected at least "
                f"{pending.stop}: it overlaps the chunk before it and would lose its last frames"
            )

    def _check_shape(self, shape: _Shape) -> None:
        if self._shape is not None and not self._shape.continues(shape):
            raise StreamShapeError(
                f"layer {self.layer}: keys of this video were {self._shape}, now they are {shape}: start "
                "a new video (frame 0) to change batch, resolution, dtype or device"
            )

    def _check_roles(self, chunk: int) -> None:
        for role in self.heads:
            role.fit(self.window, chunk)

    def _commit_before(self, start: int) -> None:
        if self._pending is None:
            return
        self.check()
        done = range(self._pending.start, start)
        self._moving = True
        for role, k, v in self._staged() if self._blocks else ():
            if role in self._blocks and self._grid is not None:
                self._blocks[role].add(done, k, v, self._grid)
        self._append(done)
        self._end, self._pending = start, None
        self._moving = False

    def _make_room(self, own: range) -> None:
        self._moving = True
        self._begin(own)
        self._moving = False


@dataclass(frozen=True)
class _Shape:
    """What a chunk looks like; all but the number of frames must not change inside one video."""

    frames: int
    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device

    @classmethod
    def of(cls, chunk: Chunk) -> _Shape:
        if chunk.v.shape != chunk.k.shape:
            raise StreamShapeError(
                f"keys are {tuple(chunk.k.shape)}, values {tuple(chunk.v.shape)}: expected the same"
            )
        batch, frames, *rest = chunk.k.shape
        return cls(frames, (batch, *rest), (chunk.k.dtype, chunk.v.dtype), chunk.k.device)

    def continues(self, other: _Shape) -> bool:
        return dataclasses.replace(self, frames=other.frames) == other

    def __str__(self) -> str:
        batch, *rest = self.sizes
        return f"[{batch}, F, {', '.join(map(str, rest))}] {self.dtypes[0]} on {self.device}"


def store_class(name: str) -> type[KVStore]:
    """The store that the module `headforcing.stores.<name>` defines.

    Raises:
        OptionError: there is no such module; the message lists the folder.
    """
    module = named_module(__name__, name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, KVStore) and value.__module__ == module.__name__
    ]
    return found[0]
