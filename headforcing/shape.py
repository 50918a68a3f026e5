"""What a chunk looks like, and whether the next one can follow it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from headforcing.errors import StreamShapeError
from headforcing.types import Chunk


@dataclass(frozen=True)
class Shape:
    """What a chunk looks like; all but the number of frames must not change inside one video."""

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
        """Looks whether they are alike but for the number of frames.

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
