"""A stand-in for StreamDiffusionV2 (arXiv:2511.07399).

Chunks take turns in the slots of a full cache. Two things differ from the original, so that videos can be
compared bit for bit: it attends to its slots by age, and every pass over a chunk writes the same slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headforcing.integrations.streamdiffusionv2 import StreamDiffusionV2
from headforcing.roles import HeadRole, SlidingWindow
from tests.hosts.standin import TOKENS, Cache, CountingHost, StandInAttention


class StreamAttention(StandInAttention):
    """A ring of slots, behind first frames that are never evicted.

    Attributes:
        sink_size: how many these are, but for those of the first chunk.
        adapt_sink_thr: above -1, first frames are replaced by what they show; left out.
    """

    sink_size: int = 3
    adapt_sink_thr: float = -1

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: Any,
        kv_cache: Cache | None = None,
        current_start: Tensor | int = 0,
        current_end: Tensor | int = 0,
        causal_rope_cache: Any = None,
    ) -> Tensor:
        """Attends from `x [B, L, C]` to the cache, which it writes; to itself where there is none."""
        q, k, v = self.projected(x, freqs, int(current_start))
        if kv_cache is not None:
            size, end = kv_cache["k"].shape[1], int(current_start) + x.shape[1]
            slots = self.slots(size, end, x.shape[1])
            for name, new in (("k", k), ("v", v)):
                kv_cache[name][:, slots[-x.shape[1] :]] = new.to(kv_cache[name].dtype)
            kv_cache["global_end_index"].fill_(end)
            kv_cache["local_end_index"].fill_(min(end, size))
            k, v = (kv_cache[name][:, slots] for name in ("k", "v"))
        return self.attended(q, k, v)

    def slots(self, size: int, end: int, new: int) -> Tensor:
        """Slots of all tokens that are stored when `new` ones up to `end` come, by age."""
        sink = max(new, self.sink_size * TOKENS // new * new)
        number, turns = (end - sink) // new, (size - sink) // new
        ring = [sink + each % turns * new for each in range(max(0, number - turns), number)]
        return torch.cat([torch.arange(min(sink, end)), *(torch.arange(at, at + new) for at in ring)])


class StreamDiffusionV2Host(CountingHost):
    """A stand-in with StreamDiffusionV2's interface: three first frames, and two chunks that take turns."""

    adapter = StreamDiffusionV2(num_kv_cache=9)
    window = 21
    memory: HeadRole = SlidingWindow(9, 3, positions="absolute")
    attention = StreamAttention

    def told(self, start: int, end: int, clean: bool) -> dict[str, Any]:
        """See `StandInHost.told`; one element, whatever the batch."""
        factors = [(end - start, torch.ones(1, dtype=torch.complex128))]
        return {
            "current_start": torch.tensor([start]),
            "current_end": torch.tensor([end]),
            "causal_rope_cache": factors,
        }
