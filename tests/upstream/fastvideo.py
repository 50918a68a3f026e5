"""FastVideo: its own causal transformer, driven by its own denoising stages on a CPU."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import shims, tiny
from .bench import Bench, Outcome
from .scenarios import BASELINES, HEADS, LAYERS, WRAPPER, Case

UNUSED = ("cloudpickle", "remote_pdb", "scipy", "torchvision")
STAGES = "fastvideo.pipelines.stages.causal_denoising"
BOUNDARY = 0.9
SHIFT = 5.0
SAME_CACHES = ("same_caches", "removal")
"""Drivers whose second video is made with the dicts of the first, as where FastVideo trains."""


class _Hollow(shims._Empty):
    """As its base, with a class of any name in every module."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the module whatever is imported from it."""
        module.__getattr__ = lambda name: _hollow_class(name)  # type: ignore[method-assign]


def _hollow_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


class _Precision:
    """What a module of the checkout takes for `torch`: its only precision, bfloat16, is another one."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.bfloat16 = dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def prepare() -> None:
    """Stand in for packages that are imported and unused, for one process in all groups, and for a GPU."""
    missing = [name for name in UNUSED if importlib.util.find_spec(name) is None]
    sys.meta_path.insert(0, _Hollow(missing))
    stages = importlib.import_module(STAGES)
    state = importlib.import_module("fastvideo.distributed.parallel_state")
    state._SP = state._WORLD = SimpleNamespace(world_size=1, rank_in_group=0, local_rank=0)
    platform = importlib.import_module("fastvideo.platforms").current_platform
    platform.get_attn_backend_cls = lambda *unused: "fastvideo.attention.backends.sdpa.SDPABackend"
    stages.get_local_torch_device = lambda: torch.device("cpu")


class Generator(nn.Module):
    """Calls the transformer as the stages do, where a driver makes single passes.

    Attributes:
        model: the transformer.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        noisy_image_or_video: Tensor,
        conditional_dict: dict[str, Tensor],
        timestep: Tensor,
        current_start: int = 0,
        kv_cache: list[dict[str, Any]] | None = None,
        crossattn_cache: list[dict[str, Any]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the flow and the clean prediction, `[B, F, C, h, w]`."""
        from fastvideo.forward_context import set_forward_context

        cached: dict[str, Any] = {"start_frame": current_start // tiny.TOKENS_PER_FRAME}
        if kv_cache is not None:
            cached |= {"kv_cache": kv_cache, "crossattn_cache": crossattn_cache}
            cached["current_start"] = current_start
            timestep = timestep[:, :1]
        with set_forward_context(current_timestep=0, attn_metadata=None):
            flow = self.model(
                noisy_image_or_video.transpose(1, 2), [conditional_dict["prompt_embeds"]], timestep, **cached
            ).transpose(1, 2)
        noise: Tensor = timestep[:, :1, None, None, None] / 1000
        return flow, (noisy_image_or_video - noise.to(flow.dtype) * flow)


class Pipeline(nn.Module):
    """A denoising stage, with the transformers it was built for.

    Attributes:
        generator: the first transformer, as drivers know it.
        second: the one of little noise, where there are two.
        stage: FastVideo's own.
        options: what the stage is configured with.
    """

    def __init__(self, generator: Generator, second: nn.Module | None, options: SimpleNamespace) -> None:
        super().__init__()
        self.generator, self.second, self.options = generator, second, options
        self.stage: Any = None

    def inference(self, noise: Tensor, prompts: list[str], return_latents: bool) -> tuple[Tensor, Tensor]:
        """Make a video of noise `[B, F, C, h, w]`."""
        batch = SimpleNamespace(
            latents=noise.transpose(1, 2).clone(),
            prompt_embeds=[tiny.TextEncoder().to(noise.dtype)(prompts)["prompt_embeds"]],
            prompt_attention_mask=None,
            num_inference_steps=self.options.steps,
            generator=None,
            pil_image=None,
            image_latent=None,
        )
        video = self.stage.forward(batch, self.options.arguments).latents.transpose(1, 2)
        return video, video


class FastVideo(Bench):
    """Its stages own the caches.

    Attributes:
        handles: of all transformers that our library was applied to.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.handles: list[Any] = []
        self._looking = ExitStack()

    def wrapper(self) -> Any:
        """Build what makes single passes."""
        generator = Generator(self._transformer())
        return self._finish(generator, generator)

    def few_step(self) -> Any:
        """Build the stage of distilled models, or of those that take the scheduler's steps."""
        from fastvideo.models.schedulers.scheduling_self_forcing_flow_match import (
            SelfForcingFlowMatchScheduler,
        )

        two = self.scenario.driver == "two_transformers"
        second = self._transformer(other=True) if two else None
        generator = Generator(self._transformer())
        options = SimpleNamespace(steps=len(self.scenario.steps), arguments=self._arguments(two))
        pipeline = self._finish(Pipeline(generator, second, options), generator)
        stages = importlib.import_module(STAGES)
        stages.torch = _Precision(self.dtype)
        scheduler = SelfForcingFlowMatchScheduler(shift=SHIFT, sigma_min=0.0, extra_one_step=True)
        scheduler.set_timesteps(1000)
        name = "CausalDenoisingStage" if self.scenario.driver == "many_step" else "CausalDMDDenosingStage"
        pipeline.stage = getattr(stages, name)(generator.model, scheduler, second)
        self._keep_caches(pipeline.stage)
        return pipeline

    def outcome(self, **tensors: Tensor) -> Outcome:
        """Collect what the run left behind, calls of all transformers."""
        outcome = super().outcome(**tensors)
        if self.handles:
            outcome.calls = sum(handle.status().calls for handle in self.handles)
        return outcome

    def _apply(self, model: Any) -> None:
        super()._apply(model)
        self.handles.append(self.handle)
        grids = self.facts["grids"] = []

        def look(observation: Any) -> None:
            grid = list(observation.call.grid)
            grids.extend([] if grid in grids else [grid])

        self._looking.enter_context(self.handle.observe(look))

    def _keep_caches(self, stage: Any) -> None:
        """Remember what the stage allocates, or have it count from zero again in the same dicts."""
        allocate = stage._initialize_kv_cache
        if self.scenario.driver in SAME_CACHES:
            self.allocate()

        def remember(**sizes: Any) -> list[dict[str, Any]]:
            if self.scenario.driver not in SAME_CACHES:
                self.caches.append(allocate(**sizes))
            for layer in self.caches[-1]:
                for index in tiny.INDICES:
                    layer[index].fill_(0)
            return self.caches[-1]

        stage._initialize_kv_cache = remember

    def _transformer(self, other: bool = False) -> Any:
        """Build the causal transformer in the tiny size, or another one, and apply our library to it."""
        from fastvideo.configs.models.dits.wanvideo import WanVideoArchConfig, WanVideoConfig
        from fastvideo.models.dits.causal_wanvideo import CausalWanTransformer3DModel

        sizes = WanVideoArchConfig(
            num_attention_heads=HEADS,
            attention_head_dim=tiny.HEAD_DIM,
            text_dim=tiny.TEXT_DIM,
            freq_dim=64,
            ffn_dim=192,
            num_layers=LAYERS,
            local_attn_size=self.scenario.window,
            sink_size=self.scenario.sink,
            num_frames_per_block=self.scenario.chunk,
            rope_cache_policy="relativistic" if self.scenario.raw_keys else "absolute",
        )
        sizes.text_len = tiny.TEXT_LENGTH
        model: Any = CausalWanTransformer3DModel(WanVideoConfig(arch_config=sizes), {}).eval()
        self._weights = tiny.seeded_weights(model)
        if other:
            model.load_state_dict({name: value.roll(1, -1) for name, value in self._weights.items()})
            model.register_forward_pre_hook(self._count)
        self.modules = dict(model.named_modules())
        if self.case.policy not in (*BASELINES, WRAPPER):
            self._apply(model)
        return model

    def _arguments(self, two: bool) -> SimpleNamespace:
        text = SimpleNamespace(arch_config=SimpleNamespace(text_len=tiny.TEXT_LENGTH))
        return SimpleNamespace(
            disable_autocast=True,
            pipeline_config=SimpleNamespace(
                dmd_denoising_steps=list(self.scenario.steps),
                warp_denoising_step=True,
                dit_config=SimpleNamespace(boundary_ratio=BOUNDARY if two else None),
                text_encoder_configs=[text],
                context_noise=0,
            ),
        )
