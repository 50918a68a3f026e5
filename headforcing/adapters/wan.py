"""Wan-like base models: an adapter is answers to ten questions, code only for exceptions.

What is alike: a block has a self-attention and a cross-attention; tokens are frame-major, RoPE is 3-D, its
channels split into time, height and width as in Wan; the pipeline owns a cache per layer, a dict or an
object, with `k` and `v`, `[B, tokens, H, D]`. What differs is asked of class attributes, whose defaults are
Wan's own answers. Whether the cache counts, and whether the attention or the model writes it, is the base
class: `WanAdapter`, `CountingWan` or `DeferringWan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from headforcing.adapters import rope
from headforcing.adapters.base import Adapter, Memo, bind, parameter_names
from headforcing.adapters.host_cache import allocate_again, entry, free
from headforcing.adapters.host_numbers import host_numbers
from headforcing.adapters.verified import digest
from headforcing.errors import StreamShapeError, UnsupportedModelError
from headforcing.roles import Full, HeadRole, SlidingWindow
from headforcing.roles.positions import PositionScheme
from headforcing.types import AttentionCall, Phase, TracedCall

CALL = ("x", "seq_lens", "grid_sizes", "freqs", "block_mask", "kv_cache", "current_start")
"""The first arguments of the attention's `forward`, alike in all of these base models."""


