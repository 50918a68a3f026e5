"""One layer's memory on one timeline, and the timeline that the user names where calls carry no cache."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from headforcing.errors import StreamError
from headforcing.stores import KVStore
from headforcing.types import Chunk, Phase


class Timeline:
    """The anchor of a stream that the user opened."""

    def __init__(self, name: str) -> None:
        self.name = name


open_stream: ContextVar[Timeline | None] = ContextVar("headforcing_stream", default=None)
"""The stream opened by `handle.stream()` in this thread or task."""


@dataclass(eq=False)
class Stream:
    """One layer's memory on one timeline, and what the adapter noted about the host's cache.

    Attributes:
        store: the memory.
        memo: the adapter's notes.
        released: bytes of the host's cache that are free meanwhile.
        behind: the same timeline in the layers after the first, as the last pass met them.
        phase: of the last pass, where roles ask.
        unfinished: whether the last pass was the first one over a window of several chunks, of which the host
            runs the first one again, clean.
        module: the attention, while it is there.
        turn: number and first frame of the last pass that wrote.
    """

    store: KVStore
    memo: dict[str, Any] = field(default_factory=dict)
    released: int = 0
    behind: weakref.WeakSet[Stream] = field(default_factory=weakref.WeakSet)
    phase: Phase | None = None
    unfinished: bool = False
    module: weakref.ref[nn.Module] | None = None
    turn: tuple[int | None, int] | None = None

    def write(self, chunk: Chunk, phase: Phase) -> None:
        """Takes one pass over a chunk; see `KVStore.write`."""
        before = self.store.pending
        self.store.write(chunk)
        self.phase = phase
        self.unfinished = chunk.rolling and (before is None or chunk.frames.stop > before.stop)


def check_finished(stream: Stream, layer: int) -> None:
    """Looks whether a window of chunks that are denoised at once had the clean pass of its first one.

    Raises:
        StreamError: it had not, and all of it would be remembered as it is, with its noise.
    """
    pending = stream.store.pending
    if pending is not None and stream.unfinished:
        raise StreamError(
            f"layer {layer}: frames {pending.start}..{pending.stop - 1} are denoised at once, and their "
            "first chunk had no clean pass yet: call commit() behind it, or leave it to the next window"
        )


def check_clean(stream: Stream, layer: int) -> None:
    """Looks whether the pending chunk had its clean pass, where roles ask for phases.

    Raises:
        StreamError: its last pass was noisy.
    """
    pending = stream.store.pending
    if pending is not None and stream.phase != "commit":
        raise StreamError(
            f"layer {layer}: frames {pending.start}..{pending.stop - 1} had no clean pass, their last one "
            "was noisy: if the host writes its cache at another noise level, say so, as in "
            "adapter=SelfForcing(context_noise=...)"
        )
