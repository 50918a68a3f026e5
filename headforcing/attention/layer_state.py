"""The state of one layer, which is `_headforcing` on the module, and the options of all of them."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from headforcing.adapters.base import Adapter
from headforcing.attention.activity import Activity
from headforcing.attention.backends import Attend
from headforcing.attention.compile import number
from headforcing.attention.stream import Stream, open_stream
from headforcing.errors import StreamActiveError, StreamError
from headforcing.roles import HeadRole
from headforcing.roles.maps.role_map import RoleMap
from headforcing.stores import KVStore
from headforcing.types import AttentionCall, Heads


def _by_anchor() -> MutableMapping[object, Stream]:
    """Streams that die with their anchors: no id is ever stored, no cache object is kept alive."""
    return WeakIdKeyDictionary()


def check_settled(first: LayerState, what: str) -> None:
    """Checks that all layers stand at the same chunk, as between two passes; `first` is the first layer.

    Raises:
        StreamActiveError: they do not.
    """
    for stream in list(first.streams.values()):
        pending = stream.store.pending
        if any(one.store.interrupted or one.store.pending != pending for one in stream.all_layers):
            raise StreamActiveError(
                f"{what}() between two layers of a pass, or after one that failed there: call it between two "
                "chunks, run a failed one again first"
            )


@dataclass(frozen=True)
class Options:
    """What was applied: the roles, and the tools that serve them. Equal options are one application."""

    roles: RoleMap
    window: int
    adapter: Adapter = field(compare=False)
    store: type[KVStore]
    attend: Attend


@dataclass(eq=False)
class LayerState:
    """The state of one layer; the only attribute that head forcing puts on the attention module.

    Attributes:
        layer: number of the layer.
        options: what was applied to the model.
        activity: counters shared by all layers.
        handle: the handle of the model, while somebody holds it.
        original: the module that was replaced, while somebody holds it.
        module: the replacement, likewise.
        own_forward: the module's own forward, where it lay in its `__dict__`, as accelerate leaves it.
        streams: streams of this layer by the anchor of their timeline.
        key: the number by which compiled calls find this state.
    """

    layer: int
    options: Options
    activity: Activity
    handle: weakref.ref[Any] | None = None
    original: weakref.ref[Any] | None = None
    module: weakref.ref[nn.Module] | None = None
    own_forward: Any = None
    streams: MutableMapping[object, Stream] = field(default_factory=_by_anchor)
    key: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.activity.layers.add(self.layer)
        self.key = number(self)
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
        if not type(anchor).__weakrefoffset__:
            raise StreamError(
                f"layer {self.layer}: {self.options.adapter.name} anchors the timeline at a "
                f"{type(anchor).__name__}, which nothing can refer to weakly, so our memory would outlive "
                "it: take an object that lives as long, such as a tensor of the cache, or put one into it"
            )
        stream = self.streams.get(anchor)
        if stream is None:
            store = self.options.store(self.heads, window=self.options.window, layer=self.layer)
            with self.activity.lock:
                stream = self.streams[anchor] = Stream(store, module=self.module)
        return stream

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serves one call of the layer's module; see `headforcing.attention.compile`."""
        module: Any = None if self.module is None else self.module()
        return module.serve(args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled layer serves the same roles with an empty memory of its own."""
        module = None if self.module is None else self.module()
        left = dict.fromkeys(("streams", "handle", "original", "own_forward", "key"))
        return {**self.__dict__, **left, "module": module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state["module"]  # that of the copy, which is copied together with its state
        ref = None if module is None else weakref.ref(module)
        self.__dict__.update(state, streams=_by_anchor(), module=ref, key=number(self))
        self.activity.layers.add(self.layer)
