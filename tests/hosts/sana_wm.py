"""Stage 2 of SANA-WM from diffusers itself, tiny, with random weights.

The model is diffusers'; the calls are those of its pipeline, which refines whole videos only. The kit asks
for chunks of three frames from the first on, so the sink is three frames, and comes in noisy passes as well.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.integrations.sana_wm import SanaWM
from headforcing.roles import HeadRole, Local
from headforcing.testing.host import Host
from tests.hosts.standin import dtype_of, noise_of, randomised_norms

DIFFUSERS = "diffusers.models.transformers.transformer_sana_wm_refiner"
GRID, TOKENS, CHANNELS, WORDS, FPS = (2, 4), 8, 5, 6, 16.0
SIZE = {"in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2, "caption_channels": 8}
VIDEO = {"num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32}
UNUSED = {f"audio_{name}": 4 for name in ("in_channels", "out_channels", "attention_head_dim")}
AUDIO = {**UNUSED, "audio_num_attention_heads": 2, "audio_cross_attention_dim": 8}


@dataclass
class Caches:
    """What the pipeline holds while it refines a video.

    Attributes:
        kv: its cache.
        batch: samples.
        prompt: number of the prompt.
        sink: first frames.
        history: frames behind them that the cache holds.
        start: first frame of the chunk that is refined.
        before: what `history` was when that began, and the history of every layer.
    """

    kv: Any
    batch: int
    prompt: int = 0
    sink: int = 0
    history: int = 0
    start: int = -1
    before: tuple[int, list[Any]] = (0, [])

    def begin(self, start: int, frames: int) -> None:
        """A pass begins; the same chunk again is refined beside what it was refined beside before."""
        if start == 0:
            self.kv.clear()
            self.sink, self.history = frames, 0
        elif start == self.start:
            self.history = self.before[0]
            for layer, (k, v) in zip(self.kv.layer_caches, self.before[1], strict=True):
                layer.store_history(k, v)
        held = [(layer.history_k, layer.history_v) for layer in self.kv.layer_caches]
        self.start, self.before = start, (self.history, held)

    def end(self, frames: int, most: int) -> None:
        """A clean pass is over: keeps what was captured, and the last `most` frames of the history."""
        if not self.start:
            for layer in self.kv.layer_caches:
                layer.store_sink(*layer.get_captured_pre_rope())
            return
        self.history = min(self.history + frames, most)
        for layer in self.kv.layer_caches:
            new, old = layer.get_captured_post_rope(), layer.get_history()
            rows = new if old is None else [torch.cat(pair, 1) for pair in zip(old, new, strict=True)]
            layer.store_history(*(x[:, -self.history * TOKENS :] for x in rows))


class SanaWMHost(Host):
    """Blocks of three frames beside a sink of three and a history of eight.

    Attributes:
        rope_type: how pairs of channels lie; LTX-2 splits heads in halves.
        gated: whether every head has a gate.
    """

    unconcerned = frozenset(
        {"edited_cache_refused", "release_frees", "cache_comes_back", "compiled_is_one_operator"}
    )
    chunk, frames, dense, window, single = 3, 18, 12, 14, True
    adapter = SanaWM(sink_frames=3)
    memory: HeadRole = Local(8, 3, positions="adjoining")
    rope_type = "split"
    gated = False

    def missing(self) -> str | None:
        """See `Host.missing`."""
        try:
            importlib.import_module(DIFFUSERS)
        except ImportError as error:
            return f"it comes with diffusers >= 0.42 ({error}): pip install 'headforcing[frameworks]'"
        return None

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """See `Host.model`."""
        kind = importlib.import_module(DIFFUSERS).SanaWMLTX2RefinerTransformer3DModel
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = kind(**SIZE, **VIDEO, **AUDIO, rope_type=self.rope_type, gated_attn=self.gated)
        model = randomised_norms(model).eval().requires_grad_(False)
        made: nn.Module = nn.Module.to(model, dtype)  # diffusers' own warns
        return made

    def caches(self, model: nn.Module, batch: int = 1) -> Caches:
        """See `Host.caches`."""
        made = Caches(None, batch)
        self.new_video(model, made)
        return made

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """See `Host.new_video`; every call of the pipeline makes a cache."""
        caches.kv = importlib.import_module(DIFFUSERS).SanaWMRefinerKVCache(self.layers)
        caches.start = -1

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """See `Host.call`."""
        clean = draw % 10 == 0
        caches.begin(start, frames)
        if start:
            sink = start - caches.history - caches.sink
            caches.kv.sink_pe = self.rope(model, range(sink, sink + caches.sink), caches.batch)
        ending = "inject_and_capture_post_rope" if start else "capture_pre_rope"
        out: Tensor = model(
            hidden_states=noise_of((caches.batch, frames * TOKENS, CHANNELS), start, draw, dtype_of(model)),
            encoder_hidden_states=noise_of((caches.batch, WORDS, 8), 0, 999 + caches.prompt, dtype_of(model)),
            timestep=torch.full((caches.batch, frames * TOKENS), 100.0 * (draw % 10)),
            video_rotary_emb=self.rope(model, range(start, start + frames), caches.batch),
            kv_cache=caches.kv,
            kv_cache_mode=ending if clean else "inject",
            return_dict=False,
        )[0]
        if clean:
            caches.end(frames, self.window - self.chunk - caches.sink)
        return out

    def rope(self, model: Any, frames: range, batch: int) -> tuple[Tensor, Tensor]:
        """Rows of RoPE for frames, as the pipeline has them made."""
        where = (*GRID, torch.device("cpu"), FPS)
        made: tuple[Tensor, Tensor] = model.build_rotary_emb_for_absolute_positions(
            batch, list(frames), *where
        )
        return made

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        """See `Host.cached`; the sink as it is rotated when it is read."""
        own = caches.kv.get(layer)
        apply = getattr(importlib.import_module(DIFFUSERS), f"apply_{self.rope_type}_rotary_emb")
        sink = apply(own.sink_k_pre, self.rope(model, range(caches.sink), caches.batch))
        history = own.get_history()
        pairs = [(sink, own.sink_v)] if history is None else [(sink, own.sink_v), history]
        k, v = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
        heads = VIDEO["num_attention_heads"]
        return k.unflatten(2, (heads, -1)), v.unflatten(2, (heads, -1))

    def uncached(self, model: nn.Module) -> Tensor:
        """See `Host.uncached`."""
        out: Tensor = model(
            hidden_states=noise_of((1, 3 * TOKENS, CHANNELS), 0, 0, dtype_of(model)),
            encoder_hidden_states=noise_of((1, WORDS, 8), 0, 999, dtype_of(model)),
            timestep=torch.zeros(1, 3 * TOKENS),
            video_rotary_emb=self.rope(model, range(3), 1),
            return_dict=False,
        )[0]
        return out

    def switch_prompt(self, model: nn.Module, caches: Any) -> bool:
        """See `Host.switch_prompt`."""
        caches.prompt += 1
        return True
