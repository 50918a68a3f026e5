"""What a choice takes on a model, before it is loaded: a preset, a role map, or a plainer memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from headforcing.errors import OptionError, RoleMapMismatchError
from headforcing.measure.memory import kept_bytes, steady, stored_bytes
from headforcing.measure.sizes import ModelSize
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.roles.maps.preset import Preset
from headforcing.roles.maps.role_map import RoleMap

STREAMING = "streaming_llm"


@dataclass(frozen=True)
class MemoryEstimate:
    """What memories take, all layers and timelines together; `None`: it grows with the video.

    Attributes:
        name: of the choice.
        stored: bytes of the store once it is full.
        kept: bytes of keys and values that the roles keep, current chunk included.
        attended: frames that a query attends to in a noisy pass, current chunk included, mean over heads.
    """

    name: str
    stored: int | None
    kept: int | None
    attended: Fraction | None


def of_preset(preset: Preset, size: ModelSize) -> RoleMap:
    """The map of a preset, or one layer with the published numbers of heads where heads differ.

    Raises:
        OptionError: how many heads have which label is not published.
        WindowError: a role does not fit the window.
    """
    if preset.shares() is None:
        raise OptionError(
            f"{preset.name}: {preset.counted}, so what it takes is not known: give a role map of your model "
            "with --roles"
        )
    named = preset.roles(size.window, size.chunk)
    return published_map(preset, {k: role.fit(size.window, size.chunk) for k, role in named.items()}, size)


def published_map(preset: Preset, roles: Mapping[str, HeadRole], size: ModelSize) -> RoleMap:
    """A map with the published numbers of heads, as one layer; of the model, where all heads are alike."""
    if not preset.labels_needed():
        (role,) = roles.values()
        return RoleMap.uniform(role, size.layers, size.heads)
    return RoleMap((tuple(role for label, role in roles.items() for _ in range(preset.published[label])),))


def of_map(name: str, roles: RoleMap, size: ModelSize) -> RoleMap:
    """A role map of the model, fitted.

    Raises:
        RoleMapMismatchError: it is for other layers or heads.
        WindowError: a role does not fit the window.
    """
    if roles.shape != (size.layers, size.heads):
        raise RoleMapMismatchError(
            f"{name} is for {roles.shape[0]} layers x {roles.shape[1]} heads, the model has {size.layers} x "
            f"{size.heads}: give another --model, or --layers {roles.shape[0]} --heads {roles.shape[1]}"
        )
    return roles.fit(size.layers, size.heads, size.window, size.chunk)


def streaming_at(frames: Fraction, size: ModelSize) -> tuple[str, RoleMap]:
    """StreamingLLM that attends to as many frames, to the nearest; its sink is a chunk if that fits."""
    count = min(max(round(frames), size.chunk + 1), size.window)
    role = SlidingWindow(count, sink=min(size.chunk, count - size.chunk)).fit(size.window, size.chunk)
    return f"{STREAMING}, {count} frames", RoleMap.uniform(role, size.layers, size.heads)


def estimate(name: str, roles: RoleMap, size: ModelSize, *, store: str, streams: int = 1) -> MemoryEstimate:
    """What a choice of roles takes.

    Args:
        name: of the choice.
        roles: fitted to the model; one layer of other numbers of heads stands for all heads, in proportion.
        size: of the model.
        store: name of the store.
        streams: timelines in memory: videos of a batch times branches of guidance.

    Raises:
        OptionError: there is no such store, or a role cannot compress frames of this grid.
    """
    stored, kept = stored_bytes(size, store, roles), kept_bytes(size, roles)
    if stored is None or kept is None:
        return MemoryEstimate(name, None, None, None)
    counts, attended = roles.counts(), Fraction()
    for role, count in counts.items():
        found = steady(role, size.window, size.chunk, size.grid)
        attended += count * found.attended if found else 0
    heads = sum(counts.values())
    share = Fraction(size.count, heads) * streams
    return MemoryEstimate(name, math.ceil(stored * share), math.ceil(kept * share), attended / heads)


def dense(size: ModelSize, streams: int = 1) -> MemoryEstimate:
    """What the base model's own rolling KV cache takes, a window long."""
    held = size.window_bytes * streams
    return MemoryEstimate(f"dense, {size.window} frames", held, held, Fraction(size.window))
