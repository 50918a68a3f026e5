"""The role of MemRoPE (arXiv:2603.12513): first frames, two running averages, last frames.

From its released code: a window of 12 frames has 3 first ones, a slow and a fast running average of evicted
frames, the last ones, and the current chunk, all at neighbouring positions. An average has one key and one
value per head: the mean over all patches of the frames that are evicted together, repeated at every patch.
Our choice: averages are stored in float32 (of float64 keys in float64), there in the dtype of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headforcing.errors import RoleError, WindowError
from headforcing.roles.base import HeadRole, ends
from headforcing.roles.compressed import CompressedHistory, Past, Tokens, wide_dtype
from headforcing.types import Encode, FrameTable

AVERAGES = 2
"""The slow one, then the fast one; each takes one frame of the window."""


@dataclass(frozen=True)
class Averaging(HeadRole):
    """The first `sink` frames, two averages of evicted ones, and the last frames, `window` in all.

    While everything fits, nothing is averaged. At the first eviction the two frames right after the sink make
    room for the averages and are lost, as in the released code; so also at the first one after a prompt
    switch that drops the averages.

    Attributes:
        window: frames attended to, current chunk and averages included.
        sink: first frames of the video.
        slow: weight of new frames in the slow average.
        fast: their weight in the fast one.
    """

    window: int = 12
    sink: int = 3
    slow: float = 0.01
    fast: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "compact":
            raise RoleError(f"{self}: averages have no time of their own, use positions='compact'")
        for weight in (self.slow, self.fast):
            if not isinstance(weight, float) or not 0.0 < weight <= 1.0:
                raise RoleError(f"{self}: expected weights above 0.0, at most 1.0, got {weight!r}")

    def capacity(self, chunk: int) -> int | None:
        return self.window - chunk

    def retain(self, table: FrameTable) -> Sequence[int]:
        room = self.window - table.chunk
        if len(table) + table.gap <= room:
            return range(len(table))
        return ends(table, self.sink, room - AVERAGES - self.sink)

    def fit(self, window: int, chunk: int) -> HeadRole:
        least = self.sink + AVERAGES + chunk
        if self.window < least:
            raise WindowError(
                f"{self} has no room for its sink, {AVERAGES} averages and a chunk of {chunk} frames: give "
                f"it a window of at least {least}"
            )
        return super().fit(window, chunk)

    def compressed(self) -> CompressedHistory | None:
        return Averages(self)


class Averages(CompressedHistory):
    """The slow and the fast average of the frames that a role evicts."""

    def __init__(self, role: Averaging) -> None:
        self.role = role
        self._both: Tokens | None = None  # [B, 2, Hr, D] in float32 or wider, slow and fast
        self._kinds: tuple[torch.dtype, torch.dtype] | None = None
        self._patches = 0

    def max_tokens(self, patches: int) -> int:
        return AVERAGES * patches

    @property
    def gap(self) -> int:
        return 0 if self._both is None else AVERAGES

    def evicted(self, past: Past) -> None:
        """Averages all of them at once."""
        lost = AVERAGES if self._both is None else 0
        k, v = past.k[:, lost:], past.v[:, lost:]
        old = (None, None) if self._both is None else self._both
        self._both = self._averaged(old[0], k), self._averaged(old[1], v)
        self._kinds, self._patches = (k.dtype, v.dtype), k.shape[2]

    def view(self, start: int, query: int | None, encode: Encode) -> Tokens | None:
        if self._both is None or self._kinds is None:
            return None
        k, v = (
            x.to(kind)[:, :, None].expand(-1, -1, self._patches, -1, -1)
            for x, kind in zip(self._both, self._kinds, strict=True)
        )
        positions = range(self.role.sink, self.role.sink + AVERAGES)
        return encode(k, tuple(positions)).to(v.dtype).flatten(1, 2), v.flatten(1, 2)

    def tensors(self) -> Iterator[Tensor]:
        yield from self._both or ()

    def clear(self) -> None:
        self._both = None

    def _averaged(self, held: Tensor | None, x: Tensor) -> Tensor:
        """Both averages `[B, 2, Hr, D]`, updated by frames `[B, n, P, Hr, D]`."""
        mean = x.mean((1, 2), dtype=wide_dtype(x))
        mean = mean[:, None].expand(-1, AVERAGES, -1, -1)
        if held is None:
            return mean.clone()
        weights = (self.role.slow, self.role.fast)
        return torch.stack([held[:, at].lerp(mean[:, at], weight) for at, weight in enumerate(weights)], 1)
