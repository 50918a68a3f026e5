"""Attention on the current chunk and the frame before it, as a share of that on all frames after the sink.

The statistic of Forcing-KV (arXiv:2605.09681), from its released script: the mass on the last four key
frames, including the current chunk of three, over the mass on all but the first frame. According to its
released head file three sink frames were excluded, so that number is a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nan

from headforcing.errors import OptionError
from headforcing.measure.metrics import Look, Metric


class MassRatio(Metric):
    """`ratio` `[B, H]` in [0, 1]; NaN if all frames after the sink are recent.

    Args:
        recent: frames before the current chunk that count as recent.
        sink: first frames of the video that count as sink.

    Raises:
        OptionError: a number is not a number of frames.
    """

    name = "mass_ratio"

    def __init__(self, recent: int = 1, sink: int = 1) -> None:
        for count in (recent, sink):
            if type(count) is not int or count < 0:
                raise OptionError(f"recent is {recent!r}, sink {sink!r}: expected numbers of frames >= 0")
        self.recent, self.sink = recent, sink

    def settings(self) -> dict[str, Any]:
        """See `Metric.settings`."""
        return {"recent": self.recent, "sink": self.sink}

    def measure(self, look: Look) -> Mapping[str, Tensor]:
        """See `Metric.measure`."""
        share, early = look.share, look.start - self.recent
        rest = [column for column, frame in enumerate(look.frames) if not 0 <= frame < self.sink]
        near = [column for column in rest if look.frames[column] >= early]
        if near == rest:
            return {"ratio": share.new_full(share.shape[:2], nan)}
        return {"ratio": share[..., near].sum(-1) / share[..., rest].sum(-1)}


METRIC = MassRatio
