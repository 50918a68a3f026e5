"""What a store defines: where its tensors lie. When they move is the same for all of them.

`headforcing.stores.KVStore` says when, and what roles are told; `_inside` and `_place` are its answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from headforcing.roles.base import HeadRole
from headforcing.stores.compressed import Digests
from headforcing.stores.scenes import Kept, Scenes
from headforcing.types import Chunk, Encode, Grid, Heads, KVView, Phase


class Storage(ABC):
    """The tensors of one layer on one stream: a history per role, and the pending chunk."""

    heads: dict[HeadRole, Heads]
    scenes: Scenes
    digests: Digests
    _pending: range | None
    _grid: Grid | None

    def _whole(self, start: int, grid: Grid | None) -> Chunk:
        """A copy of the pending chunk, all heads together."""
        parts = list(self._staged())
        count = sum(len(heads) for heads in self.heads.values())
        k, v = (x.new_empty(*x.shape[:3], count, x.shape[4]) for x in parts[0][1:])
        for role, part_k, part_v in parts:
            self.heads[role].put(k, part_k)
            self.heads[role].put(v, part_v)
        return Chunk(start, k, v, grid)

    @abstractmethod
    def _inside(self, role: HeadRole, query: int | None) -> tuple[range, int | None]:
        """The pending chunk and a query frame, as a role counts them."""

    @abstractmethod
    def _place(
        self, role: HeadRole, frames: Sequence[int | None], chunk: int, query: int | None = None
    ) -> tuple[float, ...]:
        """Where the frames of a view sit, the `chunk` own ones last, all as the role counts them."""

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

    @abstractmethod
    def _tensors(self) -> Iterable[Tensor]:
        """What is held for whole frames."""

    @abstractmethod
    def _begin(self, own: range) -> None:
        """Asks every role what stays, because the chunk of the frames `own` begins."""

    @abstractmethod
    def _held(self, role: HeadRole) -> Sequence[int | None]:
        """The frames of a role's history, as the role counts them."""

    @abstractmethod
    def _take(self, role: HeadRole, rows: Sequence[int]) -> Kept:
        """Copies rows of a role's history."""

    @abstractmethod
    def _put(self, role: HeadRole, kept: Kept) -> None:
        """Makes this a role's history."""

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
