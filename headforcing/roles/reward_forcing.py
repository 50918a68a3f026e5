"""The role of Reward Forcing (arXiv:2512.04678): EMA-Sink, first frames that evicted frames are mixed into.

From its released code. When a chunk evicts as many frames as the sink has, keys before RoPE and values of the
sink become `alpha` times themselves plus `1 - alpha` times those of the evicted frames, patch by patch. When
it evicts another number, the first frames of the sink are replaced by the first evicted ones. The released
configuration has chunks and a sink of three frames. The sums are taken in the dtype of the cache: in bfloat16
0.999 times a number is rounded back to it, so that little is mixed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headforcing.errors import RoleError
from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import CompressedHistory, Past, Tokens
from headforcing.roles.windows import check_sink
from headforcing.types import Encode, FrameTable


@dataclass(frozen=True)
class EmaSink(HeadRole):
    """A sink that evicted frames are mixed into, and the last frames, `window` in all.

    While everything fits, the sink is the first frames of the video. After a prompt switch that drops frames
    it begins anew, as the first frames that are stored when the next ones are evicted.

    Attributes:
        window: frames attended to, current chunk and sink included.
        sink: frames of the sink.
        alpha: weight of the sink when evicted frames are mixed into it.
    """

    window: int = 9
    sink: int = 3
    alpha: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "compact":
            raise RoleError(f"{self}: a mixed sink has no time of its own, use positions='compact'")
        if not self.sink:
            raise RoleError(f"{self} has no sink: use SlidingWindow")
        if not isinstance(self.alpha, float) or not 0.0 <= self.alpha <= 1.0:
            raise RoleError(f"{self}: expected an alpha from 0.0 to 1.0, got {self.alpha!r}")

    def capacity(self, chunk: int) -> int | None:
        return self.window - chunk

    def retain(self, table: FrameTable) -> Sequence[int]:
        room = self.window - table.chunk
        if len(table) + table.gap <= room:
            return range(len(table))
        return range(len(table) - room + self.sink, len(table))

    def fit(self, window: int, chunk: int) -> HeadRole:
        check_sink(self, self.window, self.sink, chunk)
        return super().fit(window, chunk)

    def compressed(self) -> CompressedHistory | None:
        return MixedSink(self)


class MixedSink(CompressedHistory):
    """The sink from the first eviction on; before, its frames are stored like others."""

    def __init__(self, role: EmaSink) -> None:
        self.role = role
        self._sink: Tokens | None = None  # keys before RoPE, and values, [B, sink, P, Hr, D]

    def max_tokens(self, patches: int) -> int:
        return self.role.sink * patches

    @property
    def gap(self) -> int:
        return 0 if self._sink is None else self.role.sink

    def evicted(self, past: Past) -> None:
        """Mixes all of them in at once; the first time, the frames of the sink come first."""
        k, v = past.k, past.v
        if self._sink is None:
            (sink_k, k), (sink_v, v) = (x.tensor_split((self.role.sink,), dim=1) for x in (k, v))
            self._sink = sink_k, sink_v
        self._sink = self._mixed(self._sink[0], k), self._mixed(self._sink[1], v)

    def view(self, start: int, query: int | None, encode: Encode) -> Tokens | None:
        if self._sink is None:
            return None
        k, v = self._sink
        return encode(k, tuple(range(self.role.sink))).to(v.dtype).flatten(1, 2), v.flatten(1, 2)

    def tensors(self) -> Iterator[Tensor]:
        yield from self._sink or ()

    def clear(self) -> None:
        self._sink = None

    def _mixed(self, sink: Tensor, evicted: Tensor) -> Tensor:
        """The sink after frames were evicted, `[B, n, P, Hr, D]`."""
        if evicted.shape[1] == self.role.sink:
            return self.role.alpha * sink + (1 - self.role.alpha) * evicted
        count = min(evicted.shape[1], self.role.sink)
        return torch.cat([evicted[:, :count], sink[:, count:]], 1)
