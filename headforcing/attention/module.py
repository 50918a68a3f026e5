"""The whole data flow of one attention call, on one screen.

`HeadForcingMixin` is put in front of the class of a host's self-attention module. It keeps nothing of
its own on the module but one attribute, `_headforcing`, the plan of the layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.adapters.base import Adapter
from headforcing.attention import compile as traced
from headforcing.attention.backends import Part
from headforcing.attention.observation import Observation
from headforcing.attention.plan import LayerPlan
from headforcing.attention.rerun import rerun, seats
from headforcing.attention.stream import Stream, check_clean
from headforcing.errors import PatchedModuleError, StreamActiveError, StreamError
from headforcing.roles import HeadRole
from headforcing.stores.buffers import joined
from headforcing.types import AttentionCall, Chunk, Encode, Heads, KVView


class HeadForcingMixin(nn.Module):
    """Gives every head of a self-attention module the memory its role needs."""

    _headforcing: LayerPlan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs hooks and forward; meanwhile head forcing cannot be removed."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        with self._headforcing.activity.running():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns exactly what the original forward does."""
        if torch.compiler.is_compiling():
            return self._traced(args, kwargs)
        return self._attended(args, kwargs)

    def served(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a compiled model, which ran the hooks itself."""
        with self._headforcing.activity.running():
            return self._attended(args, kwargs)

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call as one operator of a graph, or served between two graphs."""
        if not traced.POSSIBLE:
            return traced.between_graphs(self.served, *args, **kwargs)
        plan, adapter = self._headforcing, self._headforcing.options.adapter
        if torch.compiler.is_exporting():
            raise PatchedModuleError(
                f"layer {plan.layer}: an exported program outlives the memory of this process: remove head "
                "forcing before torch.export, or use torch.compile"
            )
        if plan.activity.hears_prompts:
            pass  # asked so that graphs made before its hooks were put in are made anew
        outline = adapter.outline(self, args, kwargs)
        if outline is None or needs_grad(self, outline.like) or not traced.fits(outline.call):
            return traced.between_graphs(self.served, *args, **kwargs)
        return adapter.answer(*traced.attend(plan.key, plan.activity.order, outline))

    def _attended(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = self._headforcing
        call = plan.options.adapter.read(self, args, kwargs)
        if call is None or needs_grad(self, call.x):
            return self._original(call, args, kwargs)
        *past, last = plan.options.adapter.split(self, call)
        if not past:
            return self._head_forced(plan, last)
        outs = [self._head_forced(plan, one, shown=False) for one in past]
        return plan.options.adapter.join(self, [*outs, self._head_forced(plan, last)], call)

    def _head_forced(self, plan: LayerPlan, call: AttentionCall, shown: bool = True) -> Any:
        adapter, stream = plan.options.adapter, plan.stream(call)
        if adapter.begins_video(call, stream.memo):
            stream.store.reset()
        edits = adapter.edits(self, call, stream.memo)
        for edit in edits:
            stream.store.edit(edit, call.start)
        if plan.activity.hears_phases:
            call = _heard(call, stream, plan)
        plan.activity.serve(plan.layer, stream, call.start)
        q, k, v = adapter.project(self, call)  # [B, F, P, H, D]
        k, v, past = k.detach(), v.detach(), q.detach()
        brought = Chunk(call.start, k, v, call.grid[1:], past, rolling=call.rolling, shift=call.shift)
        chunk = rerun(brought, stream, plan.options, call.emptied) if call.repeats else brought
        stream.write(chunk, call.phase)
        plan.activity.note_turn(plan.layer, stream.store)
        stream.released += adapter.release(call, stream.memo)

        def look(role: HeadRole, heads: Heads, own: slice) -> tuple[Part, KVView]:
            """What the heads of a role attend to, from some frames of the chunk."""
            encode = _encoder(adapter, dataclasses.replace(call, heads=heads))
            query = (max(call.start + own.start, chunk.start),) if role.reads_per_query else ()
            view = stream.store.view(role, call.phase, encode, *query)
            seated = seats(view.positions, q.shape[1], len(chunk.frames))[own]
            rotated = encode(heads.take(q[:, own]), seated).to(view.v.dtype)
            k, v = (adapter.tokens(x, view.frames, call) for x in (view.k, view.v))
            beside = stream.store.view_digest(role, encode, *query) if role.sees_digest(call.phase) else None
            if beside is not None:
                k, v = (joined(first, rest) for first, rest in zip(beside, (k, v), strict=True))
            rows = slice(own.start * call.tokens_per_frame, own.stop * call.tokens_per_frame)
            return Part(heads, rotated.flatten(1, 2), k, v, rows), view

        looks = [look(role, heads, own) for role, heads in plan.heads.items() for own in _readings(role, q)]
        parts = [part for part, _ in looks]
        out = plan.options.attend(parts, plan.num_heads)  # [B, L, H, D]
        for observe in plan.activity.observers if shown else ():
            frames = [view.frames for _, view in looks]
            positions = [view.positions for _, view in looks]
            sizes = [_sizes(adapter, call, view) for _, view in looks]
            sides = (parts, frames, positions, out, _encoder(adapter, call), sizes)
            edited = bool(edits) or chunk is not brought
            observe(Observation(plan.layer, call, stream, chunk, q, *sides, edited))
        return adapter.output(self, out, call, stream.memo)

    def _original(self, call: AttentionCall | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        plan = self._headforcing
        if call is not None:
            if call.anchor is not None and call.anchor in plan.streams:
                raise StreamActiveError(
                    f"layer {plan.layer}: this cache holds a head-forced video, but the model now trains "
                    "or needs gradients: use model.eval() and torch.no_grad(), or another cache"
                )
            plan.activity.bypass()
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        own: Any = self  # what PyTorch compiled for this object stays with it
        return _rebuild, (original_class(self),), own.__getstate__()


def _sizes(adapter: Adapter, call: AttentionCall, view: KVView) -> tuple[int, ...]:
    """How many of the tokens of every frame of a view are attended to."""
    frames, patches = view.v.shape[1:3]
    marks = torch.arange(1, frames + 1).view(1, -1, 1, 1, 1).expand(1, frames, patches, 1, 1)
    seen = adapter.tokens(marks, view.frames, call).flatten()
    return tuple(torch.bincount(seen, minlength=frames + 1)[1:].tolist())


def _heard(call: AttentionCall, stream: Stream, plan: LayerPlan) -> AttentionCall:
    """The call with its phase, for roles that ask.

    Raises:
        StreamError: the phase is not known, or the chunk before had no clean pass.
    """
    phase, pending = plan.activity.phase, stream.store.pending
    if phase is None:
        raise StreamError(
            f"layer {plan.layer}: roles ask for the phase, but attention ran outside the model that tells it"
        )
    if pending is not None and call.start > pending.start:
        check_clean(stream, plan.layer)
    return dataclasses.replace(call, phase=phase)


def _encoder(adapter: Adapter, call: AttentionCall) -> Encode:
    def encode(x: Tensor, positions: Sequence[int], *patch: int) -> Tensor:
        return adapter.rotate(x, call, positions, *patch)

    return encode


def _readings(role: HeadRole, q: Tensor) -> list[slice]:
    """The frames of the chunk `[B, F, P, H, D]` that see the same."""
    frames = q.shape[1]
    step = 1 if role.reads_per_query else frames
    return [slice(first, first + step) for first in range(0, frames, step)]


def needs_grad(module: nn.Module, x: Tensor) -> bool:
    """Whether a call belongs to training: head forcing is for inference and passes such calls on."""
    if module.training:
        return True
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


@functools.cache
def patched_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a replacement: the mixin in front of the original's class, signature kept."""

    @functools.wraps(original.forward)
    def forward(self: HeadForcingMixin, *args: Any, **kwargs: Any) -> Any:
        return HeadForcingMixin.forward(self, *args, **kwargs)

    return type(f"HeadForced{original.__name__}", (HeadForcingMixin, original), {"forward": forward})


def with_class(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Another object with the same state: parameters, buffers, children, hooks, attributes."""
    twin: nn.Module = object.__new__(cls)
    twin.__dict__ = module.__dict__
    return twin


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a replacement stands for."""
    cls: type[nn.Module] = type(module).__mro__[2]
    return cls


def _rebuild(original: Any) -> nn.Module:
    patched = patched_class(original)
    return patched.__new__(patched)
