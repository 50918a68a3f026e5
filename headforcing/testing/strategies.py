"""Hypothesis strategies for roles and tensors, for our tests and for those of new roles and stores."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from headforcing.episodic import EpisodicUpdate, MaxMin, ThresholdFifo, Uniform
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.pyramid_forcing import Strided, Wave

UPDATES: tuple[EpisodicUpdate, ...] = (MaxMin(), ThresholdFifo(), ThresholdFifo(novelty=1.0), Uniform())


def roles(window: int, chunk: int) -> st.SearchStrategy[HeadRole]:
    """Any built-in role that fits a model with this window and chunks of up to `chunk` frames."""
    room = st.integers(0, window - chunk)
    pair = room.flatmap(lambda total: st.integers(0, total).map(lambda first: (first, total - first)))
    ends = st.sampled_from(["compact", "clamped", "absolute"])
    sliding = st.builds(
        lambda size, sink, positions: SlidingWindow(size, min(sink, size - chunk), positions=positions),
        st.integers(max(chunk, 1), window),
        st.integers(0, 3),
        st.sampled_from(["compact", "absolute"]),
    )
    return st.one_of(
        st.just(Full()),
        sliding,
        st.builds(lambda p, s: Local(recent=p[0], sink=p[1], positions=s), pair, ends),
        st.builds(lambda p, s: Anchor(sink=p[0], recent=p[1], positions=s), pair, ends),
        memories(window, chunk),
        waves(),
    )


def waves() -> st.SearchStrategy[HeadRole]:
    """The roles of Pyramid Forcing, which see something else for every query frame."""
    few = st.integers(0, 4)
    return st.builds(
        lambda kind, sink, period, cap, recent: kind(sink, recent, period=period, cap=cap),
        st.sampled_from([Wave, Strided]),
        *(few, st.integers(1, 7), few, few),
    )


def queries(role: HeadRole, chunk: range) -> list[int | None]:
    """The frames of a chunk that look on their own; `None` stands for all together."""
    return list(chunk) if role.reads_per_query else [None]


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
    """Random `[B, F, P, H, D]` whose content is a function of the frame number and the seed alone."""
    parts = []
    for frame in frames:
        generator = torch.Generator().manual_seed(1_000_003 * seed + frame)
        parts.append(torch.randn(batch, 1, tokens, heads, dim, generator=generator))
    return torch.cat(parts, dim=1)
