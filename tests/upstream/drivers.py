"""Drives a repository's own classes through a scenario, with our library in or out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headforcing.errors import HeadForcingError

from . import tiny
from .scenarios import BASELINES, LAYERS, WRAPPER, Case, Scenario

PROMPT = "a red cube rolls down the stairs"
NEGATIVE_PROMPT = "blurred"
SAMPLING_SEED = 0
Caches = tuple[list[dict[str, Any]], list[dict[str, Any]]]
OVERLAPPING_STARTS = (0, 2, 5, 8, 11)


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
    """One freshly built model inside the repository's own classes."""

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

        pipeline = self._pipeline(CausalInferencePipeline)
        pipeline.kv_cache1, pipeline.crossattn_cache = self.allocate()
        return pipeline

    def cfg(self) -> Any:
        """Build the many-step pipeline with the caches of both its branches."""
        from pipeline.causal_diffusion_inference import CausalDiffusionInferencePipeline

        pipeline = self._pipeline(CausalDiffusionInferencePipeline)
        pipeline.sampling_steps = 4
        pipeline.kv_cache_pos, pipeline.crossattn_cache_pos = self.allocate()
        pipeline.kv_cache_neg, pipeline.crossattn_cache_neg = self.allocate()
        return pipeline

    def allocate(self) -> Caches:
        """Allocate one stream's caches."""
        batch = self.scenario.batch
        self.caches.append(tiny.kv_caches(self.scenario.window, batch, self.dtype))
        return self.caches[-1], tiny.text_caches(batch, self.dtype)

    def noise(self, seed: int = tiny.NOISE_SEED, frames: int = 0) -> Tensor:
        """Draw the scenario's noise."""
        scenario = self.scenario
        return tiny.noise(scenario.batch, frames or scenario.frames, self.dtype, seed)

    def indices(self) -> Tensor:
        """Return both end indices of every layer and stream, `[streams, layers, 2]`."""
        names = ("global_end_index", "local_end_index")
        return torch.tensor(
            [[[int(layer[name]) for name in names] for layer in stream] for stream in self.caches]
        )

    def outcome(self, **tensors: Tensor) -> Outcome:
        """Collect what the run left behind."""
        calls = None if self.handle is None else self.handle.status().calls
        tensors["indices"] = self.indices()
        return Outcome(tensors, self.facts, self.passes, calls)

    def _pipeline(self, pipeline_class: Callable[..., Any]) -> Any:
        with self._tiny_model():
            pipeline = pipeline_class(
                _arguments(self.scenario),
                device="cpu",
                text_encoder=tiny.TextEncoder(),
                vae=tiny.Decoder(),
            )
        pipeline.num_transformer_blocks = LAYERS
        pipeline.frame_seq_length = tiny.TOKENS_PER_FRAME
        return self._finish(pipeline, pipeline.generator)

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
        from wan.modules.causal_model import CausalWanModel

        def from_pretrained(path: str, local_attn_size: int, sink_size: int) -> Any:
            del path
            model = tiny.build_model(CausalWanModel, local_attn_size, sink_size)
            self._weights = tiny.seeded_weights(model)
            self.modules = dict(model.named_modules())
            if self.case.policy not in (*BASELINES, WRAPPER):
                self._apply(model)
            return model

        CausalWanModel.from_pretrained = staticmethod(from_pretrained)
        try:
            yield
        finally:
            del CausalWanModel.from_pretrained

    def _apply(self, model: Any) -> None:
        from .policies import apply

        self.handle = apply(model, self.scenario, self.case.policy)


