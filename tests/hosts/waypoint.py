"""A base model with the interface of Waypoint, from words: its cache is a module, its layers differ.

The original attends with `flex_attention`, the stand-in with PyTorch's kernel, so that results are equal bit
for bit.
Pairs of query heads share keys. The second layer is global.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from headforcing.integrations.waypoint import Waypoint
from headforcing.roles import Dilated, HeadRole, SlidingWindow
from headforcing.testing.host import Host
from tests.hosts.standin import CHANNELS, GRID, TOKENS, dtype_of, noise_of

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16
DIM = HEADS * HEAD_DIM
FRAMES = 16
"""Frames in the table of RoPE."""
BUTTONS = 2


def config(local: int, whole: int, dilation: int) -> SimpleNamespace:
    """What a configuration file of the original says, as far as we read it; frames of its two layers."""
    return SimpleNamespace(
        height=GRID[0],
        width=GRID[1],
        local_window=local,
        global_window=whole,
        global_pinned_dilation=dilation,
        global_attn_period=2,
        global_attn_offset=1,
    )


class Ring(nn.Module):
    """The cache of one layer: frames in slots, which are used again in turn; the last is for the current one.

    Attributes:
        kv: keys after RoPE, and values, `[2, B, heads, tokens, D]`.
        written: which tokens hold something.
        numbers: which frame lies in each slot.
    """

    def __init__(self, batch: int, window: int, dilation: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dilation, self.slots = dilation, window // dilation
        tokens = (self.slots + 1) * TOKENS
        self.register_buffer("kv", torch.zeros(2, batch, KEY_HEADS, tokens, HEAD_DIM, dtype=dtype))
        self.register_buffer("written", torch.zeros(tokens, dtype=torch.bool))
        self.numbers: list[int | None] = []
        self.reset()

    def reset(self) -> None:
        """Empties all slots."""
        self.kv.zero_()
        self.written.zero_()
        self.written[-TOKENS:] = True
        self.numbers = [None] * self.slots

    def past(self, frame: int) -> list[int]:
        """Slots of frames before a frame, oldest first, without the one that its own keys would go to."""
        reused = frame // self.dilation % self.slots if frame % self.dilation == 0 else -1
        held = [(number, slot) for slot, number in enumerate(self.numbers) if number is not None]
        return [slot for _, slot in sorted(held) if slot != reused]

    def attended(self, kv: Tensor, frame: int, frozen: bool) -> Tensor:
        """Keys and values that a frame attends to; it is kept, if at all, where its number is a multiple."""
        seen = [self.kv[:, :, :, slot * TOKENS : (slot + 1) * TOKENS] for slot in self.past(frame)]
        seen = torch.cat([*seen, kv], dim=3)
        if not frozen and frame % self.dilation == 0:
            slot = frame // self.dilation % self.slots
            self.kv[:, :, :, slot * TOKENS : (slot + 1) * TOKENS] = kv
            self.written[slot * TOKENS : (slot + 1) * TOKENS] = True
            self.numbers[slot] = frame
        return seen


class Rings(nn.Module):
    """The cache of all layers."""

    def __init__(self, config: Any, batch: int, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = (config.local_window, 1), (config.global_window, config.global_pinned_dilation)
        self.layers = nn.ModuleList(Ring(batch, *size, dtype) for size in sizes)
        self._is_frozen = True

    def set_frozen(self, is_frozen: bool) -> None:
        """Whether the next passes leave no trace."""
        self._is_frozen = is_frozen

    def reset(self) -> None:
        """Empties all rings."""
        for ring in self.layers:
            ring.reset()  # type: ignore[operator]
        self._is_frozen = True


class Rope(nn.Module):
    """Tables of cosines and sines; a quarter of the pairs for width, a quarter for height, half for time."""

    def __init__(self) -> None:
        super().__init__()
        pairs = HEAD_DIM // 2
        t, y, x = torch.meshgrid(*(torch.arange(size) for size in (FRAMES, *GRID)), indexing="ij")
        space = 1.0 + torch.arange(pairs // 4) / 3
        time = 10000.0 ** -(torch.arange(pairs // 2) / (pairs // 2))
        parts = [axis.reshape(-1, 1) * rates for axis, rates in ((x, space), (y, space / 2), (t, time))]
        angles = torch.cat(parts, dim=1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Tables stay in float32, whatever the model is converted to."""
        return self

    def forward(self, x: Tensor, frame: int) -> Tensor:
        """`x [B, heads, L, D]` of a frame: neighbours are pairs, the results are halves."""
        rows = slice(frame * TOKENS, (frame + 1) * TOKENS)
        cos, sin = self.cos[rows], self.sin[rows]
        a, b = x[..., ::2].float(), x[..., 1::2].float()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class WaypointAttention(nn.Module):
    """Attention of one frame to what a ring holds, with shared keys, mixed values and gates."""

    def __init__(self, config: Any, layer: int, fused: bool) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer
        self.n_heads, self.n_kv_heads, self.d_head = HEADS, KEY_HEADS, HEAD_DIM
        self.value_residual = self.gated_attn = True
        sizes = {"q_proj": HEADS, "k_proj": KEY_HEADS, "v_proj": KEY_HEADS}
        if fused:
            sizes = {"qkv_proj": HEADS + 2 * KEY_HEADS}
        for name, heads in sizes.items():
            self.add_module(name, nn.Linear(DIM, heads * HEAD_DIM, bias=False))
        self.out_proj, self.gate_proj = nn.Linear(DIM, DIM, bias=False), nn.Linear(HEADS, HEADS, bias=False)
        self.v_lamb, self.rope = nn.Parameter(torch.tensor(0.3)), Rope()

    def forward(self, x: Tensor, pos_ids: Any, v1: Any, kv_cache: Any) -> tuple[Tensor, Tensor]:
        """The output, and the values of the first layer."""
        frame = int(pos_ids["t_pos"][0, 0])
        if hasattr(self, "qkv_proj"):
            every = self.qkv_proj(x)
        else:
            every = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        heads = every.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)
        first = v if v1 is None else v1
        v = torch.lerp(v, first, self.v_lamb)
        q, k = (self.rope(rms_norm(part, (HEAD_DIM,)), frame) for part in (q, k))
        ring = kv_cache.layers[self.layer_idx]
        k, v = ring.attended(torch.stack([k, v]), frame, kv_cache._is_frozen)
        out = scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
        gates = torch.sigmoid(self.gate_proj(x[..., :HEADS]))
        return self.out_proj((out * gates.unsqueeze(-1)).flatten(2)), first


