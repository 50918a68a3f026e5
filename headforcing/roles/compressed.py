"""What a role keeps of the past beside whole frames: merged, averaged or cut to pieces.

A digest belongs to one role in one layer of one stream. It is shown frames when they are committed and when
the role lets them go, and answers with tokens that its heads see before those of whole frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from headforcing.types import Encode, Grid


@dataclass(frozen=True)
class Past:
    """Frames that a digest is shown, in memory that the next chunk overwrites: it copies what it keeps.

    Attributes:
        frames: their numbers since the scene began, ascending; `None` where chosen by content.
        k: keys before RoPE, `[B, n, P, Hr, D]`.
        v: values, likewise.
        grid: height and width of a frame in patches, where known.
        layer: number of the layer.
        notes: what the layers of one timeline share for the role, by name; theirs alone where they are not
            told of each other.
        q: queries before RoPE of frames that were committed just now, for digests that want them.
    """

    frames: Sequence[int | None]
    k: Tensor
    v: Tensor
    grid: Grid | None
    layer: int
    notes: MutableMapping[str, Any] = field(repr=False, compare=False)
    q: Tensor | None = None


Tokens = tuple[Tensor, Tensor]
"""Rotated keys, and values, `[B, m, Hr, D]`."""


class Digest(ABC):
    """See the module."""

    patch: int = 1
    """Side of the squares of patches that are merged; more than 1 asks more of an adapter."""
    wants_queries: bool = False
    """Whether it chooses by the queries of committed frames."""

    def check(self, grid: Grid | None) -> None:  # noqa: B027 - optional on purpose
        """Refuses frames of a grid before anything changes; another than before is refused anyway."""

    def add(self, past: Past) -> None:  # noqa: B027 - optional on purpose
        """Takes frames that were committed just now, in order."""

    def let_go(self, past: Past) -> None:  # noqa: B027 - optional on purpose
        """Takes frames that the role kept whole and drops now, in order."""

    def most(self, patches: int) -> int | None:
        """Most tokens that it ever shows, of frames of so many patches; default `None`, nobody knows.

        A store may keep a place for so many in front of whole frames. Where nobody knows, both are put
        together in every pass.
        """
        return None

    @property
    def places(self) -> int:
        """Temporal positions it takes between whole frames, for roles that leave room; default none."""
        return 0

    @abstractmethod
    def view(self, start: int, query: int | None, encode: Encode) -> Tokens | None:
        """What is seen by a chunk that begins at `start`, or by one query frame of it."""

    @abstractmethod
    def clear(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """What it holds."""


def nbytes(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece counted once and as a whole, whatever of it is used."""
    return sum(storage.nbytes() for storage in {tensor.untyped_storage() for tensor in tensors})
