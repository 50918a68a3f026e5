"""How much of the attention behind the sink falls on the own chunk and the frame before it.

The statistic of Forcing-KV (arXiv:2605.09681), from its released script: the mass on the last four key
frames, own chunk of three included, over the mass on all but the first frame. Its released head file
says that three sink frames were left out, so that number is a setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nan

from headforcing.errors import OptionError
from headforcing.measure.metrics import Look, Metric


class MassRatio(Metric):
    """`ratio` `[B, H]` in [0, 1]; NaN where all frames behind the sink are recent.

    Args:
        recent: frames before the own chunk that count as recent.
        sink: first frames of the video that count as sink.

    Raises:
        OptionError: a number is not a count of frames.
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
