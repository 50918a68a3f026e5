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
from headforcing.testing.causvid import CHANNELS, HEAD_DIM, HEADS, LAYERS, PROMPT, TOKENS, StandInModel
from headforcing.testing.host import Host


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
        caches = Rig(9, self.sink, dtype=_dtype(model)).caches(batch)
        return _WithPrompt(caches.kv, caches.cross)

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


class CausVidHost(Host):
    """A stand-in with CausVid's interface: it holds everything and has room for seven chunks."""

    chunk, frames, dense, window, single = 3, 18, 18, 21, True
    memory: HeadRole = Full()

    def model(self, dtype: torch.dtype = torch.float32) -> StandInModel:
        """See `Host.model`."""
        return StandInModel().eval().requires_grad_(False).to(dtype)

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """See `Host.caches`."""
        shape = (batch, 21 * TOKENS, HEADS, HEAD_DIM)
        kv = [{name: torch.zeros(shape, dtype=_dtype(model)) for name in ("k", "v")} for _ in range(LAYERS)]
        return {"kv": kv, "cross": [{"is_init": False} for _ in kv], "prompt": [0]}

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """See `Host.call`."""
        batch = len(caches["kv"][0]["k"])
        out: Tensor = model(
            _noise((batch, frames, TOKENS, CHANNELS), start, draw, _dtype(model)),
            torch.full((batch,), 100 * (draw % 10)),
            _noise((batch, PROMPT, HEADS * HEAD_DIM), 0, 999 + caches["prompt"][0], _dtype(model)),
            caches["kv"],
            caches["cross"],
            current_start=start * TOKENS,
            current_end=(start + frames) * TOKENS,
        )
        return out

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """See `Host.new_video`."""
        for cross in caches["cross"]:
            cross["is_init"] = False

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """The whole cache is slots by frame, so the end is where zeros begin."""
        k, v = (caches["kv"][layer][name] for name in ("k", "v"))
        end = int(k[0].flatten(1).any(1).sum())
        return k[:, :end], v[:, :end]

    def uncached(self, model: nn.Module) -> Tensor:
        """See `Host.uncached`."""
        dtype = _dtype(model)
        prompt = _noise((1, PROMPT, HEADS * HEAD_DIM), 0, 999, dtype)
        out: Tensor = model(_noise((1, 3, TOKENS, CHANNELS), 0, 0, dtype), torch.zeros(1), prompt)
        return out

    def switch_prompt(self, model: nn.Module, caches: Any) -> bool:
        """See `Host.switch_prompt`."""
        caches["prompt"][0] += 1
        return True


HOSTS: dict[str, type[Host]] = {"self_forcing": SelfForcingHost, "causvid": CausVidHost}
"""By the name of the adapter's module in `integrations/`."""


def _noise(shape: tuple[int, ...], start: int, draw: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * draw + start)
    return torch.randn(shape, generator=generator).to(dtype)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
