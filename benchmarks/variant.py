"""One self-attention module whose projections return what is there already: dense, or head-forced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attention_presets import cycle_of
from measuring import CHUNK, FILL, PASSES, Case, Counted, finish, without_softmax_attention
from torch import Tensor, nn

import headforcing as hf
from headforcing.demo.model import attention as demo
from headforcing.roles import HeadRole

SCOPE = "self-attention without projections"
WARM_UP = f"{FILL} chunks without softmax attention, then 2 passes with it"


class Prepared(nn.Module):
    """Stands for a projection: returns a tensor that is there already."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs, self.turn = inputs, 0

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, C]`, another one for every pass."""
        return self.inputs[self.turn % len(self.inputs)]


class Variant:
    """One way to attend, its cache, and a video that goes on and on.

    Args:
        name: what to call it.
        roles: one per head; none: dense.
        case: its size.
        backend: name of the backend, of the head-forced side.
        options: what else head forcing is applied with.
    """

    def __init__(
        self, name: str, roles: Sequence[HeadRole], case: Case, backend: str, options: dict[str, Any]
    ) -> None:
        self.name, self.roles, self.case = name, roles, case
        dim = case.heads * case.head_dim
        sizes = {"chunk": CHUNK, "window": case.window, "rope_rows": case.rope_rows}
        config = demo.DemoConfig(dim=dim, layers=1, heads=case.heads, **sizes)
        model = nn.ModuleList([demo.DemoCausalSelfAttention(config)]).eval().requires_grad_(False)
        module: Any = model[0]
        module.max_attention_size = case.window * case.tokens
        self.projections = {name: Prepared(prepared_inputs(case, name)) for name in "qkv"}
        for part in ("q", "k", "v", "o", "norm_q", "norm_k"):
            setattr(module, part, self.projections.get(part, nn.Identity()))
        shape = (1, case.window * case.tokens, case.heads, case.head_dim)
        self.cache = {n: torch.zeros(shape, dtype=case.dtype, device=case.device) for n in ("k", "v")}
        for index in ("global_end_index", "local_end_index"):
            self.cache[index] = torch.zeros(1, dtype=torch.long, device=case.device)
        self.grid = torch.tensor([[CHUNK, case.height, case.width]])
        self.freqs = demo.rope_table(config).to(case.device)
        self.cycle = cycle_of(list(roles), case.window, CHUNK)
        self.backend = Counted(backend, case.tokens)
        self.handle: Any = None
        if roles:
            self.handle = hf.apply_head_forcing(
                model, [roles], window=case.window, backend=self.backend, **options
            )
        self.module, self.chunk = model[0], 0

    @property
    def attended(self) -> float:
        """Frames that a query saw, mean over heads and over the passes of whole cycles that were run last."""
        last = self.backend.seen[-PASSES * self.cycle :]
        return sum(last) / len(last) if last else float(self.case.window)

    @property
    def stored(self) -> int:
        """Bytes of keys and values that are held."""
        if self.handle is not None:
            return int(self.handle.status().stored_bytes)
        return sum(self.cache[name].nbytes for name in ("k", "v"))

    def run(self, number: int) -> Tensor:
        """One pass over the chunk that has its turn."""
        for projection in self.projections.values():
            projection.turn = self.chunk + number
        start = self.chunk * CHUNK * self.case.tokens
        x = self.projections["q"](None)
        with torch.no_grad():
            out: Tensor = self.module(x, None, self.grid, self.freqs, None, self.cache, start)
            finish(self.case.device)
        return out


def prepared_inputs(case: Case, name: str) -> list[Tensor]:
    """Random queries, keys or values; the same ones for every variant."""
    generator = torch.Generator().manual_seed("qkv".index(name))
    shape = (1, CHUNK * case.tokens, case.heads * case.head_dim)
    return [torch.randn(shape, generator=generator).to(case.device, case.dtype) for _ in range(4)]


def fill(chosen: Sequence[Variant]) -> None:
    """Brings every memory into steady state."""
    with without_softmax_attention():
        for variant in chosen:
            for _ in range(FILL):
                variant.run(PASSES - 1)
                variant.chunk += 1


def facts_of(variant: Variant, store: str) -> dict[str, Any]:
    """What a row is about."""
    forced = variant.handle is not None
    return {
        "scope": SCOPE,
        "warm_up": WARM_UP,
        "backend": variant.backend.name if forced else "sdpa, of the host",
        "store": store if forced else "the host's cache",
        "dtype": variant.case.kind,
        "device": variant.case.device,
    }
