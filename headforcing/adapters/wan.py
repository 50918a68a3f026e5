"""What the adapters of Wan-like models share: modules, calls, RoPE, cross-attention, the cache.

The facts: `self_attn` of every block has linear `q`, `k`, `v`, `o`, norms over the full dim before heads are
split, frame-major tokens and 3-D RoPE as a complex table; the pipeline owns a dict per layer with `k` and
`v`, `[B, tokens, H, D]`. What differs is an adapter in `integrations/`: names of arguments, who counts, what
is returned, who else edits the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from headforcing.adapters import rope
from headforcing.adapters.base import Adapter, Memo, bind, parameter_names
from headforcing.adapters.host_cache import allocate_again, free
from headforcing.adapters.verified import digest
from headforcing.errors import StreamShapeError, UnsupportedModelError
from headforcing.roles import Full, HeadRole, SlidingWindow
from headforcing.roles.positions import PositionScheme
from headforcing.types import AttentionCall, Phase, TracedCall

CALL = ("x", "seq_lens", "grid_sizes", "freqs", "block_mask", "kv_cache", "current_start")
"""The first arguments of the attention's `forward`, alike in all of these base models."""
SUBMODULES = ("q", "k", "v", "o", "norm_q", "norm_k")
TRAINED_WINDOW = 21
"""Latent frames Wan-like AR models are trained on; one with `local_attn_size=-1` does not carry it."""


class WanAdapter(Adapter):
    """The attention skeleton of Wan; see the module.

    Args:
        context_noise: timestep of the clean pass that writes the cache, as in the base model's configuration.

    Attributes:
        forward: names of the arguments of the attention's `forward`, by which the base model is recognised.
        numbers: attributes of the attention that are whole numbers.
        submodules: attributes of the attention that are modules.
        neighbour: name of the cross-attention in the same block.
        root: attributes of the transformer, which receives the timestep.
        timestep: name and place of this argument.
        positions: of the own memory of code that was never verified.
    """

    forward: ClassVar[tuple[str, ...]]
    numbers: ClassVar[tuple[str, ...]] = ("num_heads", "head_dim", "local_attn_size", "sink_size")
    submodules: ClassVar[tuple[str, ...]] = SUBMODULES
    neighbour: ClassVar[str] = "cross_attn"
    root: ClassVar[tuple[str, ...]] = ("time_embedding", "blocks")
    timestep: ClassVar[tuple[str, int]] = ("t", 1)
    positions: ClassVar[PositionScheme] = "absolute"

    def __init__(self, context_noise: float = 0) -> None:
        self.context_noise = context_noise

    def why_not(self, model: nn.Module) -> str | None:
        """See `Adapter.why_not`."""
        if any(True for _ in self.attentions(model)):
            return None
        parts = ", ".join((*self.submodules, *self.numbers))
        return f"no module has {parts} and forward({', '.join(self.forward)})"

    def attentions(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """See `Adapter.attentions`."""
        for name, module in model.named_modules():
            if all(isinstance(getattr(module, part, None), nn.Module) for part in self.submodules) and (
                all(isinstance(getattr(module, number, None), int) for number in self.numbers)
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
        return TRAINED_WINDOW if size == -1 else size

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
        if (size := getattr(module, "local_attn_size", -1)) == -1:
            return Full()
        positions = self.verified.get(digest(module) or "", self.positions)
        return SlidingWindow(size, int(module.sink_size), positions=positions)  # type: ignore[arg-type]

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """See `Adapter.read`."""
        arguments = bind(module, args, kwargs)
        cache = arguments["kv_cache"]
        if cache is None:
            return None
        grids = arguments["grid_sizes"].tolist()
        if any(grid != grids[0] for grid in grids):
            raise StreamShapeError(f"samples of one batch have different grids {grids}: expected one")
        frames, height, width = grids[0]
        start, rest = divmod(int(arguments["current_start"]), height * width)
        if rest:
            raise StreamShapeError(
                f"current_start {arguments['current_start']} is no multiple of {height * width} tokens "
                f"per frame ({height}x{width}): expected tokens, not frames"
            )
        return AttentionCall(arguments["x"], start, (frames, height, width), cache["k"], arguments)

    def traced_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> TracedCall | None:
        """See `Adapter.traced_call`; masks are for training, roles say what is attended to."""
        if len(args) > len(self.forward) or any(name in kwargs for name in self.forward[: len(args)]):
            return None  # a wrong call, which says so where it is served
        call = {**dict(zip(self.forward, args, strict=False)), **kwargs, "block_mask": None}
        return None if call.get("kv_cache") is None else TracedCall(call, call[self.forward[0]])

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        """False: a chunk at frame 0 begins a video, where the base model says nothing else."""
        return False

    def project(self, module: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter.project`."""
        x, m = call.x, module
        shape = (x.shape[0], call.grid[0], call.tokens_per_frame, *self.heads(module))
        q, k, v = m.norm_q(m.q(x)), m.norm_k(m.k(x)), m.v(x)  # type: ignore[operator]
        return q.view(shape), k.view(shape), v.view(shape)

    def rotate(self, x: Tensor, call: AttentionCall, positions: Sequence[float], patch: int = 1) -> Tensor:
        """See `Adapter.rotate`."""
        return rope.rotate(x, call.arguments["freqs"], positions, *call.grid[1:], patch, call.rotary_cache)

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        """Projects."""
        return self.project_out(module, out)

    def project_out(self, module: nn.Module, out: Tensor) -> Tensor:
        """What the attention makes of the attended `out`."""
        return module.o(out.flatten(2))  # type: ignore[operator, no-any-return]

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
        """The base model projects the prompt where `is_init` of the cache is false."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, dict) and "is_init" in value:
                value["is_init"] = False

    def release(self, call: AttentionCall, memo: Memo) -> int:
        """Leaves `k` and `v` their shape but no memory: one element, seen everywhere."""
        return free([call.arguments["kv_cache"][name] for name in ("k", "v")], memo)

    def give_back(self, anchor: object, memo: Memo) -> None:
        """Zeros for `k` and `v`: a cache nothing was written to."""
        allocate_again(memo)
