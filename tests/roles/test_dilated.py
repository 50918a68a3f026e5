"""`Dilated` keeps what a ring keeps that only multiples of the dilation are written to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from headforcing.errors import RoleError, WindowError
from headforcing.roles import Dilated, SlidingWindow
from headforcing.types import FrameTable

COUNT = st.integers(1, 6)


def no_keys(rows: Sequence[int]) -> Tensor:
    raise AssertionError("the role looked at keys")


def past(role: Dilated | SlidingWindow, frames: int, chunk: int) -> list[tuple[int | None, ...]]:
    """What a role keeps of the past when each chunk begins."""
    kept: tuple[int | None, ...] = ()
    found = []
    for start in range(0, frames, chunk):
        new = range(max(start - chunk, 0), start)
        table = FrameTable((*kept, *new), len(new), chunk, no_keys, start)
        kept = tuple(table.frames[row] for row in role.retain(table))
        found.append(kept)
    return found


def ring(slots: int, dilation: int, frames: int) -> list[tuple[int, ...]]:
    """What is attended to of a ring of slots; the slot that a frame is about to take is not."""
    held: dict[int, int] = {}
    found = []
    for frame in range(frames):
        slot = -(-frame // dilation) % slots
        writes = frame % dilation == 0
        found.append(tuple(sorted(old for at, old in held.items() if not (writes and at == slot))))
        if writes:
            held[slot] = frame
    return found


@given(COUNT, COUNT)
@example(16, 8)
def test_it_is_the_ring(slots: int, dilation: int) -> None:
    role, frames = Dilated(slots * dilation, dilation), 3 * slots * dilation + 2
    assert past(role, frames, 1) == ring(slots, dilation, frames)


@given(COUNT, COUNT, st.integers(1, 4))
def test_capacity_is_the_most_it_keeps(window: int, dilation: int, chunk: int) -> None:
    role = Dilated(window + chunk, dilation)
    most = max(map(len, past(role, chunk * (window + dilation + 4), chunk)))
    assert most <= (role.capacity(chunk) or 0) <= most + 1


@given(COUNT, st.integers(1, 4))
def test_without_dilation_it_is_a_window(window: int, chunk: int) -> None:
    size, frames = window + chunk, 6 * (window + chunk)
    assert past(Dilated(size, 1), frames, chunk) == past(SlidingWindow(size), frames, chunk)


def test_refused() -> None:
    with pytest.raises(RoleError, match="window and dilation of at least 1"):
        Dilated(8, 0)
    with pytest.raises(WindowError, match="no room for a chunk of 3 frames"):
        Dilated(2, 2).fit(9, 3)
    with pytest.raises(WindowError, match="trained on 4"):
        Dilated(8, 2).fit(4, 1)
