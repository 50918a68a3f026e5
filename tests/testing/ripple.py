"""Ripple: a tiny model with everything that porters stumbled over, its adapter and its host.

One sample, one frame per call, float32 only; attention that is no kernel of PyTorch; fewer heads for keys
than for queries; values mixed with those of the first layer, and a gate, both between projection and output;
layers with different windows; a cache that is a module per layer; a RoPE table that ends; the frame number on
the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from headforcing.adapters.base import Adapter, bind, parameter_names
from headforcing.adapters.host_cache import allocate_again, free
from headforcing.adapters.host_numbers import host_numbers
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.testing import Host
from headforcing.types import AttentionCall

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16
DIM = HEADS * HEAD_DIM
GRID = (2, 4)
TOKENS = math.prod(GRID)
WINDOWS = (3, 6, 3)
TABLE = 8
"""Frames in the table of RoPE, fewer than a video has."""
RATES = (100.0 ** (-torch.arange(4) / 4), 100.0 ** (-torch.arange(2) / 2), 100.0 ** (-torch.arange(2) / 2))
FORWARD = ("x", "places", "first", "cache")


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, H, L, D]`: the kernel of the model, which rounds differently from PyTorch's."""
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).exp()
    return weights @ v / weights.sum(-1, keepdim=True)


def factors(frames: Tensor) -> Tensor:
    """Cosines and sines `[2, frames * TOKENS, D/2]`."""
    axes = frames, *(torch.arange(size, dtype=torch.float32) for size in GRID)
    points = torch.cartesian_prod(*axes)
    angles = torch.cat([points[:, at, None] * rates for at, rates in enumerate(RATES)], dim=1)
    return torch.stack([angles.cos(), angles.sin()])


def turned(x: Tensor, table: Tensor) -> Tensor:
    """`x [B, H, L, D]`, neighbouring channels paired."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


class Ring(nn.Module):
    """The cache of one layer: the last frames before the current one, each in its slot."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window, shape = window, (2, 1, KEY_HEADS, window - 1, TOKENS, HEAD_DIM)
        self.register_buffer("kv", torch.zeros(shape))

    def held(self, frame: int) -> Tensor:
        """Keys and values `[2, 1, H, tokens, D]` of the frames before `frame`, oldest first."""
        frames = torch.arange(max(0, frame + 1 - self.window), frame)
        return self.kv[:, :, :, frames % (self.window - 1)].flatten(3, 4)

    def seen(self, k: Tensor, v: Tensor, frame: int, keep: bool) -> Tensor:
        """Keys and values that are attended to; those of a clean pass are kept."""
        own = torch.stack([k, v])
        whole = torch.cat([self.held(frame), own], dim=3)
        if keep:
            self.kv[:, :, :, frame % (self.window - 1)] = own
        return whole


