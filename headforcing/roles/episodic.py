"""Which frames an episodic memory keeps when more want in than fit.

Head Forcing documents "dynamic episodic updates" (arXiv:2605.14487, abstract); that they are driven
by novelty is third-party knowledge, and every rule below is our choice.

Novelty is measured on keys before RoPE, so that position does not leak in: the similarity of two
frames is the mean cosine of their co-located keys over tokens and heads. A rule is asked once per
frame that joins, and names the frame that leaves. All of it runs on the device: nothing is read back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headforcing.errors import RoleError


def similarity(keys: Tensor) -> Tensor:
    """Mean co-located cosine of every pair of frames, `[B, m, P, Hr, D] -> [B, m, m]` in float32."""
    spots = keys.flatten(2, 3).transpose(1, 2).contiguous().float()  # [B, P*Hr, m, D]
    dots = spots @ spots.mT  # [B, P*Hr, m, m]
    scale = dots.diagonal(dim1=-2, dim2=-1).clamp_min(1e-24).rsqrt()
    return (dots * scale[..., :, None] * scale[..., None, :]).mean(1)


@dataclass(frozen=True)
class EpisodicUpdate(ABC):
    """The rule that decides who leaves a full episodic memory."""

    reads_keys: ClassVar[bool] = True
    """Whether the rule looks at keys; a rule that does not works on frame numbers alone."""

    @abstractmethod
    def choose(self, keys: Tensor, stored: int, places: int) -> Tensor:
        """Rows that stay, ascending, `[B, places]`.

        Args:
            keys: keys before RoPE of the stored frames and of those that want in, oldest first,
                `[B, m, P, Hr, D]`.
            stored: how many of the `m` rows are in the memory already.
            places: frames the memory holds.
        """


@dataclass(frozen=True)
class _OneByOne(EpisodicUpdate):
    """Rules that admit candidates in time order and drop one frame for each that is too many."""

    def choose(self, keys: Tensor, stored: int, places: int) -> Tensor:
        alike = similarity(keys)
        batch, rows = alike.shape[:2]
        row = torch.arange(rows, device=alike.device).expand(batch, rows)
        alive = row < stored
        for candidate in range(stored, rows):
            alive = alive | (row == candidate)
            if candidate >= places:
                alive = alive & (row != self._victim(alike, alive, candidate)[:, None])
        return _rows_of(alive, places)

    @abstractmethod
    def _victim(self, alike: Tensor, alive: Tensor, candidate: int) -> Tensor:
        """The row that leaves, `[B]`, of the rows `alive [B, m]` with similarities `[B, m, m]`."""


@dataclass(frozen=True)
class MaxMin(_OneByOne):
    """Keeps the frames that are least alike: of the two most similar frames, one leaves.

    It is the one whose next-nearest frame is nearer; on a tie the newer. No threshold.
    """

    def _victim(self, alike: Tensor, alive: Tensor, candidate: int) -> Tensor:
        rows = alike.shape[1]
        both = alive[:, :, None] & alive[:, None, :]
        other = ~torch.eye(rows, dtype=torch.bool, device=alike.device)
        alike = alike.masked_fill(~(both & other), -torch.inf)
        pairs = alike.masked_fill(~other.triu(), -torch.inf).flatten(1)  # older row first
        nearest = _first(pairs == pairs.amax(1, keepdim=True))
        older, newer = nearest // rows, nearest % rows
        column = torch.arange(rows, device=alike.device)
        apart = alike.masked_fill(_crosses(column, older, newer), -torch.inf)
        second = apart.amax(2)  # next-nearest similarity of every row
        return torch.where(_at(second, older) > _at(second, newer), older, newer)


@dataclass(frozen=True)
class ThresholdFifo(_OneByOne):
    """Admits a frame that is new enough and drops the oldest for it; otherwise drops the frame.

    The rule of Context Forcing's slow memory (arXiv:2602.06028: similarity below 0.95), except that
    a memory that is not full admits every frame, so that its size never depends on content.

    Attributes:
        novelty: smallest `1 - similarity` to the nearest stored frame that counts as new.
    """

    novelty: float = 0.05

    def __post_init__(self) -> None:
        if not isinstance(self.novelty, float) or not 0.0 <= self.novelty <= 2.0:
            raise RoleError(f"novelty is {self.novelty!r}: expected a float in [0, 2]")

    def _victim(self, alike: Tensor, alive: Tensor, candidate: int) -> Tensor:
        stored = alive.clone()
        stored[:, candidate] = False
        nearest = alike[:, candidate].masked_fill(~stored, -torch.inf).amax(1)
        oldest = _first(stored)
        return torch.where(nearest < 1 - self.novelty, oldest, torch.full_like(oldest, candidate))


@dataclass(frozen=True)
class Uniform(EpisodicUpdate):
    """Keeps frames spread evenly over time, whatever they show: the control for novelty rules."""

    reads_keys: ClassVar[bool] = False

    def choose(self, keys: Tensor, stored: int, places: int) -> Tensor:
        """Not a rule on keys; see `spread`."""
        raise RoleError("Uniform chooses by frame number: call spread(frames, stored, places)")

    def spread(self, frames: Sequence[int], stored: int, places: int) -> tuple[int, ...]:
        """Rows that stay: for a frame too many, the inner frame in the tightest place leaves.

        Ties go to the newer frame. The oldest and the newest hold the ends of the covered time.

        Args:
            frames: numbers of the stored frames and of those that want in, ascending.
            stored: how many of them are in the memory already.
            places: frames the memory holds.
        """
        rows = list(range(stored))
        for candidate in range(stored, len(frames)):
            rows.append(candidate)
            if len(rows) > places:
                rows.pop(_tightest([frames[row] for row in rows]))
        return tuple(rows)


def _tightest(frames: Sequence[int]) -> int:
    """Index of the last inner frame whose neighbours are nearest to each other."""
    gaps = [after - before for before, after in zip(frames, frames[2:], strict=False)]
    return max((i + 1 for i, gap in enumerate(gaps) if gap == min(gaps)), default=len(frames) - 1)


def _first(mask: Tensor) -> Tensor:
    """Index of the first true column, `[B, m] -> [B]`: the same on every device, unlike argmax."""
    column = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, column, mask.shape[1]).amin(1)


def _rows_of(alive: Tensor, places: int) -> Tensor:
    """The `places` true columns of every row in ascending order, `[B, m] -> [B, places]`."""
    column = torch.arange(alive.shape[1], device=alive.device)
    return torch.where(alive, column, alive.shape[1]).sort(1).values[:, :places]


def _at(x: Tensor, row: Tensor) -> Tensor:
    return x.gather(1, row[:, None])[:, 0]


def _crosses(column: Tensor, older: Tensor, newer: Tensor) -> Tensor:
    """True where a pair is `(older, newer)` or `(newer, older)`, `[B, m, m]`."""
    is_older = column == older[:, None]
    is_newer = column == newer[:, None]
    one_way = is_older[:, :, None] & is_newer[:, None, :]
    return one_way | one_way.mT
