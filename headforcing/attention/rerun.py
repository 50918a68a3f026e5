"""KV recache: which of the recomputed frames are stored, and where the queries of the others sit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from headforcing.attention.layer_state import Options
from headforcing.attention.stream import Stream
from headforcing.errors import WindowError
from headforcing.stores.switch import Switch
from headforcing.types import Chunk


def rerun(chunk: Chunk, stream: Stream, options: Options, emptied: bool = False) -> Chunk:
    """The part of a chunk that is stored: all of it, unless its frames are recomputed.

    Then it is the last frames, as many as fit every role beside what it keeps. They replace the frames that
    the video ends with. The frames before them attend, but are not attended to.

    Args:
        chunk: what the base model brings.
        stream: of the layer.
        options: what was applied.
        emptied: whether the base model emptied its cache first, so that only these frames are attended to.

    Raises:
        StreamError: these frames cannot be told from others in some layer; nothing has changed.
    """
    pending, frames = stream.store.pending, chunk.frames
    if pending is None or frames.stop != pending.stop or frames.start >= pending.start:
        return chunk
    whole = (frames.start == 0 or emptied) and len(frames) <= options.window
    last = len(frames) if whole else max(n for n in range(1, len(frames) + 1) if _fits(options, n))
    switch = Switch("recache", frames=last)
    for met in () if emptied else (stream, *stream.later_layers):
        met.store.check_switch(switch)
    stream.store.scenes.ask(switch)
    skip = len(frames) - last
    stream.store.scenes.skip(frames.start, skip)
    q = None if chunk.q is None else chunk.q[:, skip:]
    k, v = chunk.k[:, skip:], chunk.v[:, skip:]
    return dataclasses.replace(chunk, start=chunk.start + skip, k=k, v=v, q=q, alone=whole)


def query_positions(positions: Sequence[float], frames: int, chunk: int) -> tuple[float, ...]:
    """RoPE positions of the query frames.

    Args:
        positions: of the frames in view; the chunk comes last.
        frames: query frames.
        chunk: frames of the chunk that is stored: the last of the query frames.
    """
    own = positions[len(positions) - chunk :]
    return (*(max(own[0] - before, 0) for before in range(frames - chunk, 0, -1)), *own)


def _fits(options: Options, chunk: int) -> bool:
    try:
        for role in {role for row in options.roles.layers for role in row}:
            role.fit(options.window, chunk)
    except WindowError:
        return False
    return True
