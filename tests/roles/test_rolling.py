"""Hosts that denoise several chunks at once: what is remembered of a call, and when."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import headforcing as hf
from headforcing.errors import ChunkOrderError, StreamError, StreamShapeError, WindowError
from headforcing.integrations.rolling_forcing import RollingForcing
from headforcing.roles import Anchor, HeadRole, Local, Memory, Rolling, SlidingWindow
from headforcing.stores import STORES, KVStore, store_class
from headforcing.types import Chunk, Heads
from tests.hosts.rolling_forcing import RollingForcingHost
from tests.hosts.standin import TOKENS, StandInModel

AT_ONCE, FRAMES, BLOCK, WINDOW = 3, 30, 3, 21
HOST = RollingForcingHost()


def model_of() -> StandInModel:
    model = HOST.model()
    for block in model.blocks:
        block.self_attn.max_attention_size = WINDOW * TOKENS
    return model


def applied(model: StandInModel, role: HeadRole) -> hf.HeadForcing:
    return hf.apply_head_forcing(model, role, adapter=RollingForcing(AT_ONCE))


def caches_of(batch: int = 1) -> dict[str, list[object]]:
    host = RollingForcingHost()
    host.slots = WINDOW + BLOCK
    caches: dict[str, list[object]] = host.caches(model_of(), batch)
    return caches


def run(model: StandInModel, caches: object, start: int, frames: int, draw: int) -> Tensor:
    with torch.no_grad():
        return HOST.call(model, caches, start, frames, draw)


def windows(frames: int) -> list[tuple[int, int]]:
    """First frame and number of frames of every call with noise: grown, rolled, and run out."""
    chunks = frames // BLOCK
    found = []
    for last in range(chunks + AT_ONCE - 1):
        first, stop = max(0, last - AT_ONCE + 1), min(chunks, last + 1)
        found.append((first * BLOCK, (stop - first) * BLOCK))
    return found


def video(model: StandInModel, caches: object, frames: int = FRAMES, draw: int = 0) -> list[Tensor]:
    """Every window, and its first chunk again, clean."""
    outs = []
    for start, length in windows(frames):
        outs.append(run(model, caches, start, length, draw + 1))
        outs.append(run(model, caches, start, BLOCK, draw))
    return outs


def test_the_windows_are_those_of_a_rolling_host() -> None:
    assert windows(15) == [(0, 3), (0, 6), (0, 9), (3, 9), (6, 9), (9, 6), (12, 3)]


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_hosts_own_memory_changes_nothing(batch: int) -> None:
    model = model_of()
    applied(model, Rolling(WINDOW))
    for draw in (0, 20):
        expected = video(model_of(), caches_of(batch), draw=draw)
        found = video(model, caches_of(batch), draw=draw)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_host_counts_on_after_every_call() -> None:
    plain, model, theirs, mine = model_of(), model_of(), caches_of(), caches_of()
    applied(model, Local())
    for start, length in windows(FRAMES):
        for frames, draw in ((length, 1), (BLOCK, 0)):
            run(plain, theirs, start, frames, draw)
            run(model, mine, start, frames, draw)
            for name in ("global_end_index", "local_end_index"):
                assert [int(c[name]) for c in mine["kv"]] == [int(c[name]) for c in theirs["kv"]]


@pytest.mark.parametrize("name", sorted(STORES))
def test_a_longer_window_on_the_same_frames_makes_room(name: str) -> None:
    role = SlidingWindow(9)
    store = store_class(name)({role: Heads((0,), 1)}, window=9, layer=0)
    for start, length in ((0, 3), (3, 3), (6, 3), (9, 3), (9, 6), (9, 3), (12, 3)):
        k = torch.full((1, length, 2, 1, 4), float(start))
        store.write(Chunk(start, k, k, rolling=True))
        if start == 9:
            kept = store.frames(role)[0]
            assert len(kept) + length <= 9
    assert store.frames(role)[0] == list(range(6, 12))


@pytest.mark.parametrize("role", [Rolling(WINDOW, 2), Rolling(WINDOW - 1), SlidingWindow(WINDOW, 3)], ids=str)
def test_another_memory_changes_the_video(role: HeadRole) -> None:
    expected = video(model_of(), caches_of())
    model = model_of()
    applied(model, role)
    found = video(model, caches_of())
    assert not torch.allclose(torch.cat(found, 1), torch.cat(expected, 1), atol=1e-3)


def store_of(model: StandInModel) -> KVStore:
    (stream,) = model.blocks[0].self_attn._headforcing.streams.values()
    found: KVStore = stream.store
    return found


def held(model: StandInModel) -> list[int]:
    store = store_of(model)
    return store.frames(next(iter(store.heads)))[0]


def test_only_the_first_chunk_of_a_window_is_remembered() -> None:
    model, caches = model_of(), caches_of()
    applied(model, Local(recent=12))
    for start, length in windows(FRAMES)[:6]:
        run(model, caches, start, length, 1)
        assert store_of(model).pending == range(start, start + length)
        run(model, caches, start, BLOCK, 0)
    assert held(model) == list(range(9))
    assert store_of(model).pending == range(9, 12)


def test_windows_leave_no_trace_but_their_clean_passes() -> None:
    cleans = []
    for noise in (1, 3):
        model, caches, outs = model_of(), caches_of(), []
        applied(model, Local(recent=12))
        for start, length in windows(FRAMES):
            noisy = run(model, caches, start, length, noise)
            outs.append(run(model, caches, start, BLOCK, 0))
        cleans.append((noisy, *outs))
    assert not torch.equal(cleans[0][0], cleans[1][0])
    assert all(torch.equal(a, b) for a, b in zip(cleans[0][1:], cleans[1][1:], strict=True))


def test_windows_without_a_clean_pass_are_followed_by_the_next_one() -> None:
    model = model_of()
    applied(model, Local(recent=6))
    caches = caches_of()
    for start, length in windows(15):
        out = run(model, caches, start, length, 1)
        assert out.isfinite().all()
    assert held(model) == list(range(6, 12))


def test_a_window_is_not_committed_with_its_noise() -> None:
    model, caches = model_of(), caches_of()
    handle = applied(model, Local(recent=12))
    for start, length in windows(15):
        run(model, caches, start, length, 1)
        before = held(model)
        with pytest.raises(
            StreamError, match=rf"frames {start}\.\.{start + length - 1} are denoised at once"
        ):
            handle.commit()
        assert held(model) == before
        run(model, caches, start, BLOCK, 0)
    handle.commit()
    assert held(model)[-BLOCK:] == list(range(15 - BLOCK, 15))
    handle.reset()
    handle.commit()


def test_a_clean_pass_that_was_committed_by_hand_is_what_the_next_window_would_have_committed() -> None:
    outs = []
    for by_hand in (False, True):
        model, caches, found = model_of(), caches_of(), []
        handle = applied(model, Local(recent=12))
        for start, length in windows(FRAMES):
            found.append(run(model, caches, start, length, 1))
            found.append(run(model, caches, start, BLOCK, 0))
            if by_hand:
                handle.commit()
        outs.append(torch.cat(found, 1))
    assert torch.equal(*outs)


@pytest.mark.parametrize("asked_behind", ["the window", "its clean pass"])
def test_a_cut_waits_for_the_next_chunk(asked_behind: str) -> None:
    """Asked between a window and its clean pass, it must not make the clean pass forget."""
    model = model_of()
    handle = applied(model, SlidingWindow(WINDOW, positions="absolute"))
    caches = caches_of()
    calls = windows(FRAMES)
    for start, length in calls[:6]:
        run(model, caches, start, length, 1)
        run(model, caches, start, BLOCK, 0)
    start, length = calls[6]
    run(model, caches, start, length, 1)
    if asked_behind == "the window":
        handle.switch_prompt("cut")
    clean = run(model, caches, start, BLOCK, 0)
    if asked_behind == "its clean pass":
        handle.switch_prompt("cut")
    assert held(model), "the clean pass still sees the past"
    start, length = calls[7]
    run(model, caches, start, length, 1)
    assert held(model) == []
    assert clean.isfinite().all()


def test_presets_count_in_chunks_that_are_remembered() -> None:
    handle = hf.apply_head_forcing(model_of(), "streaming_llm", adapter=RollingForcing(AT_ONCE))
    assert set(handle.roles.counts()) == {SlidingWindow(WINDOW, sink=BLOCK)}


def test_roles_are_fitted_to_all_that_is_denoised_at_once() -> None:
    handle = hf.apply_head_forcing(model_of(), Memory(), adapter=RollingForcing(AT_ONCE))
    (role,) = handle.roles.counts()
    assert role.capacity(9) == WINDOW - 9
    with pytest.raises(WindowError, match="chunk of 9"):
        hf.apply_head_forcing(model_of(), Anchor(sink=13), adapter=RollingForcing(AT_ONCE))


def test_a_window_longer_than_roles_have_room_for_is_refused() -> None:
    model = model_of()
    hf.apply_head_forcing(model, SlidingWindow(6), adapter=RollingForcing(1))
    caches = caches_of()
    run(model, caches, 0, 3, 1)
    with pytest.raises(WindowError, match="chunk of 9"):
        run(model, caches, 0, 9, 1)


def test_a_host_that_does_not_roll_keeps_its_chunks() -> None:
    """The same calls, where the adapter does not say that the host rolls."""

    class Stiff(RollingForcing):
        def read(self, module, args, kwargs):  # type: ignore[no-untyped-def]
            call = super().read(module, args, kwargs)
            return None if call is None else dataclasses.replace(call, rolling=False)

    model = model_of()
    hf.apply_head_forcing(model, Local(), adapter=Stiff(AT_ONCE))
    caches = caches_of()
    for start, length in windows(FRAMES)[:4]:
        run(model, caches, start, length, 1)
    with pytest.raises(ChunkOrderError, match="a chunk keeps its length"):
        run(model, caches, 3, BLOCK, 0)


def test_another_resolution_in_a_window_is_refused() -> None:
    for name in sorted(STORES):
        store = store_class(name)({Local(): Heads((0,), 1)}, window=9, layer=0)
        k = torch.zeros(1, 6, 2, 1, 4)
        store.write(Chunk(0, k, k, rolling=True))
        other = torch.zeros(1, 3, 4, 1, 4)
        with pytest.raises(StreamShapeError, match="start a new video"):
            store.write(Chunk(0, other, other, rolling=True))
