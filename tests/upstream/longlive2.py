"""LongLive 2: its own pipeline, which allocates its own caches, on a CPU."""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import tiny
from .bench import NEGATIVE_PROMPT, Bench
from .scenarios import HEADS, LAYERS

MODEL = "Wan2.2-TI2V-5B"
COUNTED = (*tiny.INDICES, "pinned_start", "pinned_len")
NEW_SHOT = 4
"""The chunk that begins another shot, where there are two."""
OFFSET = 8.0


def prepare() -> None:
    """Choose the kernels that a CPU has, and stand in for a name that is imported and unused."""
    os.environ |= {"LLV2_TRITON_ROPE": "0", "LLV2_TRITON_ADALN": "0"}
    with suppress(ImportError):
        importlib.import_module("transformers.models.x_clip.modeling_x_clip").x_clip_loss = None


class LongLive2(Bench):
    """Allocates caches of both branches when a video begins, in the size of a configuration."""

    def few_step(self) -> Any:
        """Build the pipeline, for one shot or two."""
        from pipeline import CausalDiffusionInferencePipeline
        from utils import config

        config.wan_default_config[MODEL] |= {
            "num_heads": HEADS,
            "head_dim": tiny.HEAD_DIM,
            "num_transformer_blocks": LAYERS,
        }
        pipeline = self.pipeline(CausalDiffusionInferencePipeline)
        allocate, inference = pipeline._initialize_kv_cache, pipeline.inference

        def noted(*args: Any, **kwargs: Any) -> None:
            allocate(*args, **kwargs)
            self.caches += [pipeline.kv_cache_pos, pipeline.kv_cache_neg]

        def per_chunk(noise: Tensor, prompts: list[str], **kwargs: Any) -> tuple[None, Tensor]:
            chunks = noise.shape[1] // self.scenario.chunk
            texts = [[self._told(text, chunk) for chunk in range(chunks)] for text in prompts]
            return None, inference(noise, texts, **kwargs)

        pipeline._initialize_kv_cache, pipeline.inference = noted, per_chunk
        if self.scenario.driver == "removal":  # which compares caches with those nothing was written to
            size = {"batch_size": self.scenario.batch, "dtype": self.dtype, "device": torch.device("cpu")}
            pipeline._initialize_kv_cache(**size)
            pipeline._initialize_crossattn_cache(**size)
        return pipeline

    def build(self, pipeline_class: Any, arguments: SimpleNamespace) -> Any:
        """Call the class with a configuration as its files have it."""
        from easydict import EasyDict

        scenario = self.scenario
        told = EasyDict(
            model_kwargs={
                "model_name": MODEL,
                "timestep_shift": 5.0,
                "local_attn_size": scenario.window,
                "sink_size": scenario.sink,
                "num_frame_per_block": scenario.chunk,
            },
            image_or_video_shape=[scenario.batch, scenario.frames, tiny.CHANNELS, *tiny.LATENT],
            num_frame_per_block=scenario.chunk,
            independent_first_frame=scenario.image,
            sampling_steps=len(scenario.steps),
            guidance_scale=3.0 if scenario.driver == "cfg" else 1.0,
            negative_prompt=NEGATIVE_PROMPT,
            use_relative_rope=scenario.raw_keys,
            multi_shot_sink=scenario.shots > 0,
            multi_shot_rope_offset=OFFSET if scenario.shots else 0.0,
            shot_clean_recache=scenario.shots > 1,
        )
        return super().build(pipeline_class, told)

    def cfg(self) -> Any:
        """The same with guidance."""
        return self.few_step()

    def indices(self) -> Tensor:
        """Return what every layer and stream counts, pins included."""
        return torch.tensor(
            [[[int(layer[name]) for name in COUNTED] for layer in stream] for stream in self.caches]
        )

    def _told(self, text: str, chunk: int) -> str:
        from utils.dataset import DEFAULT_SCENE_CUT_PREFIX

        if chunk < NEW_SHOT or not self.scenario.shots:
            return text
        return f"{DEFAULT_SCENE_CUT_PREFIX if chunk == NEW_SHOT else ''}another {text}"