class WaypointModel(nn.Module):
    """A tiny world model that is called as the original is."""

    def __init__(self, config: Any, fused: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed, self.denoise_step_emb = nn.Linear(CHANNELS, DIM), nn.Linear(1, DIM)
        self.press, self.head = nn.Linear(BUTTONS, DIM), nn.Linear(DIM, CHANNELS)
        self.blocks = nn.ModuleList(WaypointAttention(config, layer, fused) for layer in range(2))
        self.register_buffer("places", torch.zeros(TOKENS, dtype=torch.long), persistent=False)
        generator = torch.Generator().manual_seed(7)
        for weight in self.parameters():
            if weight.dim():
                noise = torch.randn(weight.shape, generator=generator)
                weight.data.copy_(noise * weight.shape[-1] ** -0.5)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        frame_timestamp: Tensor,
        prompt_emb: Any = None,
        prompt_pad_mask: Any = None,
        mouse: Any = None,
        button: Any = None,
        scroll: Any = None,
        kv_cache: Any = None,
    ) -> Tensor:
        """One pass over one frame `[B, P, CHANNELS]` at noise level `sigma [B, 1]`."""
        self.places.copy_(frame_timestamp[0, 0].expand_as(self.places))
        pos_ids = {"t_pos": self.places.expand(len(x), -1)}
        tokens = self.embed(x) + (self.denoise_step_emb(sigma) + self.press(button))[:, None] + prompt_emb
        first = None
        for block in self.blocks:
            out, first = block(tokens, pos_ids, first, kv_cache=kv_cache)
            tokens = tokens + out
        out = self.head(tokens)
        return out


class WaypointHost(Host):
    """Two layers with different windows, nothing dilated, as the kit asks for; see `DilatedWaypointHost`.

    Attributes:
        sizes: window of the local layer and of the global one, and its dilation.
        fused: whether one projection makes queries, keys and values, as inference patches the model.
    """

    unconcerned = frozenset({"edited_cache_refused", "uncached_calls_pass_through"})
    adapter = Waypoint()
    chunk, frames, dense, window, single = 1, 12, 3, 6, True
    memory: Sequence[HeadRole] = (
        SlidingWindow(3, positions="absolute"),
        SlidingWindow(6, positions="absolute"),
    )
    sizes, fused = (3, 6, 1), False

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """See `Host.model`."""
        return WaypointModel(config(*self.sizes), self.fused).eval().requires_grad_(False).to(dtype)

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        """See `Host.caches`; which slots are written is nothing that a pipeline reads, so it is hidden."""
        rings = Rings(model.config, batch, dtype_of(model))
        return {"rings": lambda: rings, "kv": [ring.kv for ring in rings.layers], "prompt": [0]}

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        """See `Host.call`."""
        rings, dtype = caches["rings"](), dtype_of(model)
        batch, clean = len(caches["kv"][0][0]), draw % 10 == 0
        rings.set_frozen(not clean)
        out: Tensor = model(
            noise_of((batch, frames * TOKENS, CHANNELS), start, draw, dtype),
            torch.full((batch, 1), 0.1 * (draw % 10), dtype=dtype),
            torch.tensor([[start]]),
            prompt_emb=noise_of((batch, 1, DIM), 0, 999 + caches["prompt"][0], dtype),
            button=noise_of((batch, BUTTONS), start, 5, dtype),
            kv_cache=rings,
        )
        return out

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """See `Host.new_video`."""
        caches["rings"]().reset()

    def cached(self, model: nn.Module, caches: Any, layer: int) -> Any:
        """See `Host.cached`."""
        ring = caches["rings"]().layers[layer]
        held = sorted((number, slot) for slot, number in enumerate(ring.numbers) if number is not None)
        rows = [slot * TOKENS + token for _, slot in held for token in range(TOKENS)]
        k, v = ring.kv[:, :, :, rows].transpose(2, 3)
        return k, v

    def switch_prompt(self, model: nn.Module, caches: Any) -> bool:
        """See `Host.switch_prompt`."""
        caches["prompt"][0] += 1
        return True


class DilatedWaypointHost(WaypointHost):
    """One local layer of three frames, and a global one that keeps every second frame of six.

    Frame 1 is dropped at frame 2, so there is no video of three frames from which nothing is dropped.
    """

    dense, sizes = 2, (3, 6, 2)
    memory = (SlidingWindow(3, positions="absolute"), Dilated(6, 2, positions="absolute"))
