"""Chunk-by-chunk generation with Self Forcing's cache handling: text to latents to frames.

The pipeline owns one cache dict per layer. It allocates them once and starts another video by
replacing the index tensors, so stale keys stay in place, as upstream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headforcing.demo.model.attention import Cache, CrossCache
from headforcing.demo.model.autoencoder import Autoencoder, autoencoder
from headforcing.demo.model.model import DemoModel, demo_model

NOISE_LEVELS = (1.0, 0.9, 0.75, 0.5, 0.25)

ChunkCallback = Callable[[int, Tensor], None]


class DemoPipeline:
    """Generates videos with a `DemoModel`.

    Args:
        model: the model; its `local_attn_size` and `sink_size` are set to `window` and `sink`.
        window: frames in the cache, current chunk included; -1 keeps every frame.
        sink: first frames that are never evicted.
        decoder: turns latents into frames; default: the one in the package.

    Attributes:
        kv_cache: one dict per layer, see `DemoCausalSelfAttention.forward`; empty before first use.
        crossattn_cache: one dict per layer.
    """

    def __init__(
        self,
        model: DemoModel,
        *,
        window: int | None = None,
        sink: int = 0,
        decoder: Autoencoder | None = None,
    ) -> None:
        self.model = model
        self.decoder = decoder or autoencoder(model.patch_embedding.weight.device)
        self.window = model.config.window if window is None else window
        self.sink = sink
        if self.window != -1 and self.window < sink + model.config.chunk:
            raise ValueError(
                f"window {self.window} does not fit sink {sink} and a chunk of "
                f"{model.config.chunk} frames: raise window or lower sink"
            )
        model.local_attn_size = self.window
        model.sink_size = sink
        self.kv_cache: list[Cache] = []
        self.crossattn_cache: list[CrossCache] = []

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor,
        num_chunks: int | None = None,
        *,
        generator: torch.Generator,
        first_chunk: Tensor | None = None,
        callback: ChunkCallback | None = None,
    ) -> Tensor:
        """Generate videos.

        Args:
            prompts: word ids `[B, chunks, W]`, one prompt per chunk; the last one is repeated.
            num_chunks: chunks to generate; default: one per prompt.
            generator: source of the noise, drawn once per chunk on the generator's device.
            first_chunk: clean frames to start from, `[B, 3, 3, 48, 72]`, or several chunks of them.
            callback: called with the index and the clean frames of every finished chunk.

        Returns:
            `[B, 3, T, 48, 72]` in [-1, 1].
        """
        batch, total = prompts.shape[0], num_chunks or prompts.shape[1]
        like = self.model.patch_embedding.weight
        prompts = prompts.to(like.device)
        self._prepare(batch, total)
        chunk, chunks = self.model.config.chunk, []
        given = () if first_chunk is None else self.decoder.encode(first_chunk.to(like)).split(chunk, 2)
        for index in range(total):
            size = (batch, self.model.config.channels, chunk, *self.model.config.grid)
            noise = torch.randn(size, generator=generator, device=generator.device).to(like)
            if index >= prompts.shape[1]:
                context = prompts[:, -1]
            else:
                context = prompts[:, index]
                for cross in self.crossattn_cache:
                    cross["is_init"] = False
            clean = given[index] if index < len(given) else self._denoise(noise, context, index)
            self._predict(clean, 0.0, context, index)
            chunks.append(self.decoder.decode(clean))
            if callback is not None:
                callback(index, chunks[-1])
        return torch.cat(chunks, 2)

    def _denoise(self, sample: Tensor, context: Tensor, index: int) -> Tensor:
        """Euler steps from noise to the latents of a chunk."""
        targets = (*NOISE_LEVELS[1:], 0.0)
        for level, target in zip(NOISE_LEVELS, targets, strict=True):
            clean = self._predict(sample, level, context, index)
            sample = clean + target / level * (sample - clean)
        return sample

    def _predict(self, sample: Tensor, level: float, context: Tensor, index: int) -> Tensor:
        """One pass of the model over one chunk; at level 0 its purpose is to write the cache."""
        config = self.model.config
        levels = sample.new_full((sample.shape[0], config.chunk), level)
        out: Tensor = self.model(
            sample,
            t=levels,
            context=context,
            kv_cache=self.kv_cache,
            crossattn_cache=self.crossattn_cache,
            current_start=index * config.chunk * config.tokens_per_frame,
        )
        return out

    def _prepare(self, batch: int, num_chunks: int) -> None:
        """Allocate the caches, or begin a new video on the ones that fit."""
        config = self.model.config
        frames = num_chunks * config.chunk if self.window == -1 else self.window
        tokens = frames * config.tokens_per_frame
        like = self.model.patch_embedding.weight
        have = self.kv_cache[0]["k"] if self.kv_cache else None
        fits = have is not None and have.shape[0] == batch and have.device == like.device
        if not fits or have is None or have.shape[1] < tokens:
            size = (batch, tokens, config.heads, config.dim // config.heads)
            self.kv_cache = [
                {"k": like.new_zeros(size), "v": like.new_zeros(size)} for _ in range(config.layers)
            ]
            self.crossattn_cache = [{} for _ in range(config.layers)]
        for cache in self.kv_cache:
            for name in ("global_end_index", "local_end_index"):
                cache[name] = torch.zeros(1, dtype=torch.long, device=like.device)
        for cross in self.crossattn_cache:
            cross["is_init"] = False


def demo_pipeline(*, window: int | None = None, sink: int = 0) -> DemoPipeline:
    """A `DemoPipeline` with the demo model, which is `pipeline.model`."""
    return DemoPipeline(demo_model(), window=window, sink=sink)
