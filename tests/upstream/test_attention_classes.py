"""Real classes that sit the conformance kit: a whole model, or attention and cache in blocks of ours.

The latter are taken out of their files, where their packages need a GPU to be imported; kernels (attention,
rotation) are ours.
"""

from __future__ import annotations
import __future__

import ast
import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import headforcing as hf
from headforcing.adapters.verified import digest
from headforcing.integrations.matrix_game2 import ADAPTER as MATRIX_GAME_2
from headforcing.integrations.sglang import ADAPTER as SGLANG
from headforcing.testing import Host, check_adapter
from tests.hosts.fastvideo import SINK, WINDOW, turned
from tests.hosts.sglang import SGLangHost
from tests.hosts.standin import DIM, HEADS, TOKENS, dtype_of, noise_of

from . import fastvideo, tiny
from .harness import checkout_of
from .shims import make_importable, plain_attention

pytestmark = pytest.mark.upstream
THE_HOSTS_OWN = {"release_frees", "cache_comes_back"}  # it writes the caches of mouse and keyboard by itself
"""Checks that Matrix-Game 2 fails as it is."""
ACTION_DIM = 64
"""Of Matrix-Game 2's attention to mouse and keyboard, which is written in its RoPE."""


def alone(checkout: str, module: str, *names: str, **given: Any) -> ModuleType:
    """Some classes and functions of a module, with what they are given in place of what it imports."""
    path = (checkout_of(checkout, module) / module.replace(".", "/")).with_suffix(".py")
    nodes = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in names]
    made = ModuleType(f"alone.{module}")
    made.__dict__.update(__file__=str(path), math=math, torch=torch, nn=nn, **given)
    sys.modules[made.__name__] = made  # dataclasses and inspect look there
    unevaluated = __future__.annotations.compiler_flag
    exec(compile(ast.Module(nodes, []), str(path), "exec", unevaluated), made.__dict__)
    return made


class Attend(nn.Module):
    """In place of a kernel for GPUs."""

    def __init__(self, **unused: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q, k, v)


