"""Waypoint (Overworld world_engine): one frame per call, shared keys, gates, layers with different memories.

Facts (208c909): the model denoises one frame at a time and is given its number as a tensor, of which every
layer receives the same `pos_ids["t_pos"]`. The cache is a module with one ring of keys and values per layer.
Passes with a frozen cache leave no trace; the pass that is not frozen writes, keys after RoPE, at the frame's
number. Local layers attend to the last `local_window` frames. Every `global_attn_period`-th layer is global:
of the last `global_window` frames it keeps the multiples of `global_pinned_dilation`. `reset()` empties the
rings. Attention is given the values of the first layer, `v1`, and returns them; with `value_residual` the
values of every layer are mixed with them. With `gated_attn`, a gate per head is computed from the first
channels of the input. RoPE pairs neighbouring channels and returns them as halves; its table ends at
`n_frames`, past which the model fails and we compute the angles.

Keys have fewer heads than queries. The heads we count are those of the keys: a role belongs to a key head and
all queries that share it, which lie side by side as tokens, so keys are stored once.

`patch_model.py` puts one projection in place of three, `quantize.py` other linear layers; both are called.
Attention is PyTorch's instead of `flex_attention`, so results are equal to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from headforcing.adapters.base import Adapter, Memo, bind, parameter_names
from headforcing.adapters.host_cache import allocate_again, free, version
from headforcing.adapters.host_numbers import host_numbers
from headforcing.errors import ExternalEditError, RoleError, StreamError, StreamShapeError
from headforcing.roles import Dilated, HeadRole, SlidingWindow
from headforcing.types import AttentionCall, Phase, TracedCall

FORWARD = ("x", "pos_ids", "v1", "kv_cache")
PARTS = ("rope", "out_proj")
PROJECTIONS = (("qkv_proj",), ("q_proj", "k_proj", "v_proj"))
NUMBERS = ("n_heads", "n_kv_heads", "d_head", "layer_idx")
CLOCK = "denoise_step_emb"


class Waypoint(Adapter):
    """Attention that passes its keys and values through a cache module."""

    name = "waypoint"
    verified = {"291ef444a1d9b65c": "absolute", "bc5e4582ddc339b7": "absolute"}

    def why_not(self, model: nn.Module) -> str | None:
        """See `Adapter.why_not`."""
        if any(True for _ in self.attentions(model)):
            return None
        return f"no module has {', '.join((*PARTS, *NUMBERS))} and forward({', '.join(FORWARD)})"

    def attentions(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """See `Adapter.attentions`."""
        for path, module in model.named_modules():
            numbers = (getattr(module, number, None) for number in NUMBERS)
            parts = _has(module, PARTS) and any(_has(module, names) for names in PROJECTIONS)
            if parts and parameter_names(module) == FORWARD and all(isinstance(n, int) for n in numbers):
                yield path, module

    def heads(self, module: Any) -> tuple[int, int]:
        """Heads that have keys and values, and head dim."""
        return module.n_kv_heads, module.d_head

    def window(self, model: nn.Module) -> int:
        """How far back its layers attend; the length of its table of RoPE is only an upper bound."""
        config = self._config(model)
        return max(int(config.local_window), int(config.global_window))

    def chunk(self, model: nn.Module) -> int:
        """One frame."""
        return 1

    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        """A window in local layers, a dilated one in global layers."""
        config = self._config(model)
        period, first = int(config.global_attn_period), int(getattr(config, "global_attn_offset", 0))
        window, dilation = int(config.global_window), int(config.global_pinned_dilation)
        local: HeadRole = SlidingWindow(int(config.local_window), positions="absolute")
        every: HeadRole = SlidingWindow(window, positions="absolute")
        far = every if dilation == 1 else Dilated(window, dilation, positions="absolute")
        layers: Iterator[Any] = (module for _, module in self.attentions(model))
        return [local if (module.layer_idx - first) % period else far for module in layers]

    def read(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AttentionCall | None:
        """See `Adapter.read`; reads the device once per pass, for the number of the frame.

        Raises:
            StreamShapeError: the call is not of one frame.
        """
        given = bind(module, args, kwargs)
        if (cache := given["kv_cache"]) is None:
            return None
        held = cache if isinstance(cache, dict) else _held(module, cache)
        grid = (1, int(module.config.height), int(module.config.width))
        if given["x"].shape[1] != grid[1] * grid[2]:
            raise StreamShapeError(
                f"{given['x'].shape[1]} tokens: expected one frame of {grid[1]}x{grid[2]} patches per call"
            )
        arguments = {**given, **held, "rope": (module.rope.cos, module.rope.sin)}
        start = _frame(module, given["pos_ids"]["t_pos"])
        return AttentionCall(given["x"], start, grid, held["kv"], arguments)

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """Whether the cache was emptied.

        Raises:
            ExternalEditError: it holds frames that we did not write, or was not emptied before a new video.
            StreamError: the model would not keep the frame before.
        """
        written = call.arguments["written"]
        known, edits = "edits" in memo, version(written)
        if not known or memo["edits"] != edits:
            if bool(written[: -call.tokens_per_frame].any()):
                raise ExternalEditError(
                    "the cache holds frames that head forcing did not write, expected none: call reset() of "
                    "the cache (or of the engine) and begin the video again at frame 0"
                )
            memo["edits"], memo["not_kept"] = edits, None
            return known
        if memo["not_kept"] is not None and call.start > memo["not_kept"]:
            raise StreamError(
                f"no pass over frame {memo['not_kept']} wrote to the cache, so the model would not keep it: "
                "expected one with set_frozen(False), the last one of a frame"
            )
        if call.start == 0 and memo["start"] and edits is not None:
            raise ExternalEditError(
                f"frame 0 after frame {memo['start']}, but the cache was not emptied, so the model would "
                "attend to the video before: call reset() of the cache (or of the engine) first"
            )
        return False

    def project(self, module: Any, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter.project`; queries of one key head lie side by side as tokens."""
        q, k, v = _projected(module, call.x)
        k, v = (x.unflatten(-1, (module.n_kv_heads, module.d_head)) for x in (k, v))
        if module.value_residual:
            first = call.arguments["v1"]
            call.arguments["v1"] = first = v.transpose(1, 2) if first is None else first
            v = torch.lerp(v, first.transpose(1, 2), module.v_lamb)
        q, k = (rms_norm(x, (module.d_head,)) for x in (q.unflatten(-1, (-1, module.d_head)), k))
        groups = q.unflatten(2, (module.n_kv_heads, -1)).movedim(3, 1)  # [B, G, P, H, D]
        return groups.flatten(1, 2)[:, None], k[:, None], v[:, None]

    def rotate(self, x: Tensor, call: AttentionCall, positions: Sequence[float], patch: int = 1) -> Tensor:
        """See `Adapter.rotate`."""
        cos, sin = (table[:, None, :, None] for table in _factors(call, positions, patch))
        even, odd = x.float().unflatten(2, (-1, cos.shape[2])).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(2, 3).type_as(x)

    def output(
        self, module: Any, out: Tensor, call: AttentionCall, memo: Memo
    ) -> tuple[Tensor, Tensor | None]:
        """Gates and projects; returns the values of the first layer as well."""
        memo["start"] = call.start
        memo["not_kept"] = call.start if call.arguments["frozen"] else None
        out = out.unflatten(1, (-1, call.tokens_per_frame)).movedim(1, 3).flatten(2, 3)  # [B, P, heads, D]
        if module.gated_attn:
            out = out * torch.sigmoid(module.gate_proj(call.x[..., : module.n_heads]))[..., None]
        return module.out_proj(out.flatten(2)), call.arguments["v1"]

    def forget(self, memo: Memo) -> None:
        """Drops what was noted about the cache."""
        for name in ("edits", "not_kept", "start"):
            memo.pop(name, None)

    def release(self, call: AttentionCall, memo: Memo) -> int:
        """Frees the ring of the layer."""
        return free([call.arguments["kv"]], memo)

    def give_back(self, anchor: object, memo: Memo) -> None:
        """An empty ring."""
        allocate_again(memo)

    def traced_call(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TracedCall | None:
        """See `Adapter.traced_call`; the values of the first layer are computed in the graph."""
        call = {**dict(zip(FORWARD, args, strict=False)), **kwargs}
        if len(args) + len(kwargs) != len(FORWARD) or call.keys() != {*FORWARD} or call["kv_cache"] is None:
            return None
        x, first = call["x"], call["v1"]
        if module.value_residual and first is None:
            heads = _projected(module, x)[2].unflatten(-1, (module.n_kv_heads, module.d_head))
            first = heads.transpose(1, 2)
        held, frame = _held(module, call["kv_cache"]), {"t_pos": call["pos_ids"]["t_pos"]}
        return TracedCall({"x": x, "pos_ids": frame, "v1": first, "kv_cache": held}, x)

    def answer(self, y: Tensor, numbers: Tensor, call: TracedCall) -> Any:
        """The values of the first layer as well."""
        return y, call.arguments["v1"]

    def clock(self, model: nn.Module) -> nn.Module | None:
        """The embedding of the noise level, which is given nothing else, so that a graph stays whole."""
        found = (getattr(module, CLOCK, None) for module in model.modules())
        return next((clock for clock in found if isinstance(clock, nn.Module)), None)

    def phase(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Phase:
        """The pass that writes is at noise level 0."""
        (sigma,) = (*args, *kwargs.values())
        return "denoise" if bool(sigma.any()) else "clean"

    def cross_attentions(self, model: nn.Module) -> Sequence[nn.Module]:
        """None caches the projected prompt."""
        return ()

    def _config(self, model: nn.Module) -> Any:
        return next(module.config for _, module in self.attentions(model))


def _frame(module: nn.Module, positions: Tensor) -> int:
    """The number of the frame of a call, of its tokens' temporal positions `[B, L]`."""
    frames = {frame for sample in host_numbers(module, positions) for frame in sample}
    if len(frames) > 1:
        raise StreamShapeError(f"t_pos has the frames {sorted(frames)}: expected one frame per call")
    return int(frames.pop())


def _held(module: Any, cache: Any) -> dict[str, Any]:
    """What we read of the cache: keys and values of the layer, which slots are written, what a pass does."""
    layer = cache.layers[module.layer_idx]
    return {"kv": layer.kv, "written": layer.written, "frozen": cache._is_frozen}


def _projected(module: Any, x: Tensor) -> Sequence[Tensor]:
    """Queries, keys, values `[B, L, heads * D]`."""
    if not hasattr(module, "qkv_proj"):
        return module.q_proj(x), module.k_proj(x), module.v_proj(x)
    queries, keys = (heads * module.d_head for heads in (module.n_heads, module.n_kv_heads))
    parts: Sequence[Tensor] = module.qkv_proj(x).split((queries, keys, keys), dim=-1)
    return parts


def _factors(call: AttentionCall, positions: Sequence[float], patch: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines at temporal positions, `[n, P, D/2]`: rows of the table, past its end computed.

    Raises:
        RoleError: a position is below 0, or cannot be computed because the table has one frame only.
    """
    cos, sin = (table.unflatten(0, (-1, *call.grid[1:])) for table in call.arguments["rope"])
    if min(positions) < 0 or (len(cos) == 1 and max(positions) > 0):
        raise RoleError(f"RoPE positions {tuple(positions)}: expected none below 0, and a table of 2 frames")
    rows = [
        (cos[int(at)], sin[int(at)]) if at < len(cos) and at == int(at) else _computed(cos, sin, at)
        for at in positions
    ]
    merged = (slice(None), slice(None, None, patch), slice(None, None, patch))
    cos, sin = (torch.stack(each)[merged].flatten(1, 2) for each in zip(*rows, strict=True))
    return cos, sin


def _computed(cos: Tensor, sin: Tensor, position: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a frame, from the angles between the first two frames of the table."""
    first, second = (torch.atan2(sin[frame].double(), cos[frame].double()) for frame in (0, 1))
    angle = first + (second - first) * position
    return angle.cos().to(cos.dtype), angle.sin().to(sin.dtype)


def _has(module: nn.Module, parts: Sequence[str]) -> bool:
    return all(isinstance(getattr(module, part, None), nn.Module) for part in parts)


ADAPTER = Waypoint()
