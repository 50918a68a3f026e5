"""StreamDiffusionV2: its own pipeline without stream batches, which allocates its own caches, on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import tiny
from .bench import Bench
from .scenarios import HEADS

REFRESH = 12
"""Where positions go back, if they do; 50 in the scripts."""
PATCHES = 16
"""Pixels per patch, in each direction, as the pipeline counts them."""


class StreamDiffusionV2(Bench):
    """Allocates caches when a video begins; a first chunk of one frame has two, as for an input video."""

    def few_step(self) -> Any:
        """Build the pipeline, and give it the loop of its scripts."""
        from models.wan.causal_stream_inference import CausalStreamInferencePipeline

        pipeline = self.pipeline(CausalStreamInferencePipeline)
        pipeline.num_heads = HEADS
        allocate, steps = pipeline._initialize_kv_cache, pipeline.denoising_step_list.clone()

        def of_tiny_heads(*args: Any, **kwargs: Any) -> None:
            allocate(*args, **kwargs)
            for cache in pipeline.kv_cache1:
                for name in ("k", "v"):
                    cache[name] = cache[name][..., : tiny.HEAD_DIM].clone()
            self.caches.append(pipeline.kv_cache1)

        pipeline._initialize_kv_cache = of_tiny_heads
        size = {"batch_size": 1, "dtype": self.dtype, "device": "cpu"}
        pipeline._initialize_kv_cache(**size)
        pipeline._initialize_crossattn_cache(**size)
        videos = 0

        def inference(noise: Tensor, prompts: list[str], return_latents: bool) -> tuple[None, Tensor]:
            nonlocal videos
            pipeline.denoising_step_list = steps.clone()
            if videos:
                pipeline.kv_cache1 = pipeline.crossattn_cache = None
            for block in (
                pipeline.generator.model.blocks if self.scenario.variant == "slots forgotten" else ()
            ):
                block.self_attn.evict_idx = None
            videos += 1
            return None, self._video(pipeline, noise, prompts)

        pipeline.inference = inference
        return pipeline

    def indices(self) -> Tensor:
        """Return both end indices of every layer and stream, of the first sample."""
        return torch.tensor(
            [[[int(layer[name][0]) for name in tiny.INDICES] for layer in stream] for stream in self.caches]
        )

    def build(self, pipeline_class: Any, arguments: SimpleNamespace) -> Any:
        """Call the class with other factories."""
        from models.wan import causal_stream_inference, wan_wrapper

        wan_wrapper.WanModel.from_pretrained = staticmethod(lambda path: nn.Module())
        own: Any = causal_stream_inference
        own.get_text_encoder_wrapper = lambda model_name: lambda model_type: tiny.TextEncoder()
        own.get_vae_wrapper = lambda model_name: lambda model_type: tiny.Decoder()
        scenario = self.scenario
        told = SimpleNamespace(
            model_type="T2V-1.3B",
            model_name="wan",
            generator_name="causal_wan",
            height=PATCHES * tiny.LATENT[0] // 2,
            width=PATCHES * tiny.LATENT[1] // 2,
            num_kv_cache=scenario.window,
            num_sink_tokens=scenario.sink,
            adapt_sink_threshold=0.2 if scenario.variant == "adaptive sink" else -1,
            num_frame_per_block=scenario.chunk,
            denoising_step_list=[*scenario.steps, 0],
            warp_denoising_step=False,
            t2v=False,
        )
        return pipeline_class(told, device="cpu")

    def _video(self, pipeline: Any, noise: Tensor, prompts: list[str]) -> Tensor:
        """Make a video chunk by chunk, as the scripts do."""
        scenario, frame, step = self.scenario, pipeline.frame_seq_length, int(pipeline.denoising_step_list[0])
        chunk, batch = scenario.chunk, scenario.variant == "stream batch"
        first = max(2, chunk)
        given = {"text_prompts": prompts, "device": torch.device("cpu"), "dtype": self.dtype}
        whole = {"current_start": 0, "current_end": first * frame, "batch_denoise": batch}
        made = [pipeline.prepare(noise=noise[:, :first], **given, **whole)]
        for start in range(first, noise.shape[1], chunk):
            moved = scenario.variant == "positions go back" and start >= REFRESH
            at = scenario.window - 1 if moved else start
            denoise = pipeline.inference_stream if batch else pipeline.inference_wo_batch
            made.append(
                denoise(noise[:, start : start + chunk], at * frame, (at + chunk) * frame, current_step=step)
            )
        return torch.cat([one[-1:] for one in made], dim=1)
