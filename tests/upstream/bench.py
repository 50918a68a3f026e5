"""One tiny model inside a repository's own classes, and what a run of it leaves behind."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import tiny
from .scenarios import BASELINES, LAYERS, REPOSITORIES, WRAPPER, Case, Scenario

NEGATIVE_PROMPT = "blurred"
OPTIONS = {
    "MemRoPE": {"recent_size": 4, "compression_method": "ema"},
    "LongLive2": {"model_type": "ti2v"},
}
"""What the model of a repository is told beside its window and sink."""
Caches = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""The self-attention and the cross-attention caches of one stream, a dict per layer."""


@dataclass
class Outcome:
    """What a run leaves behind.

    Attributes:
        tensors: Results to compare.
        facts: Facts about the model and its caches to compare.
        passes: Forward passes of the model.
        calls: Attention calls that our library served; None where it was not applied.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    passes: int = 0
    calls: int | None = None


class Bench:
    """One freshly built model inside the repository's own classes, as in Self Forcing.

    Attributes:
        counted: Whether cache dicts hold end indices.
    """

    counted = True

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.handle: Any = None
        self.passes = 0
        self.facts: dict[str, Any] = {}
        self.modules: dict[str, Any] = {}
        self.caches: list[list[dict[str, Any]]] = []
        self._weights: dict[str, Tensor] = {}

    @property
    def scenario(self) -> Scenario:
        """The scenario that is run."""
        return self.case.scenario

    def wrapper(self) -> Any:
        """Build the diffusion wrapper that every pipeline uses."""
        from utils.wan_wrapper import WanDiffusionWrapper

        with self._tiny_model():
            wrapper = WanDiffusionWrapper(
                timestep_shift=5.0,
                is_causal=True,
                local_attn_size=self.scenario.window,
                sink_size=self.scenario.sink,
            )
        return self._finish(wrapper, wrapper)

    def few_step(self) -> Any:
        """Build the few-step pipeline with its caches allocated."""
        from pipeline.causal_inference import CausalInferencePipeline

        pipeline = self.pipeline(CausalInferencePipeline)
        pipeline.kv_cache1, pipeline.crossattn_cache = self.allocate()
        return pipeline

    def cfg(self) -> Any:
        """Build the many-step pipeline with the caches of both its branches."""
        from pipeline.causal_diffusion_inference import CausalDiffusionInferencePipeline

        pipeline = self.pipeline(CausalDiffusionInferencePipeline)
        pipeline.sampling_steps = 4
        pipeline.kv_cache_pos, pipeline.crossattn_cache_pos = self.allocate()
        pipeline.kv_cache_neg, pipeline.crossattn_cache_neg = self.allocate()
        return pipeline

    def allocate(self) -> Caches:
        """Allocate one stream's caches."""
        batch = self.scenario.batch
        self.caches.append(tiny.kv_caches(self.scenario.window, batch, self.dtype, self.counted))
        return self.caches[-1], tiny.text_caches(batch, self.dtype)

    def noise(self, seed: int = tiny.NOISE_SEED, frames: int = 0) -> Tensor:
        """Draw the scenario's noise."""
        scenario = self.scenario
        return tiny.noise(scenario.batch, frames or scenario.frames, self.dtype, seed)

    def indices(self) -> Tensor:
        """Return both end indices of every layer and stream, `[streams, layers, 2]`."""
        return torch.tensor(
            [
                [[int(layer[name]) for name in tiny.INDICES if name in layer] for layer in stream]
                for stream in self.caches
            ]
        )

    def outcome(self, **tensors: Tensor) -> Outcome:
        """Collect what the run left behind."""
        calls = None if self.handle is None else self.handle.status().calls
        tensors["indices"] = self.indices()
        return Outcome(tensors, self.facts, self.passes, calls)

    def pipeline(self, pipeline_class: Callable[..., Any]) -> Any:
        """Build a pipeline."""
        with self._tiny_model():
            pipeline = self.build(pipeline_class, arguments(self.case))
        pipeline.num_transformer_blocks = LAYERS
        pipeline.frame_seq_length = tiny.TOKENS_PER_FRAME
        return self._finish(pipeline, pipeline.generator)

    def build(self, pipeline_class: Callable[..., Any], arguments: SimpleNamespace) -> Any:
        """Call the class of a pipeline."""
        return pipeline_class(arguments, device="cpu", text_encoder=tiny.TextEncoder(), vae=tiny.Decoder())

    def _finish(self, whole: Any, wrapper: Any) -> Any:
        """Load the weights and cast the model after it was built, as the scripts do."""
        if self.case.policy == WRAPPER:
            self._apply(wrapper)
        wrapper.load_state_dict({f"model.{name}": value for name, value in self._weights.items()})
        wrapper.model.register_forward_pre_hook(self._count)
        return whole.to(dtype=self.dtype)

    def _count(self, *unused: object) -> None:
        self.passes += 1

    @contextmanager
    def _tiny_model(self) -> Iterator[None]:
        """Have `from_pretrained` build the tiny model and apply our library to it."""
        name = REPOSITORIES[self.case.repository]
        if self.scenario.raw_keys and self.case.repository == "LongLive":
            name += "_infinity"
        model_class = importlib.import_module(name).CausalWanModel

        def from_pretrained(path: str, **options: Any) -> Any:
            del path
            memory = {name: options[name] for name in ("local_attn_size", "sink_size") if name in options}
            memory |= OPTIONS.get(self.case.repository, {})
            model = tiny.build_model(model_class, self.scenario.window, **memory)
            self._weights = tiny.seeded_weights(model)
            self.modules = dict(model.named_modules())
            if self.case.policy not in (*BASELINES, WRAPPER):
                self._apply(model)
            return model

        model_class.from_pretrained = staticmethod(from_pretrained)
        try:
            yield
        finally:
            del model_class.from_pretrained

    def _apply(self, model: Any) -> None:
        from .policies import apply

        self.handle = apply(model, self.scenario, self.case.policy)


def arguments(case: Case) -> SimpleNamespace:
    """Return what a pipeline is configured with."""
    from easydict import EasyDict

    scenario = case.scenario
    longlive = {"use_infinite_attention": True} if scenario.raw_keys and case.repository == "LongLive" else {}
    return SimpleNamespace(
        model_kwargs=EasyDict(
            timestep_shift=5.0, local_attn_size=scenario.window, sink_size=scenario.sink, **longlive
        ),
        denoising_step_list=list(scenario.steps),
        denoising_step_list_first_chunk=scenario.first_steps and list(scenario.first_steps),
        warp_denoising_step=True,
        num_frame_per_block=scenario.chunk,
        independent_first_frame=scenario.image,
        context_noise=0,
        num_train_timestep=1000,
        timestep_shift=5.0,
        guidance_scale=3.0,
        negative_prompt=NEGATIVE_PROMPT,
    )
