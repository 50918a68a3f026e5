"""What an applied model holds right now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headforcing.attention.backends import Attend, find_backend
from headforcing.attention.layer_state import LayerState
from headforcing.attention.skipped import layers_named
from headforcing.attention.stream import Stream
from headforcing.roles import HeadRole


@dataclass(frozen=True)
class StreamStatus:
    """One timeline, as the first layer sees it.

    Attributes:
        committed: frames finished, stored or not.
        pending: frames of the chunk that is still being written, `(start, stop)`.
    """

    committed: int
    pending: tuple[int, int] | None


@dataclass(frozen=True)
class Status:
    """What is applied, and what it holds; bytes are counted from the tensors.

    Attributes:
        applied: whether it is in place; false after `remove()`.
        adapter: name of the adapter.
        layers: attention layers served.
        heads: heads per layer.
        window: frames the model was trained on.
        backend: how attention is computed: the name of a backend, or of the function that was passed.
        roles: heads per role, over all layers.
        calls: attention calls served since apply.
        unserved: layers never called with a cache since apply.
        bypassed: calls that had a cache but went to the original forward (training, gradients).
        streams: the timelines alive now.
        stored_bytes: keys and values stored by all layers and streams.
        released_bytes: the base model's own K/V that is freed while we are in.
    """

    applied: bool
    adapter: str
    layers: int
    heads: int
    window: int
    backend: str
    roles: Mapping[HeadRole, int]
    calls: int
    unserved: tuple[int, ...]
    bypassed: int
    streams: tuple[StreamStatus, ...]
    stored_bytes: int
    released_bytes: int

    @property
    def active(self) -> bool:
        """Whether head forcing is in place and has served a call."""
        return self.applied and self.calls > 0

    def __str__(self) -> str:
        roles = "\n".join(f"  {count:4d} heads  {role}" for role, count in self.roles.items())
        idle = f"  {layers_named(self.unserved)}: not called so far\n" if self.unserved else ""
        state = "active" if self.active else "no call yet" if self.applied else "removed"
        return (
            f"head forcing on {self.layers} layers x {self.heads} heads ({self.adapter}, window "
            f"{self.window} frames, {self.backend}), {state}\n{roles}\n{idle if self.active else ''}"
            f"  {len(self.streams)} streams, {self.stored_bytes / 1e6:.2f} MB stored, "
            f"{self.released_bytes / 1e6:.2f} MB of the base model's cache released"
        )


def collect(layers: Sequence[LayerState], applied: bool) -> Status:
    """The status of a model from the state of its layers."""
    streams = [stream for layer in layers for stream in list(layer.streams.values())]
    first = layers[0]
    return Status(
        applied=applied,
        adapter=first.options.adapter.name,
        layers=len(layers),
        heads=first.num_heads,
        window=first.options.window,
        backend=_name(first.options.attend),
        roles=first.options.roles.counts(),
        calls=first.activity.calls,
        unserved=tuple(sorted(first.activity.layers - first.activity.served)),
        bypassed=first.activity.bypassed,
        streams=tuple(_stream_status(stream) for stream in list(first.streams.values())),
        stored_bytes=sum(stream.store.nbytes() for stream in streams),
        released_bytes=sum(stream.released for stream in streams),
    )


def _name(attend: Attend) -> str:
    """A backend's module without the folder, or the name of a function passed in."""
    module, folder = getattr(attend, "__module__", ""), f"{find_backend.__module__}."
    if module.startswith(folder):
        return module.removeprefix(folder)
    return getattr(attend, "__qualname__", type(attend).__qualname__)


def _stream_status(stream: Stream) -> StreamStatus:
    pending = stream.store.pending
    return StreamStatus(stream.store.committed, None if pending is None else (pending.start, pending.stop))