def _arguments(scenario: Scenario) -> SimpleNamespace:
    return SimpleNamespace(
        model_kwargs={
            "timestep_shift": 5.0,
            "local_attn_size": scenario.window,
            "sink_size": scenario.sink,
        },
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


def run(case: Case) -> Outcome:
    """Run one case on a fresh model."""
    return DRIVERS[case.scenario.driver](Bench(case))


def _video(pipeline: Any, noise: Tensor, image: Tensor | None = None) -> Tensor:
    torch.manual_seed(SAMPLING_SEED)
    prompts = [f"{PROMPT} {index}" for index in range(noise.shape[0])]
    with torch.no_grad():
        result: tuple[Tensor, Tensor] = pipeline.inference(
            noise, prompts, initial_latent=image, return_latents=True
        )
    return result[1]


def _few_step(bench: Bench) -> Outcome:
    pipeline = bench.few_step()
    image = bench.noise(seed=8, frames=1) if bench.scenario.image else None
    return bench.outcome(video=_video(pipeline, bench.noise(), image))


def _second_video(bench: Bench) -> Outcome:
    pipeline = bench.few_step()
    first = _video(pipeline, bench.noise())
    return bench.outcome(first=first, second=_video(pipeline, bench.noise(seed=9)))


def _cfg(bench: Bench) -> Outcome:
    return bench.outcome(video=_video(bench.cfg(), bench.noise()))


def _overlap(bench: Bench) -> Outcome:
    """Send chunks of which the second repeats the last frame of the first."""
    wrapper, noise = bench.wrapper(), bench.noise()
    caches = bench.allocate()
    results = []
    with torch.no_grad():
        for start in OVERLAPPING_STARTS:
            chunk = noise[:, start : start + bench.scenario.chunk]
            for timestep in (1000, 0):
                chunk = _denoise(wrapper, chunk, timestep, start, caches)[1]
                results.append(chunk)
    return bench.outcome(video=torch.cat(results, dim=1))


def _no_cache(bench: Bench) -> Outcome:
    """Take the path that training takes, where there is no cache."""
    wrapper = bench.wrapper()
    with torch.no_grad():
        flow, clean = _denoise(wrapper, bench.noise(), 500)
    return bench.outcome(flow=flow, clean=clean)


def _gradients(bench: Bench) -> Outcome:
    """Differentiate through one cached pass."""
    wrapper = bench.wrapper()
    _, clean = _denoise(wrapper, bench.noise(), 500, 0, bench.allocate())
    return bench.outcome(clean=clean.detach(), **_attention_gradients(wrapper, clean))


def _gradients_midway(bench: Bench) -> Outcome:
    """Begin a video without gradients, then differentiate through a chunk on the same caches."""
    wrapper, caches, noise = bench.wrapper(), bench.allocate(), bench.noise()
    chunk = bench.scenario.chunk
    with torch.no_grad():
        _, first = _denoise(wrapper, noise[:, :chunk], 1000, 0, caches)
        _denoise(wrapper, first, 0, 0, caches)
    try:
        _, clean = _denoise(wrapper, noise[:, chunk:], 500, chunk, caches)
    except HeadForcingError:
        bench.facts["refused"] = True
        return bench.outcome()
    bench.facts["refused"] = False
    return bench.outcome(clean=clean.detach(), **_attention_gradients(wrapper, clean))


def _attention_gradients(wrapper: Any, clean: Tensor) -> dict[str, Tensor]:
    """Return the gradients of every self-attention weight."""
    torch.autograd.backward(clean.float().square().mean())
    return {
        name: parameter.grad
        for name, parameter in wrapper.named_parameters()
        if "self_attn" in name and parameter.grad is not None
    }


def _removal(bench: Bench) -> Outcome:
    """Make a video, take the library out, and make it again with the same cache dicts."""
    pipeline = bench.few_step()
    facts = _facts(bench, pipeline)
    _video(pipeline, bench.noise())
    outcome = bench.outcome()
    if bench.handle is not None:
        bench.handle.remove()
        facts = _facts(bench, pipeline)
    outcome.facts = facts
    outcome.tensors["video"] = _video(pipeline, bench.noise())
    outcome.tensors["indices"] = bench.indices()
    outcome.passes = bench.passes
    return outcome


def _denoise(
    wrapper: Any,
    noisy: Tensor,
    timestep: int,
    start: int = 0,
    caches: Caches | None = None,
) -> tuple[Tensor, Tensor]:
    """Make one pass; return the flow and the clean prediction."""
    condition = tiny.TextEncoder().to(noisy.dtype)([PROMPT] * noisy.shape[0])
    kv_cache, text_cache = caches or (None, None)
    flow, clean = wrapper(
        noisy_image_or_video=noisy,
        conditional_dict=condition,
        timestep=torch.full(noisy.shape[:2], timestep),
        kv_cache=kv_cache,
        crossattn_cache=text_cache,
        current_start=start * tiny.TOKENS_PER_FRAME,
    )
    return flow, clean


def _facts(bench: Bench, pipeline: Any) -> dict[str, Any]:
    """Describe the model and its caches as far as a library could leave traces in them."""
    model = pipeline.generator.model
    modules = dict(model.named_modules())
    return {
        "modules": [[name, type(module).__qualname__] for name, module in modules.items()],
        "same objects": all(bench.modules.get(name) is item for name, item in modules.items()),
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "state": _digest(model.state_dict()),
        "caches": [[_layout(layer) for layer in stream] for stream in bench.caches],
    }


def _digest(state: dict[str, Tensor]) -> list[list[str]]:
    return [
        [name, hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()]
        for name, value in state.items()
    ]


def _layout(cache: dict[str, Any]) -> dict[str, list[Any]]:
    """Describe a cache dict; the indices are compared with the results."""
    layout: dict[str, list[Any]] = {
        name: [list(value.shape), str(value.dtype)] for name, value in cache.items()
    }
    for name in ("k", "v"):
        layout[name] += [bool((cache[name] == 0).all()), cache[name].untyped_storage().nbytes()]
    return layout


DRIVERS: dict[str, Callable[[Bench], Outcome]] = {
    "few_step": _few_step,
    "second_video": _second_video,
    "cfg": _cfg,
    "overlap": _overlap,
    "no_cache": _no_cache,
    "gradients": _gradients,
    "gradients_midway": _gradients_midway,
    "removal": _removal,
}