class WanAdapter(Adapter):
    """The attention skeleton of Wan; see the module.

    Args:
        context_noise: timestep of the clean pass that writes the cache, as in the base model's configuration.

    Attributes:
        forward: names of the arguments of the attention's `forward`, by which the base model is recognised.
        numbers: attributes of the attention that are whole numbers.
        projections: its linear layers for queries, keys and values: three, one for all, or none where
            `forward` receives them.
        norms: its norms of queries and keys; none, where `forward` receives these.
        norm_per_head: whether the norms come after heads are split; before, they are over all channels.
        kv_heads: attribute with the number of heads of keys and values; fewer than those of queries are
            repeated, and every head stores its own copy.
        out: its output projection; `None`: the block projects.
        parts: other attributes of the attention that are modules.
        markers: other attributes that it has, where another base model has the same `forward`.
        absent: attributes that such a base model has and this one has not.
        rope: argument of `forward`, else attribute of the attention, with the RoPE table: complex for all
            frames, or cosines and sines of the frames of the call; `None`: Wan's, which the attention makes.
        halves: whether RoPE pairs channel `i` with `i + D/2`; else neighbours.
        grid: argument with frames, height and width, as a tensor `[B, 3]` or as numbers; `None`: none,
            `grid_of` finds out.
        start: argument with the beginning of the call.
        start_in: whether that is in tokens or frames.
        end: argument with the end of the call, in the same unit; `None`: there is none.
        cache: argument with the cache.
        mask: argument with a mask for training, where `forward` has one.
        neighbour: name of the cross-attention in the same block.
        root: attributes of the transformer, which receives the timestep.
        timestep: name and place of this argument.
        untold_window: frames such models are trained on, where `local_attn_size` is -1 and does not tell.
        rolls: whether a full cache is rolled though `local_attn_size` is -1.
        positions: of the own memory of code that was never verified.
    """

    forward: ClassVar[tuple[str, ...]]
    numbers: ClassVar[tuple[str, ...]] = ("num_heads", "head_dim", "local_attn_size", "sink_size")
    projections: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    norms: ClassVar[tuple[str, ...]] = ("norm_q", "norm_k")
    norm_per_head: ClassVar[bool] = False
    kv_heads: ClassVar[str] = "num_heads"
    out: ClassVar[str | None] = "o"
    parts: ClassVar[tuple[str, ...]] = ()
    markers: ClassVar[tuple[str, ...]] = ()
    absent: ClassVar[tuple[str, ...]] = ()
    rope: ClassVar[str | None] = "freqs"
    halves: ClassVar[bool] = False
    grid: ClassVar[str | None] = "grid_sizes"
    start: ClassVar[str] = "current_start"
    start_in: ClassVar[Literal["tokens", "frames"]] = "tokens"
    end: ClassVar[str | None] = None
    cache: ClassVar[str] = "kv_cache"
    mask: ClassVar[str] = "block_mask"
    neighbour: ClassVar[str] = "cross_attn"
    root: ClassVar[tuple[str, ...]] = ("time_embedding", "blocks")
    timestep: ClassVar[tuple[str, int]] = ("t", 1)
    untold_window: ClassVar[int] = 21
    rolls: ClassVar[bool] = False
    positions: ClassVar[PositionScheme] = "absolute"

    def __init__(self, context_noise: float = 0) -> None:
        self.context_noise = context_noise

    @property
    def modules(self) -> tuple[str, ...]:
        """Attributes of the attention that are modules, by which it is recognised."""
        return (*self.projections, *self.norms, *((self.out,) if self.out else ()), *self.parts)

    def why_not(self, model: nn.Module) -> str | None:
        """See `Adapter.why_not`; first, whether the answers agree with each other."""
        for answer in ("grid", "start", "end", "cache"):
            if (name := getattr(self, answer)) is not None and name not in self.forward:
                return f"forward({', '.join(self.forward)}) has no argument {name!r}: set {answer}"
        if any(True for _ in self.attentions(model)):
            return None
        parts = ", ".join((*self.modules, *self.numbers, *self.markers))
        without = f", but no {' or '.join(self.absent)}" if self.absent else ""
        return f"no module has {parts} and forward({', '.join(self.forward)}){without}"

    def attentions(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """See `Adapter.attentions`."""
        for name, module in model.named_modules():
            if all(isinstance(getattr(module, part, None), nn.Module) for part in self.modules) and (
                all(isinstance(getattr(module, number, None), int) for number in self.numbers)
                and all(hasattr(module, marker) for marker in self.markers)
                and not any(hasattr(module, mark) for mark in self.absent)
                and parameter_names(module) == self.forward
            ):
                yield name, module

    def heads(self, module: nn.Module) -> tuple[int, int]:
        """See `Adapter.heads`."""
        return int(module.num_heads), int(module.head_dim)  # type: ignore[arg-type]

    def window(self, model: nn.Module) -> int:
        """The model's local attention size, or what such models are trained on where it has none."""
        sizes = {int(getattr(module, "local_attn_size", -1)) for _, module in self.attentions(model)}
        if len(sizes) > 1:
            raise UnsupportedModelError(
                f"layers have different local_attn_size {sorted(sizes)}: pass window=..."
            )
        size = sizes.pop()
        return self.untold_window if size == -1 else size

    def chunk(self, model: nn.Module) -> int:
        """Frames per chunk, as the pipeline set them on the model."""
        for module in model.modules():
            if isinstance(frames := getattr(module, "num_frame_per_block", None), int):
                return frames
        raise UnsupportedModelError(
            f"{type(model).__name__} has no num_frame_per_block, so the frames per chunk are unknown: "
            "pass chunk=..."
        )

    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        """See `Adapter.own_memory`."""
        return [self.own_role(module) for _, module in self.attentions(model)]

    def own_role(self, module: nn.Module) -> HeadRole:
        """What one attention remembers: the last frames and a sink, or all frames its cache has room for."""
        size = int(getattr(module, "local_attn_size", -1))
        if size == -1 and not self.rolls:
            return Full()
        positions = self.verified.get(digest(module) or "", self.positions)
        size, sink = self.untold_window if size == -1 else size, int(module.sink_size)  # type: ignore[arg-type]
        return SlidingWindow(size, sink, positions=positions)

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`.

        Raises:
            StreamShapeError: the call is not of whole frames, or says two things about its frames.
        """
        given = bind(module, args, kwargs)
        if (cache := given[self.cache]) is None:
            return None
        if self.rope is not None:
            given.setdefault(self.rope, getattr(module, self.rope, None))
        x = self.hidden(given)
        frames, height, width = self.grid_of(module, given, x.shape[1])
        unit = height * width if self.start_in == "tokens" else 1
        begin = self.begin(module, given)
        start, rest = divmod(begin, unit)
        if rest:
            raise StreamShapeError(
                f"{self.start} {begin} is no multiple of {unit} tokens per frame ({height}x{width}): "
                "expected tokens, not frames"
            )
        if self.end is not None and (end := _number(module, given[self.end])) != (start + frames) * unit:
            raise StreamShapeError(
                f"the call ends at {self.end} {end}, but its {frames} frames from {self.start} {begin} on "
                f"end at {(start + frames) * unit}"
            )
        return AttentionCall(x, start, (frames, height, width), self.anchor(cache), given)

    def begin(self, module: nn.Module, given: Mapping[str, Any]) -> int:
        """Where a call begins, in the unit of `start`."""
        return _number(module, given[self.start])

    def hidden(self, given: Mapping[str, Any]) -> Tensor:
        """Hidden states of a call, `[B, L, C]`."""
        return given[self.forward[0]]  # type: ignore[no-any-return]

    def grid_of(self, module: nn.Module, given: Mapping[str, Any], tokens: int) -> tuple[int, int, int]:
        """Frames, height and width of a call of so many tokens."""
        grids = given[str(self.grid)]
        if isinstance(grids, Tensor):
            every = host_numbers(module, grids)
            if any(grid != every[0] for grid in every):
                raise StreamShapeError(f"samples of one batch have different grids {every}: expected one")
            grids = every[0]
        frames, height, width = map(int, grids)
        if frames * height * width != tokens:
            raise StreamShapeError(
                f"{self.grid} says {frames} frames of {height}x{width} patches: expected the {tokens} "
                "tokens of the call"
            )
        return frames, height, width

    def anchor(self, cache: Any) -> object:
        """What lives as long as the timeline of a cache."""
        return entry(cache, "k")

    def traced_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> TracedCall | None:
        """See `Adapter.traced_call`; masks are for training, roles say what is attended to."""
        if len(args) > len(self.forward) or any(name in kwargs for name in self.forward[: len(args)]):
            return None  # a wrong call, which says so where it is served
        call = {**dict(zip(self.forward, args, strict=False)), **kwargs}
        if self.mask in self.forward:
            call[self.mask] = None
        held = isinstance(call.get(self.cache), dict)  # a graph cannot be given other objects
        return TracedCall(call, call[self.forward[0]]) if held else None

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """False: a chunk at frame 0 begins a video, where the base model says nothing else."""
        return False

    def project(self, module: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter.project`."""
        heads, head_dim = self.heads(module)
        layers = [getattr(module, name) for name in self.projections]
        parts = [layer(call.x) for layer in layers]
        if len(layers) == 1:
            kv = int(getattr(module, self.kv_heads)) * head_dim
            parts = list(parts[0].split((heads * head_dim, kv, kv), dim=-1))
        return self.split_heads(module, parts, call)

    def split_heads(
        self, module: nn.Module, parts: Sequence[Tensor], call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, L, C]`, normalised, as `[B, F, P, H, D]`."""
        heads, head_dim = self.heads(module)
        norms = [getattr(module, name) for name in self.norms]
        found = []
        for part, norm in zip(parts, (*norms, None), strict=True):
            whole = part if norm is None or self.norm_per_head else norm(part)
            shaped = whole.view(len(part), call.grid[0], call.tokens_per_frame, -1, head_dim)
            normed = norm(shaped) if norm is not None and self.norm_per_head else shaped
            copies = heads // normed.shape[-2]
            found.append(normed if copies == 1 else normed.repeat_interleave(copies, dim=-2))
        return found[0], found[1], found[2]

    def rotate(self, x: Tensor, call: AttentionCall, positions: Sequence[float], patch: int = 1) -> Tensor:
        """See `Adapter.rotate`."""
        cache, pairs = call.rotary_cache, x.shape[-1] // 2
        table = rope.wan_table(pairs, x.device) if self.rope is None else call.arguments[self.rope]
        if self.halves:
            x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        if isinstance(table, Tensor):
            turned = rope.rotate(x, table, positions, *call.grid[1:], patch, cache)
        else:
            cos, sin = (rope.per_pair(each, pairs, self.halves) for each in table)
            turned = rope.rotate_real(x, (cos, sin), positions, *call.grid[1:], patch, cache)
        return turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.halves else turned

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        """Projects."""
        return self.project_out(module, out)

    def project_out(self, module: nn.Module, out: Tensor) -> Tensor:
        """What the attention makes of the attended `out`."""
        return out if self.out is None else getattr(module, self.out)(out.flatten(2))

    def clock(self, model: nn.Module) -> nn.Module | None:
        """The transformer: it embeds the timestep and holds the blocks."""
        found = [module for module in model.modules() if set(self.root) <= module._modules.keys()]
        return found[0] if len(found) == 1 else None

    def phase(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Phase:
        """The clean pass is the one whose timesteps are all `context_noise`."""
        name, place = self.timestep
        times: Tensor = kwargs[name] if name in kwargs else args[place]
        return "clean" if bool((times == self.context_noise).all()) else "denoise"

    def cross_attentions(self, model: nn.Module) -> list[nn.Module]:
        """The neighbour of every self-attention.

        Raises:
            UnsupportedModelError: a block has none.
        """
        parents = [name.rpartition(".")[0] for name, _ in self.attentions(model)]
        found = [getattr(model.get_submodule(parent), self.neighbour, None) for parent in parents]
        if any(not isinstance(module, nn.Module) for module in found):
            raise UnsupportedModelError(f"a block has no {self.neighbour}: its prompt cannot be switched")
        return found  # type: ignore[return-value]

    def forget_prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The base model projects the prompt where `is_init` of the cache, a dict or an object, is false."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, dict) and "is_init" in value:
                value["is_init"] = False
            elif hasattr(value, "is_init"):
                value.is_init = False

    def release(self, call: AttentionCall, memo: Memo) -> int:
        """Leaves `k` and `v` their shape but no memory: one element, seen everywhere."""
        return free([entry(call.arguments[self.cache], name) for name in ("k", "v")], memo)

    def give_back(self, anchor: object, memo: Memo) -> None:
        """Zeros for `k` and `v`: a cache nothing was written to."""
        allocate_again(memo)


def _number(module: nn.Module, value: Tensor | int) -> int:
    """A whole number of a call; a tensor of one element is read once per pass."""
    if not isinstance(value, Tensor):
        return int(value)
    numbers = host_numbers(module, value)
    while isinstance(numbers, list):
        (numbers,) = numbers
    return int(numbers)
