"""AnyFlow FAR of diffusers itself, tiny, with random weights.

Its attention is computed by PyTorch's SDPA, chunk by chunk, where diffusers calls flex attention, which is
slow unless it is compiled, and rounds otherwise. All else is diffusers' code.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from headforcing.testing.host import Host
from tests.hosts.standin import dtype_of, noise_of, randomised_norms

DIFFUSERS = "diffusers.models.transformers.transformer_anyflow_far"
CHANNELS, HEIGHT, WIDTH = 5, 4, 8  # of the latents: 2 x 4 patches in full, 1 x 2 coarse ones
TOKENS = (8, 2)
WORDS = 8
LATENT_CHANNELS = {"in_channels": CHANNELS, "out_channels": CHANNELS, "text_dim": WORDS}
SIZE = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 48, "freq_dim": 16}


class AnyFlowFARHost(Host):
    """Chunks of two frames, of which the cache keeps two in full and older ones coarsely."""

    unconcerned = frozenset(
        {
            "rotation_of_merged_patches",
            "counters_move",
            "prompt_switch_takes_effect",
            "edited_cache_refused",
            "parity_through_eviction",
            "parity_through_eviction_bf16",
            "compiled_is_one_operator",
        }
    )
    chunk, frames, dense, window, single = 2, 12, 12, 12, True

    def missing(self) -> str | None:
        """See `Host.missing`."""
        try:
            importlib.import_module(DIFFUSERS)
        except ImportError as error:
            return f"it comes with diffusers >= 0.42 ({error}): pip install 'headforcing[frameworks]'"
        return None

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """See `Host.model`."""
        far = importlib.import_module(DIFFUSERS)
        chunks = (self.chunk,) * (self.frames // self.chunk)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = far.AnyFlowFARTransformer3DModel(
                **SIZE, **LATENT_CHANNELS, rope_max_seq_len=64, chunk_partition=chunks
            )
        for block in model.blocks:
            block.attn1.set_processor(_on_sdpa()())
        model.rope._build_freqs(torch.device("cpu"))  # it keeps its table, which is no trace of ours
        model = randomised_norms(model).eval().requires_grad_(False)
        made: nn.Module = nn.Module.to(model, dtype)  # diffusers' own warns
        return made

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """See `Host.caches`; with the chunks so far, which every clean pass brings again."""
        config: Any = model.config
        slots = {
            "full_cache": config.full_chunk_limit * self.chunk * TOKENS[0],
            "compressed_cache": self.frames * TOKENS[1],
        }
        heads, dtype = (config.num_attention_heads, config.attention_head_dim), dtype_of(model)
        kv = {
            layer: {
                name: torch.zeros(2, batch, heads[0], tokens, heads[1], dtype=dtype)
                for name, tokens in slots.items()
            }
            for layer in range(config.num_layers)
        }
        return {"kv": kv, "chunks": {}}

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """See `Host.call`; of a clean pass, of which the model says nothing, what leaves its last block."""
        batch = caches["kv"][0]["full_cache"].shape[1]
        caches["chunks"][start] = noise_of(_latents(batch, frames), start, draw, dtype_of(model))
        if draw % 10:
            out: Tensor = _pass(model, caches, [caches["chunks"][start]], start, 100 * (draw % 10))
            return out
        nothing = torch.zeros(_latents(batch, frames), dtype=dtype_of(model))
        past = [caches["chunks"].get(one, nothing).to(nothing.dtype) for one in range(0, start + 1, frames)]
        left: list[Tensor] = []
        blocks: Any = model.blocks
        hook = blocks[-1].register_forward_hook(lambda module, args, y: left.append(y))
        _pass(model, caches, past, start, 0)
        hook.remove()
        return left[0][:, -frames * TOKENS[0] :]

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """See `Host.new_video`."""
        caches.update(self.caches(model, caches["kv"][0]["full_cache"].shape[1]))

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """See `Host.cached`; asked for two chunks, which are full."""
        k, v = caches["kv"][layer]["full_cache"].transpose(2, 3)
        end = int(v[0].flatten(1).any(1).sum())
        rope: Any = model.rope
        turns = rope._forward_full_frame(end // TOKENS[0], HEIGHT // 2, WIDTH // 2, k.device).flatten(0, 2)
        pairs = torch.view_as_complex(k[:, :end].double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(k.dtype), v[:, :end]

    def uncached(self, model: nn.Module) -> Tensor:
        """See `Host.uncached`."""
        out: Tensor = model(
            noise_of(_latents(1, 4), 0, 0, dtype_of(model)),
            times := torch.full((1, 4), 300),
            times,
            noise_of((1, 3, WORDS), 0, 999, dtype_of(model)),
            chunk_partition=[2, 2],
            return_dict=False,
        )[0]
        return out


@functools.cache
def _on_sdpa() -> Any:
    """The host's class of processors with `attend` in place of the kernel that they dispatch to."""
    far = importlib.import_module(DIFFUSERS)
    known = far.AnyFlowCausalAttnProcessor
    code, defaults = known.__call__.__code__, known.__call__.__defaults__
    call = FunctionType(code, {**vars(far), "dispatch_attention_fn": attend}, "__call__", defaults)
    return type("OnSDPA", (known,), {"__call__": call, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """The class of processors, for pickle."""
    if name == "OnSDPA":
        return _on_sdpa()
    raise AttributeError(f"{__name__} has no {name}")


def attend(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Any, scale: float | None, **rest: Any) -> Tensor:
    """Attention of `[B, L, H, D]`, one call per chunk of a mask; padded queries see nothing."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.zeros_like(q)
    tokens = int(q[0, 0].any(-1).sum())
    if attn_mask is None:
        out[:, :, :tokens] = scaled_dot_product_attention(q[:, :, :tokens], k, v, scale=scale)
        return out.transpose(1, 2)
    places = torch.arange(tokens)
    seen = attn_mask.mask_mod(0, 0, places[:, None], places)
    alike, counts = seen.unique_consecutive(dim=0, return_counts=True)
    first = 0
    for row, count in zip(alike, counts.tolist(), strict=True):
        own = slice(first, first := first + count)
        seen_k, seen_v = (x[:, :, :tokens][:, :, row] for x in (k, v))
        out[:, :, own] = scaled_dot_product_attention(q[:, :, own], seen_k, seen_v, scale=scale)
    return out.transpose(1, 2)


def _latents(batch: int, frames: int) -> tuple[int, ...]:
    return batch, frames, CHANNELS, HEIGHT, WIDTH


def _pass(model: nn.Module, caches: Mapping[str, Any], chunks: list[Tensor], start: int, time: int) -> Any:
    """One pass over the last of some chunks of one length, or at time 0 over all of them."""
    latents, frames = torch.cat(chunks, dim=1), chunks[-1].shape[1]
    times = torch.full(latents.shape[:2], time)
    return model(
        hidden_states=latents,
        timestep=times,
        r_timestep=times // 2,
        encoder_hidden_states=noise_of((len(latents), 3, WORDS), 0, 999, dtype_of(model)),
        chunk_partition=[frames] * (start // frames + 1),
        kv_cache=caches["kv"],
        kv_cache_flag={"num_cached_chunks": start // frames, "is_cache_step": time == 0},
        return_dict=False,
    )[0]
