"""The repositories that are not built as Self Forcing is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn

from . import shims, tiny
from .bench import Bench, Caches, arguments
from .fastvideo import FastVideo
from .krea import Krea
from .longlive2 import LongLive2
from .streamdiffusionv2 import StreamDiffusionV2


class CausVid(Bench):
    """Builds everything itself, on `"cuda"`, a bidirectional model included; nobody counts."""

    counted = False

    def few_step(self) -> Any:
        """Build the pipeline with its caches allocated."""
        from causvid.models.wan import causal_inference

        pipeline = self.pipeline(causal_inference.InferencePipeline)
        pipeline.kv_cache1, pipeline.crossattn_cache = self.allocate()
        inference = pipeline.inference

        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            with shims.OnCpu():
                return inference(*args, **kwargs)

        pipeline.inference = on_cpu
        return pipeline

    def build(self, pipeline_class: Callable[..., Any], arguments: SimpleNamespace) -> Any:
        """Call the class with other factories."""
        from causvid.models.wan import causal_inference, wan_wrapper

        wan_wrapper.WanModel.from_pretrained = staticmethod(lambda path: nn.Module())
        causal_inference.get_text_encoder_wrapper = lambda model_name: tiny.TextEncoder
        causal_inference.get_vae_wrapper = lambda model_name: tiny.Decoder
        arguments.model_name, arguments.generator_name = "wan", "causal_wan"
        arguments.warp_denoising_step = False
        return pipeline_class(arguments, device="cpu")


class LongLive(Bench):
    """Allocates caches whenever a video begins."""

    def few_step(self) -> Any:
        """Build the few-step pipeline with caches of the tiny size."""
        from pipeline import CausalInferencePipeline

        return self._allocating(CausalInferencePipeline)

    def interactive(self, global_sink: bool) -> Any:
        """Build the pipeline that switches prompts, and keeps the first frames or not."""
        from pipeline import InteractiveCausalInferencePipeline

        return self._allocating(InteractiveCausalInferencePipeline, global_sink)

    def one_switch(self, global_sink: bool) -> Any:
        """Build the pipeline that switches once, likewise."""
        from pipeline import SwitchCausalInferencePipeline

        return self._allocating(SwitchCausalInferencePipeline, global_sink)

    def _allocating(self, pipeline_class: Callable[..., Any], global_sink: bool = False) -> Any:
        pipeline = self.pipeline(pipeline_class)
        pipeline.global_sink = global_sink
        first = [self.allocate()]

        def allocate(*args: object, **kwargs: object) -> None:
            pipeline.kv_cache1, pipeline.crossattn_cache = first.pop() if first else self.allocate()

        pipeline._initialize_kv_cache = allocate
        pipeline._initialize_crossattn_cache = lambda *args, **kwargs: None
        return pipeline


class RewardForcing(Bench):
    """Asks for a path of checkpoints, which the many-step pipeline does not pass on."""

    def wrapper(self) -> Any:
        """Build the diffusion wrapper that every pipeline uses."""
        with self._tiny_model():
            wrapper = self._generator(arguments(self.case))
        return self._finish(wrapper, wrapper)

    def build(self, pipeline_class: Callable[..., Any], arguments: SimpleNamespace) -> Any:
        """Call the class of a pipeline with a wrapper."""
        given = {"text_encoder": tiny.TextEncoder(), "vae": tiny.Decoder()}
        return pipeline_class(arguments, "cpu", generator=self._generator(arguments), **given)

    def _generator(self, arguments: SimpleNamespace) -> Any:
        from utils.wan_wrapper import WanDiffusionWrapper

        return WanDiffusionWrapper(checkpoint_path="", is_causal=True, **arguments.model_kwargs)


class RollingForcing(Bench):
    """Holds eight chunks, and denoises five at once."""

    def few_step(self) -> Any:
        """Build the pipeline with its caches allocated."""
        from pipeline import CausalInferencePipeline

        pipeline = self.pipeline(CausalInferencePipeline)
        pipeline.inference = pipeline.inference_rolling_forcing
        pipeline.kv_cache_clean, pipeline.crossattn_cache = self.allocate()
        return pipeline

    def allocate(self) -> Caches:
        """Allocate one stream's caches, three frames longer than what is attended."""
        kv = tiny.kv_caches(tiny.GLOBAL_FRAMES + 3, self.scenario.batch, self.dtype)
        self.caches.append(kv)
        return kv, tiny.text_caches(self.scenario.batch, self.dtype)


HOSTS: dict[str, type[Bench]] = {
    "CausVid": CausVid,
    "LongLive": LongLive,
    "Reward-Forcing": RewardForcing,
    "RollingForcing": RollingForcing,
    "LongLive2": LongLive2,
    "FastVideo": FastVideo,
    "realtime-video": Krea,
    "streamdiffusionv2": StreamDiffusionV2,
}
"""How to build what a repository runs; all others are built as Self Forcing is."""
