"""Means over frames and videos, with paired bootstrap intervals.

Not `scipy.stats.bootstrap`: for the same seed it draws other resamples, so published intervals would change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def summarise(values: Tensor, first: int, last: int) -> Tensor:
    """Mean of each video over the frames `first` to `last - 1`, without NaN, `[B, T] -> [B]`."""
    return values[:, first:last].nanmean(1)


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval.

    Attributes:
        mean: over the videos that are not NaN.
        low, high: ends of the interval.
        count: number of videos that are not NaN.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(values: Tensor, n: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Percentile bootstrap of the mean over videos.

    Args:
        values: one per video, `[B]`; NaN is left out.
        n: number of resamples.
        seed: of the resampling.
        level: coverage.
    """
    known = values[~values.isnan()].double().cpu()
    if not len(known):
        return Interval(torch.nan, torch.nan, torch.nan, 0)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(known), (n, len(known)), generator=generator)
    means = known[picks].mean(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, means.new_tensor([tail, 1 - tail])).tolist()
    return Interval(float(known.mean()), low, high, len(known))


def paired_difference(values: Tensor, baseline: Tensor, n: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap of the mean difference `values - baseline`, video by video, each `[B]`."""
    return bootstrap_interval(values - baseline, n, seed)
