"""AnyFlow FAR (arXiv:2605.13724, arXiv:2503.19325) as in diffusers.

Facts: a noisy pass has one chunk; the cache holds the last chunks in full and older ones at coarser patches.
The clean pass recomputes the whole video so far and fills the cache again, because one more chunk became
coarse, which changes the keys that later chunks attend to; a chunk attends to itself and those before it. So
our roles select among the frames as the model has them at that time, chunk by chunk. Keys are cached before
RoPE; calls have no frame numbers, but one row of RoPE per token.

Its attention module only passes its arguments to its `processor`. Our mixin replaces the module's forward,
and the model's processor stays in place unused.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from headforcing.adapters import rope
from headforcing.adapters.base import Adapter, Memo, parameter_names
from headforcing.adapters.host_cache import allocate_again, free
from headforcing.errors import ChunkOrderError, PatchedModuleError, StreamShapeError, UnsupportedModelError
from headforcing.roles import Full, HeadRole
from headforcing.types import AttentionCall, Grid, Phase

CALL = ("hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb", "kv_cache", "kv_cache_flag")
SUBMODULES = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k")
BUFFERS = ("full_cache", "compressed_cache")
FLAG = 9  # index of kv_cache_flag among the arguments of the model's forward


class AnyFlowFAR(Adapter):
    """Attention whose processor receives a cache of full and coarse frames.

    Args:
        padding: in noisy passes the base model attends to additional zero keys that fill the number of
            queries up to a multiple of this, and so do we, so that `Full()` reproduces it. 1: no padding.
    """

    name = "anyflow_far"

    def __init__(self, padding: int = 128) -> None:
        self.padding = padding

    def why_not(self, model: nn.Module) -> str | None:
        """See `Adapter.why_not`."""
        if any(True for _ in self.attentions(model)):
            return None
        return f"no module has {', '.join(SUBMODULES)} and a processor called with (attn, {', '.join(CALL)})"

    def attentions(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """See `Adapter.attentions`."""
        for name, module in model.named_modules():
            if all(isinstance(getattr(module, part, None), nn.Module) for part in SUBMODULES) and (
                parameter_names(module) == ("hidden_states", "kwargs")
                and _is_known(getattr(module, "processor", None))
            ):
                yield name, module

    def heads(self, module: nn.Module) -> tuple[int, int]:
        """See `Adapter.heads`."""
        return int(module.heads), int(module.inner_dim) // int(module.heads)  # type: ignore[arg-type]

    def window(self, model: nn.Module) -> int:
        """Frames of the video in the configuration, the sum over its chunks."""
        return sum(_partition(model))

    def chunk(self, model: nn.Module) -> int:
        """Frames of the longest chunk in the configuration."""
        return max(_partition(model))

    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        """Every frame, as it is in the cache."""
        return [Full() for _ in self.attentions(model)]

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`; a clean pass is one call from frame 0 on.

        Raises:
            PatchedModuleError: the module's processor was replaced by another kind, or works in parallel.
            StreamShapeError: the tokens are not whole frames.
        """
        processor = module.processor
        if not _is_known(processor):
            raise PatchedModuleError(
                f"the processor is a {type(processor).__name__} now, which head forcing does not call: "
                "remove head forcing to use it, or restore the former one with set_processor()"
            )
        if getattr(processor, "_parallel_config", None) is not None:
            raise PatchedModuleError("head forcing requires all tokens of a call: undo enable_parallelism()")
        arguments = {**dict.fromkeys(CALL), **dict(zip(CALL, args)), **kwargs}  # noqa: B905
        cache, flag, x = (arguments[name] for name in ("kv_cache", "kv_cache_flag", "hidden_states"))
        if cache is None:
            return None
        layout = arguments["layout"] = _layout_of(arguments["rotary_emb"]["key"])
        before = 0
        if not flag["is_cache_step"]:
            before = flag["num_cached_compressed_tokens"] + flag["num_cached_full_tokens"]
        if before not in layout.starts[:-1] or before + x.shape[1] != layout.starts[-1]:
            raise StreamShapeError(
                f"{before} cached tokens and {x.shape[1]} of the call, but frames begin at {layout.starts}: "
                "expected whole frames; clean_hidden_states together with a cache is not supported"
            )
        start = layout.starts.index(before)
        frames = len(layout.starts) - 1 - start
        return AttentionCall(x, start, (frames, *layout.grid), cache[BUFFERS[0]], arguments)

    def split(self, module: nn.Module, call: AttentionCall) -> Sequence[AttentionCall]:
        """See `Adapter.split`; the chunks of a clean pass, read from its mask."""
        layout, mask = call.arguments["layout"], call.arguments["attention_mask"]
        chunks = _chunks_of(layout, mask) if call.arguments["kv_cache_flag"]["is_cache_step"] else ()
        if len(chunks) < 2:
            return (call,)
        projected, calls = _projected(module, call), []
        for frames in chunks:
            tokens = slice(layout.starts[frames.start], layout.starts[frames.stop])
            grid = (len(frames), *(layout.coarse if frames.start < layout.far else layout.grid))
            own = {"projected": [x[:, tokens] for x in projected], "last": chunks[-1], **call.arguments}
            calls.append(AttentionCall(call.x[:, tokens], frames.start, grid, call.anchor, own))
        return calls

    def join(self, module: nn.Module, outs: Sequence[Any], call: AttentionCall) -> Any:
        """See `Adapter.join`."""
        linear, dropout = module.to_out  # type: ignore[misc]
        return dropout(linear(torch.cat(list(outs), dim=1)))

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """False: a chunk at frame 0 begins a video, also when a clean pass recomputes all chunks.

        Raises:
            ChunkOrderError: a clean pass ends neither at the end of the video nor one chunk later.
        """
        last = call.arguments.get("last", range(call.start, call.start + call.grid[0]))
        if call.start == 0 and memo.get("end", last.stop) not in (last.start, last.stop) and last.start:
            raise ChunkOrderError(
                f"a clean pass covers {last.stop} frames, its last chunk from {last.start} on, but the video "
                f"has {memo['end']}: expected one new chunk at most"
            )
        memo["end"] = last.stop
        return False

    def project(self, module: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter.project`; already rotated in space, coarse frames padded with their own keys."""
        own = call.arguments.get("projected") or _projected(module, call)
        q, k, v = (x.unflatten(1, (call.grid[0], -1)) for x in own)
        rows = torch.arange(math.prod(call.arguments["layout"].grid), device=q.device) % q.shape[2]
        return (q, k, v) if len(rows) == q.shape[2] else (q, k[:, :, rows], v[:, :, rows])

    def rotate(  # type: ignore[override] # merged patches are not supported
        self, x: Tensor, call: AttentionCall, positions: Sequence[float]
    ) -> Tensor:
        """See `Adapter.rotate`; in time only, because `project` rotates in space."""
        turns = rope.temporal_rows(call.arguments["layout"].times, positions)[:, None, None]
        return _turned(x, turns, slice(0, turns.shape[-1]))

    def tokens(self, x: Tensor, frames: Sequence[int | None], call: AttentionCall) -> Tensor:
        """Removes the padding of coarse frames, and adds that of `padding`.

        Raises:
            StreamShapeError: a role chose frames by content, so it is unknown which of them are coarse.
        """
        layout = call.arguments["layout"]
        known = [frame for frame in frames if frame is not None]
        if layout.far and len(known) < len(frames):
            raise StreamShapeError(
                f"a role chose frames by content, but the first {layout.far} frames are coarse, and which "
                "ones it chose is unknown: use roles that select by frame number, or keep all frames full by "
                "setting full_chunk_limit to the number of chunks in the model's configuration"
            )
        coarse = sum(frame < layout.far for frame in known)
        few = x[:, :coarse, : math.prod(layout.coarse)].flatten(1, 2)
        clean = call.arguments["kv_cache_flag"]["is_cache_step"]
        zeros = few.new_zeros(len(x), 0 if clean else -call.x.shape[1] % self.padding, *x.shape[3:])
        return torch.cat([few, x[:, coarse:].flatten(1, 2), zeros], dim=1)

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        """Applies the output projection, unless `join` does."""
        return out.flatten(2) if "projected" in call.arguments else self.join(module, [out.flatten(2)], call)

    def clock(self, model: nn.Module) -> nn.Module | None:
        """The transformer, recognised by its embedding of coarse frames."""
        found = [module for module in model.modules() if "far_patch_embedding" in module._modules]
        return found[0] if len(found) == 1 else None

    def phase(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Phase:
        """From the cache flag."""
        flag = args[FLAG] if len(args) > FLAG else kwargs.get("kv_cache_flag")
        return "clean" if flag is not None and flag["is_cache_step"] else "denoise"

    def cross_attentions(self, model: nn.Module) -> Sequence[nn.Module]:
        """A prompt switch is neither needed nor possible.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "AnyFlow FAR recomputes its whole past for every chunk, with the prompt of that pass, so there "
            "is nothing to keep or drop: pass the new prompt to the pipeline, no switch_prompt is needed"
        )

    def release(self, call: AttentionCall, memo: Memo) -> int:
        """Frees the memory of both buffers and keeps their shapes."""
        return free([call.arguments["kv_cache"][name] for name in BUFFERS], memo)

    def give_back(self, anchor: object, memo: Memo) -> None:
        """Allocates the buffers again, with zeros."""
        allocate_again(memo)

    def forget(self, memo: Memo) -> None:
        """See `Adapter.forget`."""
        memo.pop("end", None)


@dataclass(frozen=True)
class _Layout:
    """The frames of a call and of the cache before it, read from the rows of RoPE."""

    starts: tuple[int, ...]  # first token of every frame, and the end
    far: int  # number of coarse frames at the start
    grid: Grid  # of a full frame
    coarse: Grid  # of a coarse frame
    times: Tensor  # multipliers of the temporal position of every frame, [frames, columns]


_LAYOUTS: MutableMapping[Tensor, _Layout] = WeakIdKeyDictionary()
"""One per pass: all layers receive the same tensor, and reading it waits for the device."""


def _layout_of(freqs: Tensor) -> _Layout:
    if freqs not in _LAYOUTS:
        table = freqs[0, 0]
        time = rope.temporal_columns(table)
        frames, rows = rope.begins(table[:, :1]), rope.begins(table[:, [0, time]])
        starts = (*frames, len(table))
        spans = [range(*ends) for ends in itertools.pairwise(starts)]
        far = sum(len(span) != len(spans[-1]) for span in spans)
        heights = [sum(row in spans[at] for row in rows) for at in (-1, 0)]
        grid, coarse = (
            (height, len(spans[at]) // height) for at, height in zip((-1, 0), heights, strict=True)
        )
        _LAYOUTS[freqs] = _Layout(starts, far, grid, coarse, table[frames, :time])
    return _LAYOUTS[freqs]


def _chunks_of(layout: _Layout, mask: Any) -> list[range]:
    """Chunks: neighbouring frames that attend to each other under a mask."""
    if not hasattr(mask, "mask_mod"):
        raise StreamShapeError(f"the clean pass has the mask {mask!r:.60}: expected a BlockMask")
    first = torch.tensor(layout.starts[:-1], device=layout.times.device)
    together = mask.mask_mod(0, 0, first[:-1], first[1:]).tolist()
    cuts = [0, *(frame for frame, same in enumerate(together, 1) if not same), len(first)]
    return [range(*ends) for ends in itertools.pairwise(cuts)]


def _projected(module: Any, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values `[B, L, H, D]`, the first two rotated in space."""
    x, freqs = call.x, call.arguments["rotary_emb"]["query"][0, 0]
    q, k = module.norm_q(module.to_q(x)).to(x.dtype), module.norm_k(module.to_k(x)).to(x.dtype)
    q, k, v = (y.unflatten(2, (module.heads, -1)) for y in (q, k, module.to_v(x)))
    space = slice(rope.temporal_columns(freqs), None)
    return _turned(q, freqs[:, None, space], space), _turned(k, freqs[:, None, space], space), v


def _turned(x: Tensor, turns: Tensor, columns: slice) -> Tensor:
    """`x [..., D]` with some of its pairs of channels multiplied, in the precision of the multipliers."""
    pairs = torch.view_as_complex(x.to(turns.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    pairs[..., columns] *= turns
    return torch.view_as_real(pairs).flatten(-2).to(x.dtype)


def _partition(model: nn.Module) -> Sequence[int]:
    """Frames of the chunks in the configuration."""
    for module in model.modules():
        if (partition := getattr(getattr(module, "config", None), "chunk_partition", None)) is not None:
            return tuple(int(frames) for frames in partition)
    raise UnsupportedModelError("no config.chunk_partition in the model: pass window=... and chunk=...")


def _is_known(processor: object) -> bool:
    kind: Any = type(processor)
    return tuple(inspect.signature(kind.__call__).parameters)[1:] == ("attn", *CALL)


ADAPTER = AnyFlowFAR()
