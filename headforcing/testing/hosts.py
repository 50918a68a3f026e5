"""The hosts on which the adapters of this repository sit the conformance kit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headforcing.demo.camera import VIEW
from headforcing.demo.model import DemoModel
from headforcing.demo.words import PROMPT_WORDS, WORDS
from headforcing.roles import Full, HeadRole, SlidingWindow
from headforcing.testing import Caches, Rig
from headforcing.testing.host import Host
from headforcing.testing.standins import (
    CHANNELS,
    DIM,
    HEAD_DIM,
    HEADS,
    LAYERS,
    TOKENS,
    CausVidAttention,
    InfinityRopeAttention,
    LongLiveAttention,
    StandInAttention,
    StandInModel,
    turned,
)


class SelfForcingHost(Host):
    """The demo model, which has Self Forcing's interface, with a window of nine frames and a sink.

    Attributes:
        sink: first frames that are never evicted.
    """

    chunk, frames, dense, window, single = 3, 18, 9, 9, True

    def __init__(self, sink: int = 1) -> None:
        self.sink = sink
        self.memory: HeadRole = SlidingWindow(9, sink, positions="absolute")

    def model(self, dtype: torch.dtype = torch.float32) -> DemoModel:
        """See `Host.model`."""
        return Rig(9, self.sink, dtype=dtype).model

    def caches(self, model: nn.Module, batch: int = 1) -> Caches:
        """See `Host.caches`."""
        shape, dtype = (batch, 9 * 16, 4, 16), _dtype(model)
        kv = [{name: torch.zeros(shape, dtype=dtype) for name in ("k", "v")} for _ in range(self.layers)]
        caches = _WithPrompt(kv, [{} for _ in kv])
        caches.new_video()
        return caches

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """See `Host.call`."""
        batch = caches.kv[0]["k"].shape[0]
        words = torch.arange(batch * PROMPT_WORDS).view(batch, PROMPT_WORDS) + caches.prompt
        out: Tensor = model(
            _noise((batch, 3, frames, VIEW, VIEW), start, draw, _dtype(model)),
            t=torch.full((batch,), 0.1 * (draw % 10)),
            context=words % len(WORDS),
            kv_cache=caches.kv,
            crossattn_cache=caches.cross,
            current_start=start * 16,
        )
        return out

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """See `Host.new_video`."""
        caches.new_video()

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """See `Host.cached`."""
        cache = caches.kv[layer]
        end = int(cache["local_end_index"])
        return cache["k"][:, :end], cache["v"][:, :end]

    def uncached(self, model: nn.Module) -> Tensor:
        """See `Host.uncached`."""
        words = torch.zeros(1, PROMPT_WORDS, dtype=torch.long)
        out: Tensor = model(_noise((1, 3, 3, VIEW, VIEW), 0, 0, _dtype(model)), torch.zeros(1), words)
        return out

    def switch_prompt(self, model: nn.Module, caches: Any) -> bool:
        """See `Host.switch_prompt`."""
        caches.prompt += 5
        return True


class _WithPrompt(Caches):
    """Caches, and which prompt their calls bring."""

    prompt = 0


class StandInHost(Host):
    """What the stand-ins share.

    Attributes:
        attention: their attention.
        slots: frames that a cache has room for.
    """

    chunk, single = 3, True
    attention: type[StandInAttention]
    slots: int

    def model(self, dtype: torch.dtype = torch.float32) -> StandInModel:
        """See `Host.model`."""
        return StandInModel(self.attention).eval().requires_grad_(False).to(dtype)

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """See `Host.caches`."""
        shape, dtype = (batch, self.slots * TOKENS, HEADS, HEAD_DIM), _dtype(model)
        kv = [{name: torch.zeros(shape, dtype=dtype) for name in ("k", "v")} for _ in range(LAYERS)]
        return {"kv": kv, "cross": [{"is_init": False} for _ in kv], "prompt": [0]}

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """See `Host.call`."""
        batch = len(caches["kv"][0]["k"])
        out: Tensor = model(
            _noise((batch, frames, TOKENS, CHANNELS), start, draw, _dtype(model)),
            torch.full((batch,), 100 * (draw % 10)),
            _noise((batch, 3, DIM), 0, 999 + caches["prompt"][0], _dtype(model)),
            caches["kv"],
            caches["cross"],
            **self.where(start * TOKENS, (start + frames) * TOKENS),
        )
        return out

    def where(self, start: int, end: int) -> dict[str, int]:
        """How a call says where its tokens are."""
        return {"current_start": start}

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """See `Host.new_video`."""
        for cross in caches["cross"]:
            cross["is_init"] = False

    def uncached(self, model: nn.Module) -> Tensor:
        """See `Host.uncached`."""
        noise = _noise((1, 3, TOKENS, CHANNELS), 0, 0, _dtype(model))
        out: Tensor = model(noise, torch.zeros(1), _noise((1, 3, DIM), 0, 999, _dtype(model)))
        return out

    def switch_prompt(self, model: nn.Module, caches: Any) -> bool:
        """See `Host.switch_prompt`."""
        caches["prompt"][0] += 1
        return True


class CausVidHost(StandInHost):
    """A stand-in with CausVid's interface: it holds everything and has room for seven chunks."""

    frames, dense, window, slots = 18, 18, 21, 21
    memory: HeadRole = Full()
    attention = CausVidAttention

    def where(self, start: int, end: int) -> dict[str, int]:
        """See `StandInHost.where`."""
        return {"current_start": start, "current_end": end}

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """The whole cache is slots by frame, so the end is where zeros begin."""
        k, v = (caches["kv"][layer][name] for name in ("k", "v"))
        end = int(k[0].flatten(1).any(1).sum())
        return k[:, :end], v[:, :end]


class LongLiveHost(StandInHost):
    """A stand-in with LongLive's interface: nine frames and a sink; a video begins with new cache dicts."""

    frames, dense, window, slots = 18, 9, 9, 9
    memory: HeadRole = SlidingWindow(9, 1, positions="absolute")
    attention: type[StandInAttention] = LongLiveAttention

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """See `Host.caches`."""
        caches = super().caches(model, batch)
        for cache in caches["kv"]:
            for name in ("global_end_index", "local_end_index"):
                cache[name] = torch.zeros(1, dtype=torch.long)
        return caches

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """See `Host.new_video`."""
        super().new_video(model, caches)
        caches["kv"][:] = self.caches(model, len(caches["kv"][0]["k"]))["kv"]

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """See `Host.cached`."""
        cache = caches["kv"][layer]
        end = int(cache["local_end_index"])
        return cache["k"][:, :end], cache["v"][:, :end]


class InfinityRopeHost(LongLiveHost):
    """A stand-in with Infinity-RoPE's interface: frames sit at their place in the cache."""

    memory: HeadRole = SlidingWindow(9, 1, positions="compact")
    attention = InfinityRopeAttention

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """The keys as they are rotated when they are read."""
        k, v = super().cached(model, caches, layer)
        return turned(k, model.freqs, 0), v  # type: ignore[arg-type]


HOSTS: dict[str, type[Host]] = {
    "self_forcing": SelfForcingHost,
    "causvid": CausVidHost,
    "longlive": LongLiveHost,
    "infinity_rope": InfinityRopeHost,
}
"""By the name of the adapter's module in `integrations/`."""


def _noise(shape: tuple[int, ...], start: int, draw: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * draw + start)
    return torch.randn(shape, generator=generator).to(dtype)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