class RealSGLang(SGLangHost):
    """Its attention and its cache, in our block."""

    def __init__(self, numbers: int | None, sink: int = SINK) -> None:
        folder = "sglang.multimodal_gen.runtime"
        self.sink, self.numbers = sink, numbers
        self.wan = alone(
            "sglang",
            f"{folder}.models.dits.causal_wanvideo",
            "CausalWanSelfAttention",
            LocalAttention=Attend,
            flex_attention=flex_attention,
            AttentionBackendEnum=SimpleNamespace(FA=0, AITER=1, TORCH_SDPA=2),
            _apply_rotary_emb=lambda x, cos, sin, is_neox_style: turned(x, (cos, sin)),
        )
        self.held = alone(
            "sglang",
            f"{folder}.layers.kvcache.causal_attention_cache",
            "CausalAttentionKVView",
            "CausalSelfAttentionKVCache",
            dataclass=dataclass,
        )
        self.memory = hf.roles.SlidingWindow(WINDOW, sink, positions="absolute")

    def made(self) -> nn.Module:
        return self.wan.CausalWanSelfAttention(DIM, HEADS, WINDOW, self.sink)

    def cache(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        return self.held.CausalSelfAttentionKVCache(
            *(torch.zeros(shape, dtype=dtype) for _ in range(2)),
            *(torch.zeros(1, dtype=torch.long) for _ in range(2)),
            self.numbers,
            self.numbers,
            shape[1],
            self.sink * TOKENS,
        )

    def new_video(self, model: nn.Module, caches: Any) -> None:
        for cache, cross in zip(caches["kv"], caches["cross"], strict=True):
            cross["is_init"] = False
            cache.reset_indices()


@pytest.mark.parametrize("numbers", [0, None])
@pytest.mark.parametrize("sink", [0, SINK, 3])
def test_sglang_passes_the_kit(numbers: int | None, sink: int) -> None:
    host = RealSGLang(numbers, sink)
    assert digest(host.made()) in SGLANG.verified
    check_adapter(SGLANG, host).raise_if_failed()
    assert set(SGLANG.own_memory(host.model())) == {host.memory}


class RealMatrixGame2(Host):
    """Its whole model, with mouse and keyboard in the first block."""

    frames, dense, window, batches = 18, 9, 9, False

    def __init__(self, sink: int, policy: str) -> None:
        make_importable(checkout_of("FastVideo"))
        fastvideo.prepare()
        self.sink, self.policy = sink, policy
        positions = "compact" if policy == "relativistic" else "absolute"
        self.memory = hf.roles.SlidingWindow(WINDOW, sink, positions=positions)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        from fastvideo.configs.models.dits.matrixgame2 import (
            MatrixGame2WanVideoArchConfig,
            MatrixGame2WanVideoConfig,
        )
        from fastvideo.models.dits.matrixgame2 import action_module, causal_model

        causal_model.flex_attention = action_module.flex_attention = flex_attention
        sizes = MatrixGame2WanVideoArchConfig(
            num_attention_heads=4,
            attention_head_dim=tiny.HEAD_DIM,
            freq_dim=64,
            ffn_dim=192,
            num_layers=self.layers,
            image_dim=tiny.TEXT_DIM,
            in_channels=tiny.CHANNELS,
            out_channels=tiny.CHANNELS,
            local_attn_size=WINDOW,
            sink_size=self.sink,
            rope_cache_policy=self.policy,
            action_config={
                **MatrixGame2WanVideoArchConfig().action_config,
                "blocks": [0],
                "heads_num": 1,
                "hidden_size": 32,
                "img_hidden_size": 4 * tiny.HEAD_DIM,
                "keyboard_hidden_dim": ACTION_DIM,
                "mouse_hidden_dim": ACTION_DIM,
            },
        )
        made: Any = causal_model.CausalMatrixGame2WanModel(MatrixGame2WanVideoConfig(arch_config=sizes), {})
        made.load_state_dict(tiny.seeded_weights(made))
        return made.eval().requires_grad_(False).to(dtype)

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        def caches(*shape: int) -> list[dict[str, Any]]:
            dtype = dtype_of(model)
            counters = ("global_end_index", "local_end_index")
            return [
                {name: torch.zeros(shape, dtype=dtype) for name in ("k", "v")}
                | {name: torch.zeros(1, dtype=torch.long) for name in counters}
                for _ in range(self.layers)
            ]

        tokens = tiny.TOKENS_PER_FRAME
        return {
            "kv_cache": caches(batch, WINDOW * tokens, 4, tiny.HEAD_DIM),
            "kv_cache_mouse": caches(batch * tokens, WINDOW, 1, ACTION_DIM),
            "kv_cache_keyboard": caches(batch, WINDOW, 1, ACTION_DIM),
            "crossattn_cache": tiny.text_caches(batch, dtype_of(model))[: self.layers],
        }

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        from fastvideo.forward_context import set_forward_context

        dtype, batch = dtype_of(model), len(caches["kv_cache"][0]["k"])
        seen = 1 + 4 * (start + frames - 1)
        with set_forward_context(current_timestep=0, attn_metadata=None):
            out: Tensor = model(
                noise_of((batch, tiny.CHANNELS, frames, *tiny.LATENT), start, draw, dtype),
                None,
                torch.full((batch, frames), 100 * (draw % 10)),
                noise_of((batch, 7, tiny.TEXT_DIM), 0, 999, dtype),
                mouse_cond=noise_of((batch, 100, 2), 0, 998, dtype)[:, :seen],
                keyboard_cond=noise_of((batch, 100, 4), 0, 997, dtype)[:, :seen],
                current_start=start * tiny.TOKENS_PER_FRAME,
                start_frame=start,
                num_frame_per_block=frames,
                **caches,
            )
        return out

    def new_video(self, model: nn.Module, caches: Any) -> None:
        caches.update(self.caches(model, len(caches["kv_cache"][0]["k"])))


@pytest.mark.parametrize("policy", ["absolute", "relativistic"])
@pytest.mark.parametrize("sink", [0, SINK])
def test_matrix_game_2_passes_the_kit_with_mouse_and_keyboard(sink: int, policy: str) -> None:
    host = RealMatrixGame2(sink, policy)
    model = host.model()
    assert {digest(module) for _, module in MATRIX_GAME_2.attentions(model)} <= MATRIX_GAME_2.verified.keys()
    report = check_adapter(MATRIX_GAME_2, host)
    assert {result.name for result in report.failed} == THE_HOSTS_OWN, str(report)
    assert set(MATRIX_GAME_2.own_memory(model)) == {host.memory}
