"""Role maps that need no measuring, by name.

Head Forcing itself is not among them: its roles belong to a checkpoint, so it takes a measured map.
"""

from __future__ import annotations

from collections.abc import Callable

from headforcing.role_map import RoleMap
from headforcing.roles import Full, SlidingWindow

Preset = Callable[[int, int, int, int], RoleMap]
"""Builds a map from layers, heads, window and chunk (frames)."""


def full(layers: int, heads: int, window: int, chunk: int) -> RoleMap:
    """Every head keeps everything at its true position: the dense cache, growing."""
    return RoleMap.uniform(Full(), layers, heads)


def sliding_window(layers: int, heads: int, window: int, chunk: int) -> RoleMap:
    """Every head sees the last `window` frames: what the base model does past its training."""
    return RoleMap.uniform(SlidingWindow(window), layers, heads)


def streaming_llm(layers: int, heads: int, window: int, chunk: int) -> RoleMap:
    """Every head sees the first chunk and the last frames (arXiv:2309.17453, on frames)."""
    return RoleMap.uniform(SlidingWindow(window, sink=chunk), layers, heads)


PRESETS: dict[str, Preset] = {f.__name__: f for f in (full, sliding_window, streaming_llm)}
