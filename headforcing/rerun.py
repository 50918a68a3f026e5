"""Frames that the host runs again in one call, as many as there are, to hear a new prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from headforcing.errors import WindowError
from headforcing.plan import Options, Stream
from headforcing.switch import Switch
from headforcing.types import Chunk


def rerun(chunk: Chunk, stream: Stream, options: Options) -> Chunk:
    """The part of a chunk that is remembered: all of it, unless its frames run again.

    Then it is the last ones, as many as every role has room for beside what it keeps, in place of what the
    video ends with. The frames before them look, and are not seen.

    Raises:
        StreamError: these frames cannot be told from others in some layer; nothing has changed.
    """
    pending, frames = stream.store.pending, chunk.frames
    if pending is None or frames.stop != pending.stop or frames.start >= pending.start:
        return chunk
    alone = frames.start == 0 or stream.store.empty  # nothing is beside it
    whole = alone and len(frames) <= options.window
    last = len(frames) if whole else max(n for n in range(1, len(frames) + 1) if _fits(options, n))
    switch = Switch("recache", frames=last)
    for met in (stream, *stream.behind):
        met.store.check_switch(switch)
    stream.store.scenes.ask(switch)
    skip = len(frames) - last
    q = None if chunk.q is None else chunk.q[:, skip:]
    return dataclasses.replace(chunk, start=chunk.start + skip, k=chunk.k[:, skip:], v=chunk.v[:, skip:], q=q)


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
