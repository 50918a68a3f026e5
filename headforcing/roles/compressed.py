"""Compressed tokens: what a role keeps of frames that it evicts, merged, averaged or selected.

One `CompressedHistory` belongs to one role in one layer of one stream. It receives frames when they are
committed and when the role evicts them. Its tokens are attended to in front of those of whole frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headforcing.types import Encode, Grid


@dataclass(frozen=True, eq=False)
class Past:
    """Frames that are committed or evicted, in memory that the next chunk overwrites: copy what is kept.

    Attributes:
        frames: their numbers since the scene began, ascending; `None` where chosen by content.
        k: keys before RoPE, `[B, n, P, Hr, D]`.
        v: values, likewise.
        grid: height and width of a frame in patches, where known.
        layer: number of the layer.
        shared: anything that the layers of one stream share for the role, by name; a layer has its own
            where the stream is not known.
        q: queries before RoPE of frames just committed, where `wants_queries` asks for them.
    """

    frames: Sequence[int | None]
    k: Tensor
    v: Tensor
    grid: Grid | None
    layer: int
    shared: MutableMapping[str, Any] = field(repr=False)
    q: Tensor | None = None


Tokens = tuple[Tensor, Tensor]
"""Rotated keys, and values, `[B, m, Hr, D]`."""


def wide_dtype(x: Tensor) -> torch.dtype:
    """What means and products of keys are taken in: float32, or the dtype of the tensor if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


class CompressedHistory(ABC):
    """The compressed tokens of one role in one layer of one stream.

    A store changes a copy of it, with copies of its lists, dicts and deques, and drops the copy if the chunk
    fails. So replace tensors, write none in place.
    """

    patch: int = 1
    """Side of the squares of patches that are merged; above 1, the adapter has to rotate merged patches."""
    wants_queries: bool = False
    """Whether tokens are selected by the queries of committed frames."""

    def check(self, grid: Grid | None) -> None:  # noqa: B027 - optional on purpose
        """Refuses frames of a grid before anything changes; a grid that changes is refused anyway."""

    def add(self, past: Past) -> None:  # noqa: B027 - optional on purpose
        """Receives frames just committed, in order."""

    def evicted(self, past: Past) -> None:  # noqa: B027 - optional on purpose
        """Receives whole frames that the role evicts now, in order."""

    def restarted(self, past: Past) -> None:  # noqa: B027 - optional on purpose
        """Receives, after `clear`, the frames that a new scene begins with because they were kept."""

    def max_tokens(self, patches: int) -> int | None:
        """Most tokens it ever shows, of frames of so many patches; default `None`, unknown.

        A store may reserve memory for so many in front of whole frames. Where the number is unknown, tokens
        and frames are concatenated in every pass.
        """
        return None

    @property
    def gap(self) -> int:
        """RoPE positions that its tokens take right after the first frames, where positions are compact."""
        return 0

    @abstractmethod
    def view(self, start: int, query: int | None, encode: Encode) -> Tokens | None:
        """The tokens seen by a chunk that begins at `start`, or by one query frame of it."""

    @abstractmethod
    def clear(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """All tensors it holds."""


def nbytes(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece counted once and as a whole, whatever of it is used."""
    return sum(storage.nbytes() for storage in {tensor.untyped_storage() for tensor in tensors})