class RippleAttention(nn.Module):
    """Attention with fewer heads for keys, values mixed with those of the first layer, and a gate."""

    kernel: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(softmax_attention)

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(DIM, n * HEAD_DIM) for n in (HEADS, KEY_HEADS, KEY_HEADS)
        )
        self.to_gate, self.to_out = nn.Linear(DIM, HEADS), nn.Linear(DIM, DIM)
        self.mix = nn.Parameter(torch.tensor(0.3))
        self.table = factors(torch.arange(TABLE, dtype=torch.float32))

    def forward(self, x: Tensor, places: Any, first: Any = None, cache: Any = None) -> tuple[Tensor, Tensor]:
        """`[B, L, C]`, and the values of the first layer."""
        frame = int(places["frame"][0, 0])
        table = factors(torch.tensor([float(frame)]))
        if frame < TABLE:
            table = self.table[:, frame * TOKENS : (frame + 1) * TOKENS]
        parts = (to(x).unflatten(-1, (-1, HEAD_DIM)) for to in (self.to_q, self.to_k, self.to_v))
        q, k, v = (part.transpose(1, 2) for part in parts)
        first = v if first is None else first
        k, v = turned(k, table), self.mixed(v, first)
        if cache is not None:
            k, v = cache.seen(k, v, frame, places["clean"])
        k, v = (part.repeat_interleave(HEADS // KEY_HEADS, dim=1) for part in (k, v))
        out = self.kernel(turned(q, table), k, v).transpose(1, 2) * self.to_gate(x).sigmoid()[..., None]
        return self.to_out(out.flatten(2)), first

    def mixed(self, v: Tensor, first: Tensor) -> Tensor:
        """Values, and those of the first layer."""
        return torch.lerp(v, first, self.mix)


class Ripple(nn.Module):
    """Three layers; the frame number is a buffer that every call writes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, DIM)
        self.layers = nn.ModuleList(RippleAttention() for _ in WINDOWS)
        self.register_buffer("frame", torch.zeros(1, TOKENS, dtype=torch.long))

    def forward(
        self, x: Tensor, level: Tensor, frame: Tensor, rings: Any = None, clean: bool = False
    ) -> Tensor:
        """One frame `[1, L, C]` at a noise level."""
        assert x.dtype == torch.float32, "float32 only"
        assert len(x) == 1, "one sample only"
        self.frame.copy_(frame.expand_as(self.frame))
        places, first = {"frame": self.frame, "clean": clean}, None
        x = x + self.embed(level[:, None])[:, None]
        for layer, ring in zip(self.layers, rings or [None] * len(WINDOWS), strict=True):
            y, first = layer(x, places, first, ring)
            x = x + y
        return x


class RippleAdapter(Adapter):
    """The answers about Ripple."""

    name = "ripple"

    def why_not(self, model: nn.Module) -> str | None:
        return (
            None
            if any(self.attentions(model))
            else f"no module has to_gate and forward({', '.join(FORWARD)})"
        )

    def attentions(self, model: nn.Module) -> Any:
        for path, module in model.named_modules():
            if hasattr(module, "to_gate") and parameter_names(module) == FORWARD:
                yield path, module

    def heads(self, module: nn.Module) -> tuple[int, int]:
        return HEADS, HEAD_DIM

    def window(self, model: nn.Module) -> int:
        return max(WINDOWS)

    def chunk(self, model: nn.Module) -> int:
        return 1

    def own_memory(self, model: nn.Module) -> Sequence[HeadRole]:
        return [SlidingWindow(window, positions="absolute") for window in WINDOWS]

    def read(self, module: Any, args: Any, kwargs: Any) -> AttentionCall | None:
        given = bind(module, args, kwargs)
        if given["cache"] is None:
            return None
        start = host_numbers(module, given["places"]["frame"])[0][0]
        arguments = {**given, "table": module.table}
        return AttentionCall(given["x"], start, (1, *GRID), given["cache"], arguments)

    def project(self, module: Any, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (to(call.x).unflatten(-1, (-1, HEAD_DIM)) for to in (module.to_q, module.to_k, module.to_v))
        first = call.arguments["first"]
        call.arguments["first"] = first = v.transpose(1, 2) if first is None else first
        call.arguments["gate"] = module.to_gate(call.x).sigmoid()[..., None]
        v = module.mixed(v, first.transpose(1, 2))
        k, v = (part.repeat_interleave(HEADS // KEY_HEADS, dim=2) for part in (k, v))
        return q[:, None], k[:, None], v[:, None]

    def rotate(self, x: Tensor, call: AttentionCall, positions: Sequence[float], patch: int = 1) -> Tensor:
        inside = call.arguments["table"].unflatten(1, (TABLE, *GRID))
        rows = [
            inside[:, place] if place < TABLE and place == int(place) else self.computed(x, place)
            for place in positions
        ]
        kept = torch.stack([row[:, ::patch, ::patch].flatten(1, 2) for row in rows], dim=1)
        return turned(x.transpose(2, 3), kept.unsqueeze(2)).transpose(2, 3)

    def computed(self, x: Tensor, place: float) -> Tensor:
        """What the table says of a place that it does not have."""
        return factors(torch.tensor([float(place)])).unflatten(1, GRID).to(x.device)

    def output(self, module: Any, out: Tensor, call: AttentionCall, memo: Any) -> Any:
        y = module.to_out((out * call.arguments["gate"]).flatten(2))
        return y, call.arguments["first"]

    def begins_video(self, call: AttentionCall, memo: Any) -> bool:
        return False

    def release(self, call: AttentionCall, memo: Any) -> int:
        return free([call.arguments["cache"].kv], memo)

    def give_back(self, anchor: object, memo: Any) -> None:
        allocate_again(memo)


class RippleHost(Host):
    """Ripple with its own kernel: equal to rounding."""

    adapter = RippleAdapter()
    layers, chunk, frames, dense, window = 3, 1, 12, 3, 6
    memory = tuple(SlidingWindow(window, positions="absolute") for window in WINDOWS)
    single, batches, rounding = True, False, 1e-5
    kernel = staticmethod(softmax_attention)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Ripple()
        for layer in model.layers:
            layer.kernel = self.kernel
        return model.eval().requires_grad_(False).to(dtype)

    def caches(self, model: nn.Module, batch: int = 1) -> Any:
        return {"rings": [Ring(window) for window in WINDOWS], "batch": torch.zeros(batch)}

    def new_video(self, model: nn.Module, caches: Any) -> None:
        """Nothing: the slots are written again before they are read."""

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        seed = torch.Generator().manual_seed(1000 * draw + start)
        noise = torch.randn(len(caches["batch"]), frames * TOKENS, DIM, generator=seed)
        weight: Any = model.embed.weight
        level, frame = torch.full((1,), 0.1 * (draw % 10)), torch.tensor([[start]])
        out: Tensor = model(noise.to(weight.dtype), level, frame, caches["rings"], draw % 10 == 0)
        return out

    def cached(self, model: nn.Module, caches: Any, layer: int) -> tuple[Tensor, Tensor]:
        held = caches["rings"][layer].held(int(model.frame[0, 0]) + 1)  # type: ignore[index]
        k, v = held.transpose(2, 3).repeat_interleave(HEADS // KEY_HEADS, dim=3)
        return k, v

    def uncached(self, model: nn.Module) -> Tensor:
        out: Tensor = model(torch.ones(1, TOKENS, DIM), torch.ones(1), torch.tensor([[2]]))
        return out


class RippleOnSDPA(RippleHost):
    """Ripple with PyTorch's kernel in place of its own: equal bit for bit."""

    rounding, kernel = 0.0, staticmethod(scaled_dot_product_attention)
