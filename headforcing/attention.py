"""The whole data flow of one attention call, on one screen.

`HeadForcingMixin` is put in front of the class of a host's self-attention module. It keeps nothing of
its own on the module but one attribute, `_headforcing`, the plan of the layer.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from headforcing.adapter import Adapter
from headforcing.backends import Attend, Part
from headforcing.errors import StreamActiveError, StreamError
from headforcing.role_map import RoleMap
from headforcing.roles import HeadRole
from headforcing.stores import KVStore
from headforcing.types import AttentionCall, Chunk, Heads


class Timeline:
    """The anchor of a stream that the user opened, for hosts whose calls carry no cache object."""

    def __init__(self, name: str) -> None:
        self.name = name


open_stream: ContextVar[Timeline | None] = ContextVar("headforcing_stream", default=None)
"""The stream opened by `handle.stream()` in this thread or task."""


@dataclass
class Stream:
    """One layer's memory on one timeline, and what the adapter noted about the host's cache."""

    store: KVStore
    memo: dict[str, Any] = field(default_factory=dict)
    released: int = 0


class Activity:
    """What happened since apply, shared by all layers of a model."""

    def __init__(self) -> None:
        self.calls = 0
        self.bypassed = 0
        self.running = 0
        self._lock = threading.Lock()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Marks a call in progress."""
        with self._lock:
            self.running += 1
            self.calls += 1
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1

    def bypass(self) -> None:
        """Counts a call that went to the original forward although it had a cache; warns once."""
        if not self.bypassed:
            warnings.warn(
                "head forcing is inactive while the model trains or needs gradients: the original "
                "attention ran. Call model.eval() and use torch.no_grad() to switch it on",
                stacklevel=4,
            )
        self.bypassed += 1

    def __reduce__(self) -> Any:
        """A copy starts counting anew."""
        return Activity, ()


def _by_anchor() -> MutableMapping[object, Stream]:
    """Streams that die with their anchors: no id is ever stored, no cache object is kept alive."""
    return WeakIdKeyDictionary()


@dataclass(frozen=True)
class Options:
    """What was applied: the roles, and the tools that serve them. Equal options are one application."""

    roles: RoleMap
    window: int
    adapter: Adapter = field(compare=False)
    store: type[KVStore]
    attend: Attend


@dataclass
class LayerPlan:
    """What one layer needs to know.

    Attributes:
        layer: number of the layer.
        options: what was applied to the model.
        activity: counters shared by all layers.
        handle: the handle of the model, while somebody holds it.
        streams: memories of this layer by the anchor of their timeline.
    """

    layer: int
    options: Options
    activity: Activity
    handle: weakref.ref[Any] | None = None
    streams: MutableMapping[object, Stream] = field(default_factory=_by_anchor, compare=False)

    def __post_init__(self) -> None:
        row = self.options.roles.layers[self.layer]
        members: dict[HeadRole, list[int]] = {}
        for head, role in enumerate(row):
            members.setdefault(role, []).append(head)
        self.num_heads = len(row)
        self.heads = {role: Heads(indices, len(row)) for role, indices in members.items()}

    def stream(self, call: AttentionCall) -> Stream:
        """The stream of a call; a new one where its anchor was never seen."""
        anchor = open_stream.get() if call.anchor is None else call.anchor
        if anchor is None:
            raise StreamError(
                f"layer {self.layer}: the call carries no cache object, so its timeline cannot be told: "
                "run it inside `with handle.stream(name):`, one name per video and CFG branch"
            )
        stream = self.streams.get(anchor)
        if stream is None:
            store = self.options.store(self.heads, window=self.options.window, layer=self.layer)
            stream = self.streams[anchor] = Stream(store)
        return stream

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled plan serves the same roles with an empty memory of its own."""
        return {**self.__dict__, "streams": None, "handle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, streams=_by_anchor())


class HeadForcingMixin(nn.Module):
    """Gives every head of a self-attention module the memory its role needs."""

    _headforcing: LayerPlan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns exactly what the original forward does."""
        plan = self._headforcing
        call = plan.options.adapter.read(self, args, kwargs)
        if call is None or needs_grad(self, call.x):
            return self._original(call, args, kwargs)
        with plan.activity.call():
            return self._head_forced(plan, call)

    def _head_forced(self, plan: LayerPlan, call: AttentionCall) -> Any:
        adapter, stream = plan.options.adapter, plan.stream(call)
        if adapter.begins_video(call, stream.memo):
            stream.store.reset()
        q, k, v = adapter.project(self, call)  # [B, F, P, H, D]
        stream.store.write(Chunk(call.start, k.detach(), v.detach()))
        stream.released += adapter.release(call, stream.memo)

        def encode(x: Tensor, positions: Sequence[int]) -> Tensor:
            return adapter.rotate(x, call, positions)

        parts = []
        for role, heads in plan.heads.items():
            view = stream.store.view(role, call.phase, encode)
            own = view.positions[-q.shape[1] :]
            rotated = encode(heads.take(q), own).to(v.dtype)
            parts.append(Part(heads, *(x.flatten(1, 2) for x in (rotated, view.k, view.v))))
        out = plan.options.attend(parts, plan.num_heads)  # [B, L, H, D]
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
        return _rebuild, (original_class(self),), self.__dict__


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

    name = f"HeadForced{original.__name__}"
    return type(name, (HeadForcingMixin, original), {"forward": forward})


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
