"""Real attention and cache classes in blocks of ours, where their packages need a GPU to be imported.

The classes are taken out of their files; kernels (attention, rotation) are ours.
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
from headforcing.integrations.sglang import ADAPTER as SGLANG
from headforcing.testing import check_adapter
from tests.hosts.fastvideo import SINK, WINDOW, turned
from tests.hosts.sglang import SGLangHost
from tests.hosts.standin import DIM, HEADS, TOKENS

from .harness import checkout_of
from .shims import plain_attention

pytestmark = pytest.mark.upstream


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
