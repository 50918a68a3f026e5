"""Stage 2 of SANA-WM as in diffusers: a refiner on LTX-2, whose pipeline owns the cache and the RoPE.

Facts, call by call: the first frames, usually one, run alone and clean (`capture_pre_rope`); their keys
before RoPE are the sink, and they are not refined. Then blocks of three frames follow: noisy passes that
attend to sink, history and the block (`inject`), and a clean pass that attends to the same and returns its
keys after RoPE (`inject_and_capture_post_rope`), which the pipeline appends to the history and cuts to the
last ten frames. Blocks and history are at their true positions; the sink is at 0, and once the history is
full, right before it: `Local(10, 1, positions="adjoining")` reproduces this.

No argument has a frame number or the grid, but every call has one row of RoPE per token. So we number the
frames by their rows in order of arrival, per layer of the cache, which is the anchor. A role that uses
another position gets the row that came with that frame, bit for bit the model's, whatever the frame rate.
RoPE differs from head to head. We return keys without tokens, so the pipeline's history takes no memory. The
attention backend is chosen with `backend` when roles are applied, not with `set_attention_backend()`.
"""

from __future__ import annotations

import cmath
import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from headforcing.adapters import rope
from headforcing.adapters.base import Adapter, Memo, bind, parameter_names
from headforcing.errors import PatchedModuleError, RoleError, StreamError, StreamShapeError
from headforcing.roles import HeadRole, Local
from headforcing.types import AttentionCall, Grid, Heads, Phase

FORWARD = ("hidden_states", "encoder_hidden_states", "attention_mask", "query_rotary_emb", "key_rotary_emb")
CACHE = ("sink_rotary_emb", "kv_cache", "kv_cache_mode")
SUBMODULES = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k")
MODE_ARGUMENT = 6  # index of `kv_cache_mode` among the arguments of the model's forward
AXES = 3
EVEN, NEARER = 3, 0.25
"""The first frame is shorter than others: three give the step; frame 1 is at least half a step later."""


