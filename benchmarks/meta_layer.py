"""A layer of the real size on the `meta` device, where nothing is computed: for counting operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from headforcing.apply import apply_head_forcing
from headforcing.apply.handle import HeadForcing
from headforcing.demo.model.attention import DemoCausalSelfAttention, DemoConfig, rope_table
from headforcing.errors import OptionError
from headforcing.measure.memory import DTYPES
from headforcing.measure.sizes import ModelSize
from headforcing.roles import HeadRole


class Layer(nn.Module):
    """A base model of one layer: its KV cache, its input, and the time for roles that depend on the phase.

    Args:
        size: of the model.
        videos: of a batch, `B`.
        device: where its tensors are; not on `meta`, they hold whatever was there.
    """

    def __init__(self, size: ModelSize, videos: int = 1, device: str = "meta") -> None:
        super().__init__()
        if size.itemsize not in DTYPES:
            raise OptionError(f"numbers of {size.itemsize} bytes: expected 2 or 4")
        dtype, dim, tokens = DTYPES[size.itemsize], size.heads * size.head_dim, size.tokens_per_frame
        config = DemoConfig(dim=dim, layers=1, heads=size.heads, chunk=size.chunk, window=size.window)
        with torch.device(device):
            attention = DemoCausalSelfAttention(config).to(dtype)
            self.x = torch.empty(videos, size.chunk * tokens, dim, dtype=dtype)
            shape = (videos, size.window * tokens, size.heads, size.head_dim)
            self.cache = {name: torch.empty(shape, dtype=dtype) for name in ("k", "v")}
        attention.max_attention_size = size.window * tokens
        for name in ("global_end_index", "local_end_index"):  # base models read them, so they are on the CPU
            self.cache[name] = torch.zeros(1, dtype=torch.long)
        self.sizes, self.freqs = torch.tensor([[size.chunk, *size.grid]]), rope_table(config).to(device)
        self.size, self.step = size, size.chunk * tokens
        self.time_embedding, self.blocks = nn.Identity(), nn.ModuleList([attention])
        self.eval().requires_grad_(False)

    def forward(self, chunk: int, t: Tensor) -> Tensor:
        """One pass over a chunk, `[B, L, C]`; the clean one at time 0."""
        lengths = torch.full((len(self.x),), self.step)
        out: Tensor = self.blocks[0](
            self.x, lengths, self.sizes, self.freqs, None, self.cache, chunk * self.step
        )
        return out

    def force(self, row: Sequence[HeadRole], store: str) -> HeadForcing:
        """Head forcing on the layer."""
        return apply_head_forcing(
            self, [list(row)], window=self.size.window, chunk=self.size.chunk, store=store
        )


class ResultAlone(TorchFunctionMode):
    """Softmax attention that computes nothing while entered: a tensor of the right shape."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Everything else runs as it is."""
        given: Mapping[str, Any] = kwargs or {}
        if func is scaled_dot_product_attention:
            return torch.empty_like(given.get("query", args[0] if args else None))
        return func(*args, **given)


def returns_views(func: Any) -> bool:
    """Whether an operator returns views of what it was given, and has nothing to do."""
    kinds = [one.alias_info for one in func._schema.returns]
    return any(kind is not None and not kind.is_write for kind in kinds)
