"""The whole data flow of one attention call, on one screen: `HeadForcingMixin._head_forced`.

`HeadForcingMixin` is put in front of the class of a base model's self-attention module. It keeps one
attribute on the module, `_headforcing`, the state of the layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.attention import compile as traced
from headforcing.attention.layer_call import LayerCall
from headforcing.attention.layer_state import LayerState
from headforcing.attention.rerun import rerun
from headforcing.attention.stream import Stream, check_clean, unreported_of
from headforcing.errors import PatchedModuleError, StreamActiveError, StreamError
from headforcing.stores.checks import check_ended
from headforcing.types import AttentionCall, Chunk


class HeadForcingMixin(nn.Module):
    """Gives every head of a self-attention module the memory that fits its role."""

    _headforcing: LayerState

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

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of a compiled model, which ran the hooks itself."""
        with self._headforcing.activity.running():
            return self._attended(args, kwargs)

    def _attended(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serves the call, chunk by chunk; calls without a cache and training go to the original forward."""
        state = self._headforcing
        adapter = state.options.adapter
        call = adapter.read(self, args, kwargs)
        if call is None or tracks_gradients(self, call.x):
            return self._original(call, args, kwargs)
        *past, last = adapter.split(self, call)
        if not past:
            return self._head_forced(state, last)
        outs = [self._head_forced(state, one, observed=False) for one in past]
        return adapter.join(self, [*outs, self._head_forced(state, last)], call)

    def _head_forced(self, state: LayerState, call: AttentionCall, observed: bool = True) -> Any:
        """One chunk: write its keys and values, read what every role attends to, attend, project."""
        adapter, stream = state.options.adapter, state.stream(call)
        edited = _follow_cache(self, state, stream, call)
        if state.activity.phase_hook:
            call = _with_phase(call, stream, state)
        state.activity.begin_call(state.layer, stream, call.start)

        q, k, v = adapter.project(self, call)  # [B, F, P, H, D], before RoPE
        brought = _chunk(call, q, k, v)
        chunk = rerun(brought, stream, state.options, call.emptied) if call.repeats else brought
        stream.write(chunk, call.phase)
        state.activity.note_write(state.layer, stream.store)
        stream.released += adapter.release(call, stream.memo)

        written = LayerCall(state, stream, call, chunk, q)
        parts, views = written.read()
        out = state.options.attend(parts, state.num_heads)  # [B, L, H, D]
        for observe in state.activity.observers if observed else ():
            observe(written.observation(parts, views, out, edited or chunk is not brought))
        return adapter.output(self, out, call, stream.memo)

    def _original(self, call: AttentionCall | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The forward of the base model."""
        state = self._headforcing
        if call is not None:
            if call.anchor is not None and call.anchor in state.streams:
                raise StreamActiveError(
                    f"layer {state.layer}: this cache holds a head-forced video, but the model now trains "
                    "or requires gradients: use model.eval() and torch.no_grad(), or another cache"
                )
            state.activity.bypass()
        return super().forward(*args, **kwargs)

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call under a compiler: one operator of the graph, or served between two graphs."""
        if not traced.POSSIBLE:
            return traced.serve_between_graphs(self, args, kwargs)
        state, adapter = self._headforcing, self._headforcing.options.adapter
        if torch.compiler.is_exporting():
            raise PatchedModuleError(
                f"layer {state.layer}: an exported program outlives the memory of this process: remove head "
                "forcing before torch.export, or use torch.compile"
            )
        for hooked in (state.activity.prompt_hooks, state.activity.phase_hook):
            if hooked:
                pass  # read so that dynamo guards on it: graphs from before the hooks are recompiled
        call = adapter.traced_call(self, args, kwargs)
        if call is None or tracks_gradients(self, call.like) or not traced.fits(call.arguments):
            return traced.serve_between_graphs(self, args, kwargs)
        return adapter.answer(*traced.attend(state.key, state.activity.order, call), call)

    def __reduce_ex__(self, protocol: Any) -> Any:
        own: Any = self  # what PyTorch compiled for this object stays with it
        return _rebuild, (original_class(self),), own.__getstate__()


def _follow_cache(module: nn.Module, state: LayerState, stream: Stream, call: AttentionCall) -> bool:
    """Does to our memory what the base model did to its cache since the last call; whether it edited it."""
    adapter = state.options.adapter
    if adapter.begins_video(call, stream.memo):
        unreported = unreported_of(stream.all_layers)
        stream.store.reset()
        check_ended(unreported)
    edits = adapter.edits(module, call, stream.memo)
    for edit in edits:
        stream.store.edit(edit, call.start)
    return bool(edits)


def _chunk(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Chunk:
    """What the call brings to the stores, without gradients."""
    k, v, past = k.detach(), v.detach(), q.detach()
    return Chunk(call.start, k, v, call.grid[1:], past, rolling=call.rolling, shift=call.shift)


def _with_phase(call: AttentionCall, stream: Stream, state: LayerState) -> AttentionCall:
    """The call with its phase, for roles that ask.

    Raises:
        StreamError: the phase is not known, or the chunk before had no clean pass.
    """
    phase, pending = state.activity.phase, stream.store.pending
    if phase is None:
        raise StreamError(
            f"layer {state.layer}: roles ask for the phase, but attention ran outside the model that tells it"
        )
    if pending is not None and call.start > pending.start:
        check_clean(stream, state.layer)
    return dataclasses.replace(call, phase=phase)


def tracks_gradients(module: nn.Module, x: Tensor) -> bool:
    """Whether a call belongs to training, which head forcing leaves to the original forward."""
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
