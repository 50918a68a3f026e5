"""A stand-in for Matrix-Game 2 in FastVideo: FastVideo's model, whose attention makes its RoPE itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.hosts.fastvideo import FastVideoAttention, FastVideoHost, Tables, tables_of
from tests.hosts.standin import GRID, TOKENS


class MatrixGame2Attention(FastVideoAttention):
    """The grid comes as three numbers; the given tables are not used."""

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        freqs_cis: Tables,
        block_mask: Any,
        grid_sizes: tuple[int, int, int],
        kv_cache: dict[str, Any] | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
    ) -> Tensor:
        """Attends from `q [B, L, H, D]` to the cache, which it writes; to itself where there is none."""
        first = current_start // TOKENS if kv_cache is not None else 0
        late = self.rope_cache_policy == "relativistic" and kv_cache is not None
        if not late:
            q, k = turned(q, first), turned(k, first)
        if kv_cache is not None:
            end = self._write(kv_cache, k, v, current_start, self.sink_size * TOKENS)
            k, v = kv_cache["k"][:, :end], kv_cache["v"][:, :end]
            if late:
                q, k = turned(q, (end - q.shape[1]) // TOKENS), turned(k, 0)
        out: Tensor = self.attn(q, k, v)
        return out


class MatrixGame2Host(FastVideoHost):
    """A stand-in with Matrix-Game 2's interface: nine frames and a sink."""

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """See `Host.model`."""
        model = super().model(dtype)
        for block in model.blocks:
            block.attn1, block.told = MatrixGame2Attention(self.policy).eval(), {"grid_sizes": None}
            block.register_forward_pre_hook(_tell_grid)
        return model

    def cached(self, model: Any, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """Keys as they are rotated when they are read."""
        cache = caches["kv"][layer]
        end = int(cache["local_end_index"])
        k = cache["k"][:, :end]
        return (turned(k, 0) if self.policy == "relativistic" else k), cache["v"][:, :end]


def _tell_grid(block: Any, args: tuple[Tensor, ...]) -> None:
    block.told["grid_sizes"] = (args[0].shape[1] // TOKENS, *GRID)


def turned(x: Tensor, first: int) -> Tensor:
    """`x [B, L, H, D]` rotated as frames from `first` on, in float64."""
    cos, sin = (table[:, None, ::2] for table in tables_of(first, x.shape[1] // TOKENS))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
