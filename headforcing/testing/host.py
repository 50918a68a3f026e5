"""What the author of an adapter writes so that the conformance kit can run a tiny base model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.adapters.base import Adapter
from headforcing.roles import Full, HeadRole


class Host(ABC):
    """A tiny version of one base model, and the calls its pipeline makes.

    Everything must be deterministic: two models are equal bit for bit, and so are two calls with the same
    arguments. Keep it small: the kit runs some hundred passes.

    Attributes:
        adapter: what is checked by `headforcing check`; `None`: the adapter that fits.
        layers: causal self-attention layers.
        chunk: frames the model denoises together.
        frames: frames that the unmodified model can generate, at least three chunks.
        dense: number of frames before its window overflows; of several windows, the smallest.
        memory: the role that reproduces the unmodified model, or one per layer.
        window: frames the model was trained on, to compare with the adapter; `None`: not compared.
        single: whether it can also run chunks of one frame.
        batches: whether it can also run two samples in one batch.
        rounding: the largest difference that counts as rounding, in float32, over the root mean square of the
            output. For models that attend with another kernel than `scaled_dot_product_attention`; reports
            say what was measured. If it is not 0, other dtypes have the limits of `verify`.
        unconcerned: checks that do not apply to it; our tests require that all others run.
    """

    adapter: Adapter | None = None
    layers: int = 2
    chunk: int = 3
    frames: int = 18
    dense: int = 9
    memory: HeadRole | Sequence[HeadRole] = Full()
    window: int | None = None
    single: bool = False
    batches: bool = True
    rounding: float = 0.0
    unconcerned: frozenset[str] = frozenset()

    def missing(self) -> str | None:
        """Why it cannot run here, such as a package that is not installed; default `None`: it can."""
        return None

    @abstractmethod
    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A new tiny model: always the same random weights, in `eval()` mode, without gradients."""

    @abstractmethod
    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """New caches for one video, as the pipeline creates them; `None` if the base model has no caches."""

    @abstractmethod
    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """One pass over frames `start .. start + frames - 1`; returns what the model returns.

        Args:
            model: from `model`, possibly converted to another dtype or put in training mode.
            caches: from `caches`.
            start: first frame.
            frames: frames of the chunk.
            draw: seed of the noise. Multiples of 10 are clean passes, at the timestep with which the base
                model writes its cache; all others are noisy. Do not switch gradients off here.
        """

    @abstractmethod
    def new_video(self, model: nn.Module, caches: Any) -> None:
        """Does to the caches what the pipeline does before a second video."""

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor] | None:
        """Rotated keys, and values, `[B, tokens, H, D]`, in the unmodified model's cache, oldest first.

        Called before anything was evicted. Default `None`: unknown, and some checks are skipped.
        """
        return None

    def uncached(self, model: nn.Module) -> Tensor | None:
        """A call of the model without a cache, as in training. Default `None`: it has no such call."""
        return None

    def switch_prompt(self, model: nn.Module, caches: Any) -> bool:
        """Makes later calls with these caches use another prompt; nothing else changes.

        Returns:
            Whether there are prompts. Default false: the check of prompt switches is skipped.
        """
        return False