class SanaWM(Adapter):
    """Attention whose processor receives a cache mode.

    Args:
        block_size: frames that are refined together, as passed to the pipeline.
        kv_max_frames: frames of sink and history, as passed to the pipeline.
        sink_frames: first frames, which run alone.
    """

    name = "sana_wm"

    def __init__(self, block_size: int = 3, kv_max_frames: int = 11, sink_frames: int = 1) -> None:
        self.block_size, self.kv_max_frames, self.sink_frames = block_size, kv_max_frames, sink_frames

    def why_not(self, model: nn.Module) -> str | None:
        """See `Adapter.why_not`."""
        layers = list(_layers(model))
        if not layers:
            return f"no block takes {', '.join(CACHE)} and has an attn1 with {', '.join(SUBMODULES)}"
        return next((reason for path, module in layers if (reason := _unknown(path, module))), None)

    def attentions(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """See `Adapter.attentions`."""
        yield from _layers(model) if self.why_not(model) is None else ()

    def heads(self, module: nn.Module) -> tuple[int, int]:
        """See `Adapter.heads`."""
        return int(module.heads), int(module.head_dim)  # type: ignore[arg-type]

    def window(self, model: nn.Module) -> int:
        """Frames of sink, history and block; these are settings of the pipeline, not of the model."""
        return self.kv_max_frames + self.block_size

    def chunk(self, model: nn.Module) -> int:
        """See `window`."""
        return self.block_size

    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        """The last frames and the first ones, which are right before them; see the module."""
        role = Local(self.kv_max_frames - self.sink_frames, self.sink_frames, positions="adjoining")
        return [role for _ in self.attentions(model)]

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`; reads the device once per pass, for the rows of RoPE.

        Raises:
            PatchedModuleError: the module's processor was replaced by another kind, or works in parallel.
            StreamShapeError: the number of RoPE rows differs from the number of tokens.
            StreamError: something else filled the cache.
        """
        if reason := _unknown("this attention", module):
            raise PatchedModuleError(reason)
        arguments = bind(module, args, kwargs)
        arguments = {**arguments, **arguments["kwargs"]}
        cache, mode, x = arguments.get("kv_cache"), arguments.get("kv_cache_mode"), arguments["hidden_states"]
        if cache is None or mode is None:
            return None
        patches, keys, rows = _frames_of(*arguments["query_rotary_emb"])
        grid = (len(keys), *patches)
        if math.prod(grid) != x.shape[1]:
            raise StreamShapeError(f"{x.shape[1]} tokens, but RoPE rows for {grid}: expected equal numbers")
        fresh = cache.sink_k_pre is None and cache.history_k is None
        if mode == "capture_pre_rope" or (fresh and cache not in _VIDEOS):
            _VIDEOS[cache] = _Video()
        if cache not in _VIDEOS:
            raise StreamError("the cache was filled before apply, or is a copy: start the video again")
        seen = {**arguments, "video": _VIDEOS[cache]}
        return AttentionCall(x, _VIDEOS[cache].place(keys, rows), grid, cache, seen)

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """False: a chunk at frame 0 begins a video."""
        return False

    def project(self, module: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter.project`."""
        x, m = call.x, module
        shape = (x.shape[0], call.grid[0], call.tokens_per_frame, *self.heads(module))
        q, k, v = m.norm_q(m.to_q(x)), m.norm_k(m.to_k(x)), m.to_v(x)  # type: ignore[operator]
        return q.view(shape), k.view(shape), v.view(shape)

    def rotate(self, x: Tensor, call: AttentionCall, positions: Sequence[float], patch: int = 1) -> Tensor:
        """See `Adapter.rotate`."""
        cos, sin = call.arguments["query_rotary_emb"]
        turned = _turned_halves if cos.dim() == 4 else _turned_neighbours
        own = _turns(cos, sin, call.tokens_per_frame).unflatten(0, call.grid[1:])
        space = own[::patch, ::patch].flatten(0, 1)  # [P, pairs of channels of all heads]
        pairs, half = torch.arange(space.shape[1], device=x.device), x.shape[-1] // 2
        heads = call.heads or Heads(range(len(pairs) // half), len(pairs) // half)
        temporal = pairs % AXES == len(pairs) % AXES
        space, temporal = (heads.take(each.unflatten(-1, (-1, half))) for each in (space, temporal))
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for frame, position in enumerate(positions):
            row = call.arguments["video"].turns_at(position).unflatten(-1, (-1, half))
            turns = torch.where(temporal, heads.take(row), space)
            out[:, frame] = turned(x[:, frame].float(), turns.real, turns.imag)
        return out

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        """Gates and projects; captured keys and values have no tokens."""
        mode, cache = (call.arguments[name] for name in ("kv_cache_mode", "kv_cache"))
        nothing = out.new_empty(len(out), 0, out.shape[2] * out.shape[3])
        if mode == "capture_pre_rope":
            cache.store_captured_pre_rope(nothing, nothing)
        elif mode == "inject_and_capture_post_rope":
            cache.store_captured_post_rope(nothing, nothing)
        if module.to_gate_logits is not None:
            out = out * (2.0 * torch.sigmoid(module.to_gate_logits(call.x)))[..., None]  # type: ignore[operator]
        y = out.flatten(2)
        for layer in module.to_out:  # type: ignore[union-attr]
            y = layer(y)
        return y

    def clock(self, model: nn.Module) -> nn.Module | None:
        """The transformer, recognised by its timestep and mode arguments."""
        found = [m for m in model.modules() if {*parameter_names(m)} >= {"timestep", "kv_cache_mode"}]
        return found[0] if len(found) == 1 else None

    def phase(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Phase:
        """From the mode: only `inject` is noisy."""
        mode = kwargs["kv_cache_mode"] if "kv_cache_mode" in kwargs else args[MODE_ARGUMENT]
        return "denoise" if mode == "inject" else "clean"

    def cross_attentions(self, model: nn.Module) -> Sequence[nn.Module]:
        """None caches the projected prompt."""
        return ()


Key = tuple[complex, ...]
"""Multipliers of the two slowest temporal columns, which identify a frame."""
_Frames = tuple[Grid, list[Key], Tensor]
"""Height and width of a frame in patches; the key of every frame; multipliers of its first token."""


@dataclass
class _Video:
    """The temporal multipliers of a video so far, by frame."""

    numbers: dict[Key, int] = field(default_factory=dict)
    turns: list[Tensor] = field(default_factory=list)

    def place(self, keys: Sequence[Key], rows: Tensor) -> int:
        """The first frame of a call; records frames that are new.

        Raises:
            StreamShapeError: its frames are not consecutive.
        """
        start = self._start(keys)
        for number, (key, turns) in enumerate(zip(keys, rows, strict=True), start):
            if number == len(self.turns):
                self.numbers[key] = number  # first: after an interrupt the same call finds its frame
                self.turns.append(turns)
            if number < len(self.turns) and self.numbers.get(key) != number:
                raise StreamShapeError(f"frame {number} has another RoPE position than before")
        return start

    def turns_at(self, position: float) -> Tensor:
        """Multipliers at a temporal position; computed if there was no frame at this position yet.

        Raises:
            RoleError: it is below 0, or there are too few frames to extrapolate from.
        """
        count = len(self.turns)
        if position in range(count):
            return self.turns[int(position)]
        if position < 0 or count < EVEN:
            raise RoleError(f"RoPE position {position}: expected one of the {count} frames so far")
        before, last = (turns.to(torch.complex128).angle() for turns in self.turns[-2:])
        return torch.exp(1j * (last + (last - before) * (position + 1 - count))).to(self.turns[0].dtype)

    def _start(self, keys: Sequence[Key]) -> int:
        known = list(self.numbers)
        if not known or keys[0] in self.numbers:
            return self.numbers.get(keys[0], 0)
        steps = [*_gaps(known[1:]), *_gaps(keys)]
        (gap,) = _gaps([known[-1], keys[0]])
        return len(known) - 1 + (math.ceil(gap / steps[-1] - NEARER) if steps else 1)


_VIDEOS: MutableMapping[object, _Video] = WeakIdKeyDictionary()
_PASSES: MutableMapping[Tensor, _Frames] = WeakIdKeyDictionary()
"""One per pass: all layers receive the same tensor, and reading it waits for the device."""


def _frames_of(cos: Tensor, sin: Tensor) -> _Frames:
    if cos in _PASSES:
        return _PASSES[cos]
    if len(cos) > 1 and any(not torch.equal(table, table[:1].expand_as(table)) for table in (cos, sin)):
        raise StreamShapeError("samples of one batch have different RoPE: expected the same frames in all")
    turns = _turns(cos, sin, cos.shape[-2])
    time = turns.shape[1] % AXES
    slow, high = turns[:, time::AXES][:, :2], turns[:, time + 1 : time + 2]
    frames, lines = rope.begins(slow), rope.begins(torch.cat([slow, high], 1))
    patches, width = (len(turns) // len(begins) for begins in (frames, lines))
    if any(begins != [*range(0, len(turns), size)] for begins, size in ((frames, patches), (lines, width))):
        raise StreamShapeError(f"frames begin at tokens {frames}, lines at {lines}: expected whole frames")
    keys = [tuple(key) for key in slow[frames].tolist()]
    return _PASSES.setdefault(cos, ((patches // width, width), keys, turns[frames]))


def _turns(cos: Tensor, sin: Tensor, tokens: int) -> Tensor:
    """Multipliers of the first sample, one per pair of channels of all heads, `[tokens, pairs]`."""
    apart = cos.dim() == 4  # then pairs come once, else twice
    rows = (t[0, :, :tokens].transpose(0, 1).flatten(1) if apart else t[0, :tokens, ::2] for t in (cos, sin))
    return torch.complex(*rows)


def _gaps(keys: Sequence[Key]) -> list[float]:
    """Angles between adjacent frames in the slowest column."""
    angles = [cmath.phase(key[0]) for key in keys]
    return [(after - before) % math.tau for before, after in itertools.pairwise(angles)]


def _turned_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def _turned_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([torch.addcmul(first * cos, -sin, second), torch.addcmul(second * cos, sin, first)], -1)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, block in model.named_modules():
        attention = getattr(block, "attn1", None)
        if not isinstance(attention, nn.Module) or not {*parameter_names(block)} >= {*CACHE}:
            continue
        parts = [getattr(attention, part, None) for part in SUBMODULES]
        known = parameter_names(attention) == (*FORWARD, "kwargs")
        if known and all(isinstance(part, nn.Module) for part in parts):
            yield f"{path}.attn1", attention


def _unknown(path: str, attention: Any) -> str | None:
    """Why the processor of an attention cannot be replaced."""
    kind: Any = type(getattr(attention, "processor", None))
    if _called_with(kind) != ("attn", *FORWARD, *CACHE):
        hint = "restore the original with set_processor(), or do not use head forcing"
        return f"{path} has the processor {kind.__name__}, which head forcing would not call: {hint}"
    if getattr(attention.processor, "_parallel_config", None) is not None:
        return f"{path} works in parallel, but head forcing requires all tokens: undo enable_parallelism()"
    return None


@functools.cache
def _called_with(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.__call__).parameters)[1:]


ADAPTER = SanaWM()


def refuse(model: nn.Module) -> str | None:
    """Why a refiner is not supported in its present configuration."""
    return ADAPTER.why_not(model) if any(True for _ in _layers(model)) else None
