"""Frames that the host runs again in one call, as many as there are, to hear a new prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from headforcing.attention.plan import Options
from headforcing.attention.stream import Stream
from headforcing.errors import WindowError
from headforcing.stores.switch import Switch
from headforcing.types import Chunk


def rerun(chunk: Chunk, stream: Stream, options: Options, emptied: bool = False) -> Chunk:
    """The part of a chunk that is remembered: all of it, unless its frames run again.

    Then it is the last ones, as many as every role has room for beside what it keeps, in place of what the
    video ends with. The frames before them look, and are not seen.

    Args:
        chunk: what the host brings.
        stream: of the layer.
        options: what was applied.
        emptied: whether the host emptied its cache first, so that nothing is beside these frames.

    Raises:
        StreamError: these frames cannot be told from others in some layer; nothing has changed.
    """
    pending, frames = stream.store.pending, chunk.frames
    if pending is None or frames.stop != pending.stop or frames.start >= pending.start:
        return chunk
    whole = (frames.start == 0 or emptied) and len(frames) <= options.window
    last = len(frames) if whole else max(n for n in range(1, len(frames) + 1) if _fits(options, n))
    switch = Switch("recache", frames=last)
    for met in () if emptied else (stream, *stream.behind):
        met.store.check_switch(switch)
    stream.store.scenes.ask(switch)
    skip = len(frames) - last
    stream.store.scenes.skip(frames.start, skip)
    q = None if chunk.q is None else chunk.q[:, skip:]
    k, v = chunk.k[:, skip:], chunk.v[:, skip:]
    return dataclasses.replace(chunk, start=chunk.start + skip, k=k, v=v, q=q, alone=whole)


def seats(positions: Sequence[float], frames: int, chunk: int) -> tuple[float, ...]:
    """Where the queries of a call of `frames` frames sit, the last `chunk` of which end the view."""
    own = positions[len(positions) - chunk :]
    return (*(max(own[0] - before, 0) for before in range(frames - chunk, 0, -1)), *own)


def _fits(options: Options, chunk: int) -> bool:
    try:
        for role in {role for row in options.roles.layers for role in row}:
            role.fit(options.window, chunk)
    except WindowError:
        return False
    return True
