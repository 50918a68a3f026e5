"""Checks before a store changes: does a chunk follow the one before, does it begin a video, is it finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headforcing.errors import ChunkOrderError, NonFiniteKVError, StreamShapeError
from headforcing.stores.bank import Bank
from headforcing.types import Chunk


@dataclass(frozen=True)
class Shape:
    """The shape of a chunk; all but the number of frames must not change inside one video."""

    frames: int
    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device

    @classmethod
    def of(cls, chunk: Chunk) -> Shape:
        """The shape of a chunk.

        Raises:
            StreamShapeError: its keys and values differ.
        """
        if chunk.v.shape != chunk.k.shape:
            raise StreamShapeError(
                f"keys are {tuple(chunk.k.shape)}, values {tuple(chunk.v.shape)}: expected the same"
            )
        batch, frames, *rest = chunk.k.shape
        return cls(frames, (batch, *rest), (chunk.k.dtype, chunk.v.dtype), chunk.k.device)

    def check_follows(self, before: Shape | None, layer: int) -> None:
        """Checks that both are alike but for the number of frames.

        Raises:
            StreamShapeError: they are not.
        """
        if before is not None and dataclasses.replace(before, frames=self.frames) != self:
            raise StreamShapeError(
                f"layer {layer}: keys of this video were {before}, now they are {self}: start a new video "
                "(frame 0) to change batch, resolution, dtype or device"
            )

    def __str__(self) -> str:
        batch, *rest = self.sizes
        return f"[{batch}, F, {', '.join(map(str, rest))}] {self.dtypes[0]} on {self.device}"


def rolls(chunk: Chunk, pending: range | None) -> bool:
    """Whether it is the pending chunk with another number of frames."""
    if not chunk.rolling or pending is None:
        return False
    return pending.start == chunk.start and pending.stop != chunk.frames.stop


def begins_video(chunk: Chunk, shape: Shape, pending: range | None, before: Shape | None) -> bool:
    """Whether it begins at frame 0 and is not the pending chunk, of shape `before`, again."""
    if chunk.start != 0:
        return False
    return pending is None or pending != chunk.frames or before != shape


def check_order(frames: range, pending: range | None, end: int, again: int | None, layer: int) -> None:
    """Checks the frames of a chunk that is not the pending one again.

    Args:
        frames: of the chunk that begins.
        pending: of the chunk before it, if it is not committed yet.
        end: frames committed.
        again: the first of the recomputed frames, if a prompt switch announced them.
        layer: for the message.

    Raises:
        ChunkOrderError: a frame would be skipped or lost, or the chunk lies in the past.
    """
    if again is not None:
        if frames.start != again:
            raise ChunkOrderError(
                f"layer {layer}: a chunk starts at frame {frames.start}, expected {again}: a prompt switch "
                "with mode 'recache' announced that the frames from there on are recomputed"
            )
        return
    before = range(end - 1, end) if pending is None else pending
    if pending is not None and frames.start == before.start:
        raise ChunkOrderError(
            f"layer {layer}: the chunk at frame {frames.start} comes again with {len(frames)} frames, "
            f"expected {len(before)}: a chunk keeps its length"
        )
    if not before.start < frames.start <= before.stop:
        or_again = "" if pending is None else f" (or {before.start} again)"
        raise ChunkOrderError(
            f"layer {layer}: a chunk starts at frame {frames.start}, expected {before.stop}{or_again}: "
            "chunks come in order, a new video starts at frame 0"
        )
    if frames.stop < before.stop:
        raise ChunkOrderError(
            f"layer {layer}: a chunk ends before frame {frames.stop}, expected at least {before.stop}: "
            "it overlaps the chunk before it and would lose its last frames"
        )


class FiniteCheck:
    """Sums per head on their way to the CPU; a sum that is not finite reveals a broken head."""

    def __init__(self, sums: Tensor, heads: tuple[int, ...], layer: int, frames: range) -> None:
        waits = sums.device.type not in ("cpu", "meta")
        self._sums = sums.to("cpu", non_blocking=True) if waits else sums
        self._event: Any = None
        if waits:
            self._event = torch.Event(sums.device)
            self._event.record()
        self._heads, self._layer, self._frames = heads, layer, frames

    @classmethod
    def of(cls, banks: Iterable[Bank], layer: int, frames: range) -> FiniteCheck:
        """Sums of the keys and values of the pending chunk, `frames`; one reduction per bank."""
        sums: list[Tensor] = []
        heads: tuple[int, ...] = ()
        for bank in banks:
            sums += [x.sum(-1, dtype=torch.float32).sum((0, 1, 2)) for x in bank.staged()]  # [Hr]
            heads += bank.heads.indices * 2
        return cls(torch.cat(sums), heads, layer, frames)

    @property
    def ready(self) -> bool:
        """Whether the result is there without waiting."""
        return self._event is None

    def check(self, consequence: str) -> None:
        """Waits for the result.

        Raises:
            NonFiniteKVError: a head holds NaN or infinity.
        """
        if self._event is not None:
            self._event.synchronize()
        if self._sums.is_meta:  # a shape without numbers
            return
        finite = torch.isfinite(self._sums).numpy()
        broken = sorted({head for head, fine in zip(self._heads, finite, strict=True) if not fine})
        if broken:
            raise NonFiniteKVError(
                f"layer {self._layer}, heads {', '.join(map(str, broken))}: keys or values of frames "
                f"{self._frames.start}..{self._frames.stop - 1} hold NaN or infinity, and {consequence}"
            )


def check_finite(
    banks: Iterable[Bank], layer: int, frames: range, late: FiniteCheck | None
) -> FiniteCheck | None:
    """Checks the pending chunk, `frames`, and the one before it if its result was not there yet.

    Returns:
        A check whose result is not there yet: on an accelerator it is read one chunk later, without a sync.

    Raises:
        NonFiniteKVError: a head holds NaN or infinity.
    """
    if late is not None:
        late.check("were committed before this was known: reset the stream")
    now = FiniteCheck.of(banks, layer, frames)
    if not now.ready:
        return now
    now.check("were not committed: write the chunk again, or reset the stream")
    return None
