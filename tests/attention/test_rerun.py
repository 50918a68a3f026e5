"""Frames that a host runs again in one call: what is remembered of them, and where their queries sit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import headforcing as hf
from headforcing.attention.backends.sdpa import attend
from headforcing.attention.layer_state import Options
from headforcing.attention.rerun import query_positions, rerun
from headforcing.attention.stream import Stream
from headforcing.errors import ChunkOrderError, StreamError, WindowError
from headforcing.roles import Full, HeadRole, SlidingWindow
from headforcing.roles.maps.role_map import RoleMap
from headforcing.stores import STORES, store_class
from headforcing.stores.scenes import _rows_before
from headforcing.stores.switch import Switch
from headforcing.types import Chunk, Heads, Pin, Truncation
from tests.hosts import find_host

STORES = sorted(STORES)
WINDOW = 12
ROLLED = SlidingWindow(9, sink=3, positions="absolute")


def chunk_of(start: int, frames: int, value: float = 0.0) -> Chunk:
    k = torch.arange(start, start + frames, dtype=torch.float32).view(1, frames, 1, 1, 1) + value
    return Chunk(start, k.expand(1, frames, 2, 1, 4).clone(), k.expand(1, frames, 2, 1, 4).clone())


def stream_of(store: str, role: HeadRole) -> tuple[Stream, Options]:
    kind = store_class(store)
    heads = {role: Heads((0,), 1)}
    options = Options(RoleMap(((role,),)), WINDOW, None, kind, attend)  # type: ignore[arg-type]
    return Stream(kind(heads, window=WINDOW, layer=0)), options


def seen(stream: Stream, role: HeadRole) -> tuple[tuple[int | None, ...], tuple[int, ...], Tensor]:
    def encode(x: Tensor, positions: Sequence[int]) -> Tensor:
        return x

    view = stream.store.view(role, "clean", encode)
    return view.frames, view.positions, view.v[0, :, 0, 0, 0]


@pytest.fixture(params=STORES)
def rolled(request: pytest.FixtureRequest) -> tuple[Stream, Options]:
    stream, options = stream_of(request.param, ROLLED)
    for start in range(0, 18, 3):
        stream.store.write(rerun(chunk_of(start, 3), stream, options))
    return stream, options


def test_the_last_frames_with_room_replace_what_the_video_ends_with(rolled: tuple[Stream, Options]) -> None:
    stream, options = rolled
    stream.store.write(rerun(chunk_of(9, 9, 0.5), stream, options))
    frames, positions, values = seen(stream, ROLLED)
    assert frames == positions == (0, 1, 2, 12, 13, 14, 15, 16, 17)
    assert values.tolist() == [0, 1, 2, 12.5, 13.5, 14.5, 15.5, 16.5, 17.5]
    assert query_positions(positions, 9, 6) == tuple(range(9, 18))
    stream.store.write(rerun(chunk_of(18, 3), stream, options))
    assert seen(stream, ROLLED)[2].tolist() == [0, 1, 2, 15.5, 16.5, 17.5, 18, 19, 20]


def test_a_call_that_runs_again_twice_leaves_what_it_leaves_once(rolled: tuple[Stream, Options]) -> None:
    stream, options = rolled
    for value in (0.25, 0.5):
        stream.store.write(rerun(chunk_of(9, 9, value), stream, options))
    assert seen(stream, ROLLED)[2].tolist() == [0, 1, 2, 12.5, 13.5, 14.5, 15.5, 16.5, 17.5]


def test_the_pending_chunk_and_the_next_one_are_left_alone(rolled: tuple[Stream, Options]) -> None:
    stream, options = rolled
    for start in (15, 16, 18):
        chunk = chunk_of(start, 3)
        assert rerun(chunk, stream, options) is chunk


def test_frames_that_end_before_the_video_does_are_out_of_order(rolled: tuple[Stream, Options]) -> None:
    stream, options = rolled
    with pytest.raises(ChunkOrderError, match="chunks come in order"):
        stream.store.write(rerun(chunk_of(9, 6), stream, options))


@pytest.mark.parametrize("store", STORES)
def test_everything_runs_again_where_everything_is_kept(store: str) -> None:
    stream, options = stream_of(store, Full())
    for start in range(0, 9, 3):
        stream.store.write(rerun(chunk_of(start, 3), stream, options))
    stream.store.write(rerun(chunk_of(0, 9, 0.5), stream, options))
    assert seen(stream, Full())[2].tolist() == [frame + 0.5 for frame in range(9)]


@pytest.mark.parametrize("store", STORES)
def test_everything_runs_again_after_a_commit_by_hand(store: str) -> None:
    stream, _ = stream_of(store, Full())
    for start in range(0, 9, 3):
        stream.store.write(chunk_of(start, 3))
    stream.store.commit()
    stream.store.scenes.ask(Switch("recache", frames=9))
    stream.store.write(chunk_of(0, 9, 0.5))
    assert seen(stream, Full())[2].tolist() == [frame + 0.5 for frame in range(9)]


def test_frames_before_a_cut_cannot_run_again(rolled: tuple[Stream, Options]) -> None:
    stream, options = rolled
    stream.store.scenes.ask(Switch("cut"))
    stream.store.write(rerun(chunk_of(18, 3), stream, options))
    before = seen(stream, ROLLED)[0]
    with pytest.raises(StreamError, match="time restarted at frame 18"):
        rerun(chunk_of(12, 9), stream, options)
    assert seen(stream, ROLLED)[0] == before


@pytest.mark.parametrize(
    ("positions", "frames", "chunk", "expected"),
    [
        ((0, 1, 2, 3, 4, 5), 3, 3, (3, 4, 5)),
        ((0, 1, 2, 3, 4, 5), 6, 3, (0, 1, 2, 3, 4, 5)),
        ((0, 1, 2), 5, 2, (0, 0, 0, 1, 2)),
    ],
)
def test_queries_that_are_not_seen_sit_before_those_that_are(
    positions: tuple[int, ...], frames: int, chunk: int, expected: tuple[int, ...]
) -> None:
    assert query_positions(positions, frames, chunk) == expected


def test_frames_that_run_again_behind_an_emptied_cache_are_all_remembered(
    rolled: tuple[Stream, Options],
) -> None:
    """As LongLive does where its first frames run again: the first of them are the sink from then on."""
    stream, options = rolled
    stream.store.edit(Truncation(), 9)
    stream.store.edit(Pin(9, 3), 9)
    stream.store.write(rerun(chunk_of(9, 9, 0.5), stream, options, emptied=True))
    again = [9.5, 10.5, 11.5, 12.5, 13.5, 14.5, 15.5, 16.5, 17.5]
    assert seen(stream, ROLLED)[2].tolist() == again
    stream.store.write(rerun(chunk_of(18, 3), stream, options))
    assert seen(stream, ROLLED)[2].tolist() == [*again[:3], *again[6:], 18, 19, 20]


def test_a_whole_window_runs_again_behind_an_emptied_cache(rolled: tuple[Stream, Options]) -> None:
    stream, options = rolled
    stream.store.edit(Truncation(), 6)
    stream.store.write(rerun(chunk_of(6, WINDOW, 0.5), stream, options, emptied=True))
    assert seen(stream, ROLLED)[2].tolist() == [frame + 0.5 for frame in range(6, 18)]


@pytest.mark.parametrize("store", STORES)
def test_one_frame_runs_again_where_there_is_room_for_one(store: str) -> None:
    stream, options = stream_of(store, SlidingWindow(4, sink=3))
    for start in range(6):
        stream.store.write(rerun(chunk_of(start, 1), stream, options))
    again = rerun(chunk_of(3, 3, 0.5), stream, options)
    assert again.frames == range(5, 6)


def test_frames_in_the_middle_run_again_where_everything_is_kept() -> None:
    stream, options = stream_of("ring", Full())
    for start in range(0, 9, 3):
        stream.store.write(rerun(chunk_of(start, 3), stream, options))
    again = rerun(chunk_of(3, 6, 0.5), stream, options)
    assert again.frames == range(3, 9)
    stream.store.write(again)
    assert seen(stream, Full())[2].tolist() == [0, 1, 2, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5]


def test_only_a_call_of_a_base_model_that_recomputes_frames_is_taken_for_that() -> None:
    """LongLive's is; any other model's is out of order."""
    for name in ("longlive", "self_forcing"):
        host = find_host(name)
        model = host.model()
        handle, caches = hf.apply_head_forcing(model, SlidingWindow(9, sink=3)), host.caches(model)
        with torch.no_grad():
            for start in range(0, 12, 3):
                host.call(model, caches, start, 3, 0)
            if name == "longlive":
                host.call(model, caches, 6, 6, 10)
                host.call(model, caches, 12, 3, 10)
                assert handle.frames(0, 0) == [[[0, 1, 2, 9, 10, 11]]]
                continue
            with pytest.raises(ChunkOrderError, match="chunks come in order"):
                host.call(model, caches, 6, 6, 10)


@pytest.mark.parametrize(
    ("first", "kept"), [(4, [0]), (5, [0, 1, 2]), (6, [0, 1, 2, 3]), (7, [0, 1, 2, 3, 4]), (0, [])]
)
def test_frames_chosen_by_content_stay_where_a_known_one_shows_that_they_are_old(
    first: int, kept: list[int]
) -> None:
    """Frame numbers ascend, so what lies before a known frame is older than it."""
    assert _rows_before((0, None, None, 5, 6), first) == kept


def test_more_frames_than_the_window_do_not_run_again_alone(rolled: tuple[Stream, Options]) -> None:
    stream, _ = rolled
    stream.store.edit(Truncation(), 0)
    with pytest.raises(WindowError, match="a chunk of 15 frames"):
        stream.store.write(chunk_again(stream, 3, 15))


def chunk_again(stream: Stream, start: int, frames: int) -> Chunk:
    stream.store.scenes.ask(Switch("recache", frames=frames))
    return chunk_of(start, frames)
