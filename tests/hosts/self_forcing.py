"""The demo model, which has Self Forcing's interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headforcing.demo.model.model import DemoModel
from headforcing.demo.world.words import PROMPT_WORDS, WORDS
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.testing.host import Host
from tests.hosts.rig import Caches, Rig
from tests.hosts.standin import dtype_of, noise_of


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
        shape, dtype = (batch, 9 * 16, 4, 16), dtype_of(model)
        kv = [{name: torch.zeros(shape, dtype=dtype) for name in ("k", "v")} for _ in range(self.layers)]
        caches = _WithPrompt(kv, [{} for _ in kv])
        caches.new_video()
        return caches

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """See `Host.call`."""
        batch, channels = caches.kv[0]["k"].shape[0], model.config.channels
        words = torch.arange(batch * PROMPT_WORDS).view(batch, PROMPT_WORDS) + caches.prompt
        out: Tensor = model(
            noise_of((batch, channels, frames, *model.config.grid), start, draw, dtype_of(model)),
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
        out: Tensor = model(
            noise_of((1, model.config.channels, 3, *model.config.grid), 0, 0, dtype_of(model)),
            torch.zeros(1),
            words,
        )
        return out

    def switch_prompt(self, model: nn.Module, caches: Any) -> bool:
        """See `Host.switch_prompt`."""
        caches.prompt += 5
        return True


class _WithPrompt(Caches):
    """Caches, and which prompt their calls bring."""

    prompt = 0
