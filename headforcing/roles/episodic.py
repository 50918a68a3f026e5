"""Update rules of the role `Memory`: which frame leaves a full episodic memory.

Head Forcing has "dynamic episodic updates" (arXiv:2605.14487, abstract); that novelty drives them is
third-party knowledge, and every rule here is our choice.

The similarity of two frames is the mean cosine of co-located keys over tokens and heads, before RoPE, so
that it does not depend on positions. Frames join one by one, and for each that is too many the rule evicts
one. All of it runs on the device, without a synchronisation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headforcing.errors import RoleError
from headforcing.roles.compressed import wide_dtype


def similarity(keys: Tensor) -> Tensor:
    """Mean co-located cosine of every pair of frames, `[B, m, P, Hr, D] -> [B, m, m]` in float32.

    Never NaN, so that a rule chooses rows that exist: whether keys are finite is known later.
    """
    spots = keys.flatten(2, 3).transpose(1, 2).contiguous()  # [B, P*Hr, m, D]
    spots = spots.to(wide_dtype(spots))
    largest = torch.linalg.vector_norm(spots, torch.inf, -1, keepdim=True)
    spots = (spots / largest.clamp_min(torch.finfo(largest.dtype).tiny)).float()  # squares do not overflow
    dots = spots @ spots.mT  # [B, P*Hr, m, m]
    scale = dots.diagonal(dim1=-2, dim2=-1).clamp_min(1e-24).rsqrt()
    cosines: Tensor = dots * scale[..., :, None] * scale[..., None, :]
    return cosines.nan_to_num(0).mean(1)


@dataclass(frozen=True)
class EpisodicUpdate(ABC):
    """The rule that decides which frame leaves a full episodic memory."""

    reads_keys: ClassVar[bool] = True
    """Whether the rule reads keys; otherwise frame numbers are enough."""

    @abstractmethod
    def choose(self, keys: Tensor, stored: int, capacity: int) -> Tensor:
        """Rows that stay, ascending, `[B, capacity]`.

        Args:
            keys: keys before RoPE of the stored frames, then of the candidates, oldest first,
                `[B, m, P, Hr, D]`.
            stored: how many of the `m` frames are stored already.
            capacity: frames the memory can store.
        """


@dataclass(frozen=True)
class MaxMin(EpisodicUpdate):
    """Keeps the frames that are least alike: of the two most similar frames, one leaves.

    It is the one whose next-nearest frame is nearer; on a tie the newer. No threshold.
    """

    def choose(self, keys: Tensor, stored: int, capacity: int) -> Tensor:
        alike = similarity(keys)
        alike = torch.maximum(alike, alike.mT)  # which may be rounded in two ways
        batch, rows = alike.shape[:2]
        alike.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        stays = torch.ones(batch, rows, dtype=torch.bool, device=alike.device)
        for candidate in range(max(stored, capacity), rows):
            seen = alike[:, : candidate + 1, : candidate + 1]
            # The first one: on a tie the older pair, and of a pair the older frame.
            nearest = seen.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :1]
            pair = torch.cat([nearest // (candidate + 1), nearest % (candidate + 1)], 1)
            second = seen.topk(2, 2).values[..., 1].gather(1, pair)  # similarity of the next-nearest frame
            older, newer = pair[:, :1], pair[:, 1:]
            victim = torch.where(second[:, :1] > second[:, 1:], older, newer)
            stays.scatter_(1, victim, False)
            alike.scatter_(1, victim[:, None].expand(batch, 1, rows), -torch.inf)
            alike.scatter_(2, victim[:, None].expand(batch, rows, 1), -torch.inf)
        return _rows_of(stays, capacity)


@dataclass(frozen=True)
class ThresholdFifo(EpisodicUpdate):
    """Admits a frame that is new enough and evicts the oldest for it; otherwise evicts the new frame.

    The rule of Context Forcing's slow memory (arXiv:2602.06028: similarity below 0.95), but a memory that
    is not full admits every frame, so that its size does not depend on content.

    Attributes:
        novelty: smallest `1 - similarity` to the nearest stored frame that counts as new.
    """

    novelty: float = 0.05

    def __post_init__(self) -> None:
        if not isinstance(self.novelty, float) or not 0.0 <= self.novelty <= 2.0:
            raise RoleError(f"novelty is {self.novelty!r}: expected a float in [0, 2]")

    def choose(self, keys: Tensor, stored: int, capacity: int) -> Tensor:
        alike = similarity(keys)
        row = torch.arange(alike.shape[1], device=alike.device)
        stays = (row < stored).expand(alike.shape[:2])
        for candidate in range(stored, len(row)):
            stays = stays | (row == candidate)
            if candidate >= capacity:
                stays = stays & (row != self._victim(alike, stays, candidate)[:, None])
        return _rows_of(stays, capacity)

    def _victim(self, alike: Tensor, alive: Tensor, candidate: int) -> Tensor:
        """The row that leaves, `[B]`, of the rows `alive [B, m]` with similarities `[B, m, m]`."""
        stored = alive.clone()
        stored[:, candidate] = False
        nearest = alike[:, candidate].masked_fill(~stored, -torch.inf).amax(1)
        oldest = _first(stored)
        return torch.where(nearest < 1 - self.novelty, oldest, torch.full_like(oldest, candidate))


@dataclass(frozen=True)
class Uniform(EpisodicUpdate):
    """Keeps frames spread evenly over time, whatever they show: the control for novelty rules."""

    reads_keys: ClassVar[bool] = False

    def choose(self, keys: Tensor, stored: int, capacity: int) -> Tensor:
        """Not a rule on keys; see `spread`."""
        raise RoleError("Uniform chooses by frame number: call spread(frames, stored, capacity)")

    def spread(self, frames: Sequence[int], stored: int, capacity: int) -> tuple[int, ...]:
        """Rows that stay: of one too many, the inner frame whose neighbours are nearest is evicted.

        On a tie the newer one. The oldest and the newest frame stay, as the ends of the covered time; where
        only one frame fits, the oldest.

        Args:
            frames: numbers of the stored frames, then of the candidates, ascending.
            stored: how many of them are stored already.
            capacity: frames the memory can store.
        """
        rows = list(range(stored))
        for candidate in range(stored, len(frames)):
            rows.append(candidate)
            if len(rows) > capacity:
                rows.pop(_tightest([frames[row] for row in rows]))
        return tuple(rows)


def _tightest(frames: Sequence[int]) -> int:
    """Index of the last inner frame whose neighbours are nearest to each other; without any, the last."""
    gaps = [after - before for before, after in zip(frames, frames[2:], strict=False)]
    return max((i + 1 for i, gap in enumerate(gaps) if gap == min(gaps)), default=len(frames) - 1)


def _first(mask: Tensor) -> Tensor:
    """Index of the first true column, `[B, m] -> [B]`: the same on every device, unlike argmax."""
    column = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, column, mask.shape[1]).amin(1)


def _rows_of(alive: Tensor, capacity: int) -> Tensor:
    """The `capacity` true columns of every row in ascending order, `[B, m] -> [B, capacity]`."""
    column = torch.arange(alive.shape[1], device=alive.device)
    return torch.where(alive, column, alive.shape[1]).sort(1).values[:, :capacity]
