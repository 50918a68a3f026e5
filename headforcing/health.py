"""Whether keys and values are numbers, told without waiting for an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headforcing.errors import NonFiniteKVError
from headforcing.types import Heads


class HostFlag:
    """Per-head sums on their way to the host; a sum that is not finite names a broken head."""

    def __init__(self, sums: Tensor, heads: tuple[int, ...], layer: int, frames: range) -> None:
        self._host = sums if sums.device.type == "cpu" else sums.to("cpu", non_blocking=True)
        self._event: Any = None
        if sums.device.type != "cpu":
            self._event = torch.Event(sums.device)
            self._event.record()
        self._heads, self._layer, self._frames = heads, layer, frames

    @classmethod
    def of(cls, staged: Sequence[tuple[Heads, Tensor, Tensor]], layer: int, frames: range) -> HostFlag:
        """Sums of the keys and values `[B, F, P, Hr, D]` of frames, one reduction per set of heads."""
        sums = [x.sum(-1, dtype=torch.float32).sum((0, 1, 2)) for _, k, v in staged for x in (k, v)]  # [Hr]
        heads = [index for own, *_ in staged for index in own.indices * 2]
        return cls(torch.cat(sums), tuple(heads), layer, frames)

    @property
    def ready(self) -> bool:
        """Whether the verdict is there without waiting."""
        return self._event is None

    def check(self, consequence: str) -> None:
        """Waits for the verdict.

        Raises:
            NonFiniteKVError: a head holds NaN or infinity.
        """
        if self._event is not None:
            self._event.synchronize()
        finite = torch.isfinite(self._host).numpy()
        broken = sorted({head for head, fine in zip(self._heads, finite, strict=True) if not fine})
        if broken:
            raise NonFiniteKVError(
                f"layer {self._layer}, heads {', '.join(map(str, broken))}: keys or values of frames "
                f"{self._frames.start}..{self._frames.stop - 1} hold NaN or infinity, and {consequence}"
            )
