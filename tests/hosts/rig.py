"""The demo model with random weights, and the calls of its pipeline one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headforcing.apply.handle import HeadForcing
from headforcing.demo.model.attention import DemoConfig
from headforcing.demo.model.model import DemoModel
from headforcing.demo.world.words import PROMPT_WORDS, WORDS


@dataclass
class Caches:
    """What a pipeline owns: one dict per layer for self-attention, one for cross-attention."""

    kv: list[dict[str, Any]]
    cross: list[dict[str, Any]]

    def new_video(self) -> None:
        """Begins another video on the same dicts as Self Forcing does: new index tensors, stale keys."""
        for cache in self.kv:
            for name in ("global_end_index", "local_end_index"):
                cache[name] = torch.zeros(1, dtype=torch.long)
        for cross in self.cross:
            cross["is_init"] = False

    def indices(self) -> list[tuple[int, int]]:
        """Global and local end index of every layer."""
        return [(int(c["global_end_index"]), int(c["local_end_index"])) for c in self.kv]


class Rig:
    """A demo model of random weights, and the calls its pipeline would make, one at a time.

    Two rigs made alike are equal bit for bit, so one can be patched and the other not.

    Args:
        window: frames the model attends, current chunk included; -1 for all.
        sink: first frames that are never evicted.
        dtype: dtype of the weights and the noise.
        layers: blocks of the model.
        heads: heads per block.
        grid: height and width of a frame in patches.

    Example:
        >>> rig = Rig(window=6)
        >>> caches = rig.caches()
        >>> rig.call(caches, start=0, frames=3).shape
        torch.Size([1, 48, 3, 4, 4])
    """

    def __init__(
        self,
        window: int = 6,
        sink: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        layers: int = 2,
        heads: int = 4,
        grid: tuple[int, int] = (4, 4),
    ) -> None:
        self.window, self.dtype = window, dtype
        self.config = DemoConfig(dim=16 * heads, layers=layers, heads=heads, grid=grid)
        model = DemoModel(self.config).randomize(torch.Generator().manual_seed(1))
        self.model: DemoModel = model.eval().requires_grad_(False).to(dtype)
        model.local_attn_size, model.sink_size = window, sink

    def caches(self, batch: int = 1, frames: int | None = None) -> Caches:
        """Fresh caches; `frames` is how many they hold, by default the window."""
        held = frames or (self.window if self.window > 0 else 24)
        size = (batch, held * self.config.tokens_per_frame, self.config.heads, 16)
        kv = [{name: torch.zeros(size, dtype=self.dtype) for name in ("k", "v")} for _ in self.model.blocks]
        caches = Caches(kv, [{} for _ in kv])
        caches.new_video()
        return caches

    def noise(self, start: int, frames: int, *, batch: int = 1, draw: int = 0) -> Tensor:
        """Input latents, a function of what is asked for alone."""
        generator = torch.Generator().manual_seed(1000 * draw + start)
        size = (batch, self.config.channels, frames, *self.config.grid)
        return torch.randn(size, generator=generator).to(self.dtype)

    def call(self, caches: Caches | None, start: int, frames: int, *, draw: int = 0) -> Tensor:
        """One pass of the model over one chunk; another `draw` is another noise and noise level."""
        batch = 1 if caches is None else caches.kv[0]["k"].shape[0]
        words = torch.arange(batch * PROMPT_WORDS).view(batch, PROMPT_WORDS) % len(WORDS)
        with torch.no_grad():
            out: Tensor = self.model(
                self.noise(start, frames, batch=batch, draw=draw),
                t=torch.full((batch,), 0.1 * (draw % 10)),
                context=words,
                kv_cache=None if caches is None else caches.kv,
                crossattn_cache=None if caches is None else caches.cross,
                current_start=start * self.config.tokens_per_frame,
            )
        return out

    def video(self, caches: Caches, chunks: int, *, first: int = 0, draw: int = 0) -> list[Tensor]:
        """Chunks of 3 frames from chunk `first` on, one noisy and one clean pass each."""
        length = self.config.chunk
        return [
            self.call(caches, chunk * length, length, draw=step)
            for chunk in range(first, first + chunks)
            for step in (draw + 1, draw)
        ]

    def stored(self, handle: HeadForcing, caches: Caches, chunks: int) -> list[int]:
        """Makes a video; bytes stored at the end of every chunk."""
        held = []
        for chunk in range(chunks):
            self.video(caches, 1, first=chunk)
            held.append(handle.status().stored_bytes)
        return held
