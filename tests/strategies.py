"""Hypothesis strategies for roles, and tensors that say which frame they are of."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from headforcing.errors import WindowError
from headforcing.roles import Anchor, Dilated, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.episodic import EpisodicUpdate, MaxMin, ThresholdFifo, Uniform
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import AVERAGES, Averaging
from headforcing.roles.positions import SCHEMES
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from headforcing.roles.reward_forcing import EmaSink
from headforcing.roles.rolling_forcing import Rolling
from headforcing.testing.backends import Arrangement, Group
from headforcing.types import Grid

UPDATES: tuple[EpisodicUpdate, ...] = (MaxMin(), ThresholdFifo(), ThresholdFifo(novelty=1.0), Uniform())
GRID: Grid = (2, 6)
"""A frame size that every role drawn here can merge and cut."""


def roles(window: int, chunk: int) -> st.SearchStrategy[HeadRole]:
    """Any built-in role that fits a model with this window and chunks of up to `chunk` frames."""
    return st.one_of(*kinds(window, chunk).values())


def kinds(window: int, chunk: int) -> dict[type[HeadRole], st.SearchStrategy[HeadRole]]:
    """A strategy for every class of built-in roles, with and without a clean window."""
    room = st.integers(0, window - chunk)
    pair = room.flatmap(lambda total: st.integers(0, total).map(lambda first: (first, total - first)))
    ends = st.sampled_from(SCHEMES)
    two = st.sampled_from(["compact", "absolute"])
    sliding = st.builds(
        lambda size, sink, positions: SlidingWindow(size, min(sink, size - chunk), positions=positions),
        st.integers(max(chunk, 1), window),
        st.integers(0, 3),
        two,
    )
    plain: dict[type[HeadRole], st.SearchStrategy[HeadRole]] = {
        Full: st.just(Full()),
        SlidingWindow: sliding,
        Dilated: st.builds(
            lambda size, dilation, positions: Dilated(size, dilation, positions=positions),
            *(st.integers(max(chunk, 1), window), st.integers(1, 4), two),
        ),
        Local: st.builds(lambda p, s: Local(recent=p[0], sink=p[1], positions=s), pair, ends),
        Anchor: st.builds(lambda p, s: Anchor(sink=p[0], recent=p[1], positions=s), pair, ends),
        Memory: memories(window, chunk),
        Wave: _cycles(Wave, window),
        Strided: _cycles(Strided, window),
        Veil: _veils(window),
        Dynamic: st.builds(
            lambda sink, pieces, skip, positions: Dynamic(sink, pieces, skip, positions=positions),
            *(st.integers(0, 4), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 3), two),
        ),
        Averaging: _averagings(window, chunk),
        Participating: _participating(window, chunk),
        EmaSink: _ema_sinks(window, chunk),
        Rolling: st.builds(
            lambda size, sink: Rolling(size, min(sink, size - 1)), st.integers(1, window), st.integers(0, 4)
        ),
    }
    newest = st.none() | st.integers(max(chunk, 1), window)
    return {
        kind: st.builds(_with_clean_window, strategy.filter(lambda role: _fits(role, window, chunk)), newest)
        for kind, strategy in plain.items()
    }


def _with_clean_window(role: HeadRole, newest: int | None) -> HeadRole:
    return dataclasses.replace(role, clean_window=newest)


def _fits(role: HeadRole, window: int, chunk: int) -> bool:
    try:
        role.fit(window, chunk)
    except WindowError:
        return False
    return True


def _cycles(kind: type[Wave] | type[Strided], window: int) -> st.SearchStrategy[HeadRole]:
    """Heads of Pyramid Forcing that select frames by cycles, differently per query frame."""
    few = st.integers(0, 4)
    return st.builds(
        lambda sink, period, cap, recent: kind(sink, recent, 0, window, period=period, cap=cap),
        *(few, st.integers(1, 7), few, few),
    )


def _veils(window: int) -> st.SearchStrategy[HeadRole]:
    few = st.integers(0, 4)
    return st.builds(
        lambda sink, recent, blocks, block, patch: Veil(
            sink, recent, 0, window, blocks=blocks, block=block, patch=patch
        ),
        *(few, few, few, st.integers(1, 5), st.integers(1, 2)),
    )


def _averagings(window: int, chunk: int) -> st.SearchStrategy[HeadRole]:
    weight = st.floats(0.001, 1.0)

    def build(size: int, sink: int, slow: float, fast: float) -> Averaging:
        return Averaging(size, max(0, min(sink, size - AVERAGES - chunk)), slow, fast)

    return st.builds(
        build, st.integers(min(AVERAGES + chunk, window), window), st.integers(0, 4), weight, weight
    )


def _ema_sinks(window: int, chunk: int) -> st.SearchStrategy[HeadRole]:
    def build(size: int, sink: int, alpha: float) -> EmaSink:
        return EmaSink(size, max(1, min(sink, size - chunk)), alpha)

    return st.builds(
        build, st.integers(min(1 + chunk, window), window), st.integers(1, 4), st.floats(0.0, 1.0)
    )


def _participating(window: int, chunk: int) -> st.SearchStrategy[HeadRole]:
    def build(size: int, sink: int, recent: int, chosen: int) -> Participating:
        recent = min(recent, size - 1)
        chosen = max(1, min(chosen, size - max(recent, chunk)))
        return Participating(size, max(0, min(sink, size - chosen - max(recent, chunk))), recent, chosen)

    sizes = st.integers(min(chunk + 1, window), window)
    return st.builds(build, sizes, st.integers(0, 4), st.integers(1, 5), st.integers(1, 3))


def queries(role: HeadRole, chunk: range) -> list[int | None]:
    """The query frames of a chunk that attend separately; `None` stands for all together."""
    return list(chunk) if "query" in role.depends_on else [None]


def memories(window: int, chunk: int) -> st.SearchStrategy[Memory]:
    """Memory roles with every split of the window and every update rule."""

    def build(sink: int, episodic: int, recent: int, update: EpisodicUpdate) -> Memory:
        room = window - chunk
        sink = min(sink, room)
        episodic = min(episodic, room - sink)
        return Memory(sink, episodic, min(recent, room - sink - episodic), update)

    size = st.one_of(st.integers(0, 3), st.integers(0, window))
    return st.builds(build, st.integers(0, 3), size, size, st.sampled_from(UPDATES))


def frame_tensor(frames: range, seed: int, batch: int, heads: int, tokens: int = 2, dim: int = 4) -> Tensor:
    """Random `[B, F, P, H, D]` whose content depends only on the frame number and the seed."""
    parts = []
    for frame in frames:
        generator = torch.Generator().manual_seed(1_000_003 * seed + frame)
        parts.append(torch.randn(batch, 1, tokens, heads, dim, generator=generator))
    return torch.cat(parts, dim=1)


def arrangements() -> st.SearchStrategy[Arrangement]:
    """Inputs of a backend: scattered heads with one to three key lengths, in one storage or in several."""
    few = st.integers(1, 3)
    length = st.one_of(st.integers(1, 12), st.integers(120, 140), st.integers(250, 260))
    facts = st.tuples(length, st.integers(0, 2), st.booleans())
    owners = st.lists(st.integers(0, 2), min_size=1, max_size=5)

    def build(
        owners: list[int], facts: list[tuple[int, int, bool]], sizes: tuple[int, int, int], shared: bool
    ) -> Arrangement:
        members = {group: tuple(h for h, owner in enumerate(owners) if owner == group) for group in owners}
        groups = tuple(Group(heads, *facts[group]) for group, heads in members.items())
        batch, frames, patches = sizes
        return Arrangement(groups, batch, frames, patches, shared=shared)

    sizes = st.tuples(st.integers(1, 2), few, few)
    return st.builds(build, owners, st.lists(facts, min_size=3, max_size=3), sizes, st.booleans())
