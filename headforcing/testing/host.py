"""What a porter writes so that the conformance kit can drive a tiny model of the new base model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.adapters.base import Adapter
from headforcing.roles import Full, HeadRole


class Host(ABC):
    """A tiny model of one base model, and the calls its pipeline makes.

    Everything must be a function of what is asked for alone: two models made alike are equal bit for bit, and
    so are two equal calls. Keep it small: the kit runs some hundred passes.

    Attributes:
        adapter: what is checked by `headforcing check`; `None`: the adapter that fits.
        layers: causal self-attention layers.
        chunk: frames the model denoises together.
        frames: frames that the untouched model can generate, at least three chunks.
        dense: the first frames, in which its cache still holds everything.
        memory: the role whose heads remember what the untouched model remembers.
        window: frames the model was trained on, to compare; `None`: not compared.
        single: whether it can also run chunks of one frame.
        unconcerned: checks that have nothing to look at here; our tests want all others to be run.
    """

    adapter: Adapter | None = None
    layers: int = 2
    chunk: int = 3
    frames: int = 18
    dense: int = 9
    memory: HeadRole = Full()
    window: int | None = None
    single: bool = False
    unconcerned: frozenset[str] = frozenset()

    def missing(self) -> str | None:
        """Why it cannot run here, as where a package is not installed; default `None`, it can."""
        return None

    @abstractmethod
    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh tiny model: always the same random weights, `eval()`, no gradients."""

    @abstractmethod
    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """Fresh caches for one video, as the pipeline makes them; `None` where the host has no such thing."""

    @abstractmethod
    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """One pass over frames `start .. start + frames - 1`; returns what the model returns.

        Args:
            model: made by `model`, possibly converted to another dtype or put in training mode meanwhile.
            caches: made by `caches`.
            start: first frame.
            frames: frames of the chunk.
            draw: another draw is another noise. Draws that 10 divides are clean passes, at the timestep the
                host writes its cache with; the others are noisy. Do not switch gradients off here.
        """

    @abstractmethod
    def new_video(self, model: nn.Module, caches: Any) -> None:
        """Does to the caches what the pipeline does before another video."""

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor] | None:
        """Rotated keys, and values, `[B, tokens, H, D]`, that the untouched host cached, oldest first.

        Asked while nothing was evicted yet. Default `None`: it cannot be told, and some checks are skipped.
        """
        return None

    def uncached(self, model: nn.Module) -> Tensor | None:
        """A call of the model without a cache, as in training. Default `None`: there is none."""
        return None

    def switch_prompt(self, model: nn.Module, caches: Any) -> bool:
        """From now on, calls with these caches bring another prompt, and nothing else changes.

        Returns:
            Whether the host has prompts. Default false, and the check of prompt switches is skipped.
        """
        return False
