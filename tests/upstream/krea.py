"""Krea Realtime 14B: its own server's sessions, tiny, on a CPU."""

from __future__ import annotations

import os
import sys
from types import CodeType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from . import tiny
from .bench import Bench

SERVED_WITH = ("cv2", "dotenv", "fastapi", "fastapi.middleware.cors", "fastapi.responses", "msgpack")
PIXELS = 8
"""Side of the square that a latent stands for."""
STEPS = 5
TRAINED_ON = 0.05


def prepare() -> None:
    """Stand in for the web server, which is imported and unused, and for streams of a GPU."""
    os.environ["DISABLE_SAGEATTENTION"] = "1"
    sys.modules |= {name: MagicMock() for name in SERVED_WITH}
    torch.cuda.Stream, torch.cuda.Event = MagicMock(), MagicMock()


class Krea(Bench):
    """Builds the pipeline of the server, and makes videos by its sessions."""

    def few_step(self) -> Any:
        """Build the pipeline, and fuse projections as its server does."""
        import release_server
        from pipeline import CausalInferencePipeline
        from wan.modules import causal_model, model

        torch.cuda.current_device = lambda: "cpu"
        release_server.gpu = "cpu"
        release_server.encode_video_latent = encoded
        model.FLASH_ATTN_2_AVAILABLE = True
        causal_model.flex_attention = flex_attention if self.scenario.flex else by_chunks
        forward = causal_model.CausalWanSelfAttention.forward
        forward.__code__ = in_tiny_frames(forward.__code__)
        pipeline = self.pipeline(CausalInferencePipeline)
        if self.scenario.fused:
            generator = torch.Generator().manual_seed(5)
            for block in pipeline.generator.model.blocks:
                block.self_attn.fuse_projections()
                weight = block.self_attn.to_qkv.weight
                weight.data += (TRAINED_ON * torch.randn(weight.shape, generator=generator)).to(weight)
        return pipeline.eval().requires_grad_(False)

    def session(self, pipeline: Any, seed: int = 0) -> Tensor:
        """Make one video in a session of the server."""
        import release_server

        params = release_server.GenerateParams(
            prompt="a red cube rolls down the stairs",
            width=tiny.LATENT[1] * PIXELS,
            height=tiny.LATENT[0] * PIXELS,
            seed=seed,
            kv_cache_num_frames=self.scenario.context,
            num_blocks=self.scenario.frames // self.scenario.chunk,
            num_denoising_steps=STEPS,
        )
        models = SimpleNamespace(
            pipeline=pipeline,
            transformer=pipeline.generator,
            text_encoder=pipeline.text_encoder,
            vae_encoder=None,
            vae_decoder=decoded,
        )
        with As(self.dtype), torch.inference_mode():
            session = release_server.GenerationSession(
                params, SimpleNamespace(use_taehv=False), frame_callback=MagicMock(), models=models
            )
            while session.generate_block_internal(models) is not None:
                pass
        self.caches = [pipeline.kv_cache1]
        return session.all_latents.clone()


class As(TorchFunctionMode):
    """Takes bfloat16, which is written in the server, for another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call with the other type."""
        told = dict(kwargs or {})
        if told.get("dtype") == torch.bfloat16:
            told["dtype"] = self.dtype
        return func(*args, **told)


def in_tiny_frames(code: CodeType) -> CodeType:
    """The code of the attention, in which the tokens of a frame are written as a number."""
    consts = tuple(tiny.TOKENS_PER_FRAME if const == 1560 else const for const in code.co_consts)
    return code.replace(co_consts=consts)


def by_chunks(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, **unused: object) -> Tensor:
    """Attention of `[B, H, L, D]` under a mask, queries that see alike at once; of padding, zeros."""
    places, real = torch.arange(query.shape[2]), int(query[0, 0].any(-1).sum())
    seen = block_mask.mask_mod(0, 0, places[:real, None], places)
    alike, counts = seen.unique_consecutive(dim=0, return_counts=True)
    outs = []
    for row, own in zip(alike, query[:, :, :real].split(counts.tolist(), dim=2), strict=True):
        outs.append(scaled_dot_product_attention(own, key[:, :, row], value[:, :, row]))
    return torch.cat([*outs, torch.zeros_like(query[:, :, real:])], dim=2)


def decoded(latents: Tensor, *cache: Any) -> tuple[Tensor, list[Any]]:
    """Stand in for the decoder: four frames of pixels per latent."""
    return latents.repeat_interleave(4, dim=1), list(cache)


def encoded(vae: Any, cache: list[Any], *, frames: Tensor, **unused: object) -> tuple[Tensor, list[Any]]:
    """Stand in for the encoder, through which a frame comes back changed."""
    return 0.9 * frames.transpose(0, 1), cache
