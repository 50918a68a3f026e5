"""Positions: in the pretrained range, in order, true while they fit."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headforcing.errors import RoleError, WindowError
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.base import bounded
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import Averaging
from headforcing.roles.positions import BOUNDED, SCHEMES, scheme_positions
from tests.strategies import kinds, roles

WINDOW = 21


@st.composite
def views(draw):
    """A history that fits the window, any distance in the past, and a current chunk."""
    chunk = draw(st.integers(1, 6))
    now = draw(st.integers(0, 10**6))
    held = draw(st.integers(0, min(WINDOW - chunk, now)))
    history = draw(st.sets(st.integers(0, max(now - 1, 0)), min_size=held, max_size=held)) if held else set()
    return (*sorted(history), *range(now, now + chunk)), chunk


@given(views(), st.sampled_from(["compact", "clamped"]))
def test_bounded_schemes_stay_in_the_window_in_order_with_the_own_chunk_together(view, scheme):
    frames, chunk = view
    placed = scheme_positions(scheme, frames, chunk, WINDOW)
    assert len(placed) == len(frames)
    assert list(placed) == sorted(set(placed))
    assert placed[0] >= 0
    assert placed[-1] < WINDOW
    assert list(placed[-chunk:]) == list(range(placed[-chunk], placed[-chunk] + chunk))


@given(views())
def test_clamped_keeps_true_distances_that_fit(view):
    frames, chunk = view
    placed = scheme_positions("clamped", frames, chunk, WINDOW)
    query, now = placed[-chunk], frames[-chunk]
    for rank, (frame, position) in enumerate(zip(frames[:-chunk], placed, strict=False)):
        distance = now - frame
        assert query - position == min(distance, query - rank)


@given(st.integers(1, WINDOW), st.integers(0, WINDOW))
def test_every_scheme_is_absolute_while_the_video_fits_the_window(chunk, history):
    frames = range(min(history, WINDOW - chunk) + chunk)
    for scheme in SCHEMES:
        assert scheme_positions(scheme, frames, chunk, WINDOW) == tuple(frames)


def test_what_counts_ranks_works_without_knowing_the_frames():
    assert scheme_positions("compact", (0, None, None, 7), 1, WINDOW) == (0, 1, 2, 3)
    assert scheme_positions("adjoining", (0, None, None, 7), 1, WINDOW) == (4, 5, 6, 7)
    with pytest.raises(RoleError, match="2 of 4 frames were chosen by content: use positions='compact'"):
        scheme_positions("clamped", (0, None, None, 7), 1, WINDOW)


def places_beside(role: HeadRole, now: int) -> list[int]:
    """Places that compressed tokens may take before a chunk that begins at `now`."""
    if isinstance(role, Dynamic):
        return [0, 3] if now >= 9 + role.sink else [0]
    if isinstance(role, Averaging):
        return [2] if now + 3 > role.window else [0]
    return [0]


def check_stays(role: HeadRole, index: int) -> None:
    """Positions of a chunk far into a video stay in the window, or are true; those of a digest stay free."""
    role = role.fit(WINDOW, 3)
    capacity, now = role.capacity(3), 3 * index
    for beside in places_beside(role, now):
        taken = beside if isinstance(role, Averaging) else 0
        held = min(now, 30 if capacity is None else capacity - taken)
        sink = min(getattr(role, "sink", 0), held)
        frames = (*range(sink), *range(now - held + sink, now), *range(now, now + 3))
        placed = role.positions_of(frames, 3, WINDOW, gap=beside)
        if role.positions == "adjoining":
            assert placed == tuple(range(now + 3 - len(frames), now + 3))
            continue
        if role.positions not in BOUNDED:
            assert placed == frames
            continue
        assert list(placed) == sorted(set(placed))
        assert 0 <= placed[0] <= placed[-1] < WINDOW
        assert list(placed[-3:]) == list(range(placed[-3], placed[-3] + 3))
        if beside:
            assert placed == (*range(sink), *range(sink + beside, len(frames) + beside))


@given(roles(WINDOW, 3), st.integers(0, 10**6))
def test_a_fitted_role_stays_in_the_window_at_any_chunk_number(role, index):
    assume("query" not in role.depends_on)  # those are tested on their own
    check_stays(role, index)


@pytest.mark.parametrize("kind", [Dynamic, Averaging], ids=lambda kind: kind.__name__)
def test_so_does_a_role_that_leaves_room_for_what_it_keeps_beside_frames(kind):
    @given(kinds(WINDOW, 3)[kind], st.integers(0, 30))
    def check(role, index):
        check_stays(role, index)

    check()


class NoRoom(Averaging):
    """With a bug: averages sit where frames sit."""

    def positions_of(self, frames, chunk, window, query=None, gap=0):
        return super().positions_of(frames, chunk, window, query)


class Behind(Averaging):
    """With a bug: room is left behind the last frames."""

    def positions_of(self, frames, chunk, window, query=None, gap=0):
        placed = super().positions_of(frames, chunk, window, query)
        return (*placed[:-chunk], *(place + gap for place in placed[-chunk:]))


class Absent(SlidingWindow):
    """With a bug: says that its positions are compact, and they are not."""

    def positions_of(self, frames, chunk, window, query=None, gap=0):
        return tuple(frames)


@pytest.mark.parametrize("broken", [NoRoom(), Behind(), Absent(9)], ids=lambda role: type(role).__name__)
def test_planted_bugs_in_positions_are_found(broken):
    with pytest.raises((AssertionError, WindowError)):
        check_stays(broken, 20)


@pytest.mark.parametrize(
    ("role", "fitted"),
    [
        (Memory(), Memory(1, 8, 9)),
        (Memory(episodic=4), Memory(1, 4, 13)),
        (Memory(recent=4), Memory(1, 13, 4)),
        (Memory(sink=3), Memory(3, 6, 9)),
        (Memory(1, 0, 3), Memory(1, 0, 3)),
        (Local(), Local(1)),
        (Anchor(), Anchor(1)),
        (SlidingWindow(21), SlidingWindow(21)),
        (Full(), Full()),
    ],
)
def test_open_numbers_are_filled_from_the_window(role, fitted):
    assert role.fit(21, 3) == fitted
    assert fitted.fit(21, 3) == fitted


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 3))
def test_a_default_memory_fills_the_window_exactly_or_says_that_it_cannot(window, chunk, sink):
    if window < chunk + sink:
        with pytest.raises(WindowError):
            Memory(sink).fit(window, chunk)
    else:
        assert Memory(sink).fit(window, chunk).capacity(chunk) == window - chunk


@pytest.mark.parametrize(
    "role", [Local(19), Anchor(10, 9), Memory(1, 9, 9), SlidingWindow(22), Memory(19), SlidingWindow(3, 2)]
)
def test_a_role_that_asks_for_more_than_the_window_is_refused(role):
    with pytest.raises(WindowError):
        role.fit(21, 3)


def test_absolute_positions_may_leave_the_window():
    assert not bounded(SlidingWindow(40, positions="absolute").fit(21, 3))
    assert not bounded(Absent(9)), "positions of its own"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Local(-1),
        lambda: Local(True),
        lambda: Local(1.0),
        lambda: Local(None),
        lambda: Local(positions="relative"),
        lambda: Memory(update="max_min"),
        lambda: Memory(positions="clamped"),
        lambda: SlidingWindow(3, 3),
    ],
)
def test_impossible_numbers_are_refused(make):
    with pytest.raises(RoleError):
        make()
