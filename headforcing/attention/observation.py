"""What one attention call did, for those who measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from headforcing.attention.backends import Part
from headforcing.types import AttentionCall, Chunk, Encode


@dataclass(frozen=True)
class Observation:
    """One attention call, shown after the heads have attended and before the output is projected.

    The tensors are the engine's own: read them now, write to none, keep none that a store may reuse.

    Attributes:
        layer: number of the layer.
        call: the call of the base model.
        timeline: the layer's stream; the same object as long as the stream lives.
        chunk: keys and values of the current chunk, before RoPE.
        q: queries of the current chunk, before RoPE, `[B, F, P, H, D]`.
        parts: what the heads of every role attended with, one per query frame where a role reads so.
        frames: per part, the whole frames in view, current chunk last (`None`: chosen by content).
            Compressed tokens are not among them; they come first in the part's keys and values.
        positions: per part, the temporal RoPE positions of those frames.
        out: what came out, `[B, L, H, D]`.
        encode: rotates keys or queries to positions.
        sizes: per part, the keys of each of those frames; those that follow belong to no frame. `None`: all
            have one per patch of the chunk.
        edited: whether the base model edited its cache before this call, or recomputes frames.
    """

    layer: int
    call: AttentionCall
    timeline: object
    chunk: Chunk
    q: Tensor
    parts: Sequence[Part]
    frames: Sequence[tuple[int | None, ...]]
    positions: Sequence[tuple[float, ...]]
    out: Tensor
    encode: Encode
    sizes: Sequence[tuple[int, ...]] | None
    edited: bool


Observer = Callable[[Observation], None]
"""Called for every attention call that is head-forced; see `HeadForcing.observe`."""
