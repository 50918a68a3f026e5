"""Buffers: keys of all roles of a layer are one piece of memory, and so are their values, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from headforcing.roles import Full, HeadRole, Local, Memory
from headforcing.roles.pyramid_forcing import Wave
from headforcing.stores import KVStore
from headforcing.stores.buffers import Size, cut, front, gathered, joined
from headforcing.stores.lean import LeanStore
from headforcing.stores.ring import RingStore
from headforcing.stores.rotated import RotatedBank
from headforcing.types import Chunk, Heads
from tests.strategies import GRID, frame_tensor, queries, roles

WINDOW, CHUNK, PATCHES, DIM = 12, 4, GRID[0] * GRID[1], 4
sizes = st.lists(
    st.builds(Size, st.integers(1, 5), st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=4
)
frame_sizes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))


def segments(x: Tensor) -> list[tuple[int, int]]:
    """First number and numbers of the slots of every head of every sample, in its storage."""
    found = []
    for sample in x.unbind(0):
        for head in sample.unbind(2):  # [slots, P, D]
            assert head.is_contiguous()
            found.append((head.storage_offset(), head.numel()))
    return found


def with_front(buffer: Tensor, place: int) -> Tensor:
    """A buffer as one slot per token, those in front of its frames included."""
    return joined(front(buffer, place), buffer.flatten(1, 2)).unsqueeze(2)


def check_buffers(buffers: Sequence[Tensor]) -> None:
    """Head by head, side by side, the longest first, in one storage with nothing else."""
    assert len({buffer.untyped_storage() for buffer in buffers}) == 1
    starts = [(buffer.storage_offset(), -buffer.shape[1]) for buffer in buffers if buffer.numel()]
    assert sorted(starts) == sorted(starts, key=lambda start: start[::-1])
    at = 0
    for first, count in sorted(part for buffer in buffers for part in segments(buffer) if part[1]):
        assert first == at
        at += count
    assert at * buffers[0].element_size() == buffers[0].untyped_storage().nbytes()


@given(sizes, frame_sizes, st.sampled_from([torch.float32, torch.bfloat16]))
def test_buffers_are_cut_side_by_side(sizes: Any, frame: Any, dtype: torch.dtype) -> None:
    batch, tokens, dim = frame
    buffers = cut(sizes, frame, torch.empty(0, dtype=dtype))
    assert [tuple(buffer.shape) for buffer in buffers] == [(batch, s, tokens, h, dim) for s, h, _ in sizes]
    assert {buffer.dtype for buffer in buffers} == {dtype}
    check_buffers([with_front(buffer, size.front) for buffer, size in zip(buffers, sizes, strict=True)])


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 3), frame_sizes, st.integers(1, 3), st.booleans())
def test_tokens_in_front_of_a_buffer_are_read_with_it(
    slots: int, place: int, spare: int, frame: Any, heads: int, elsewhere: bool
) -> None:
    (buffer,) = cut([Size(slots, heads, place + spare)], frame, torch.empty(0))
    buffer.copy_(torch.randn(buffer.shape))
    before, frames = front(buffer, place).copy_(torch.randn(())), buffer.flatten(1, 2)
    if elsewhere:
        before = before.clone()
    both = joined(before, frames)
    assert torch.equal(both, torch.cat([before, frames], 1))
    in_place = both.untyped_storage() == buffer.untyped_storage()
    assert in_place == (not elsewhere)


def test_tokens_that_do_not_adjoin_are_copied() -> None:
    x = torch.arange(24.0).view(1, 12, 1, 2)
    for first, rest in ((x[:, :3], x[:, 4:]), (x[:, 4:6], x[:, :4]), (x[:, :4:2], x[:, 4:8]), (x, x.clone())):
        both = joined(first, rest)
        assert torch.equal(both, torch.cat([first, rest], 1))
        assert both.untyped_storage() != x.untyped_storage()
    assert joined(x[:, :3], x[:, 3:]).data_ptr() == x.data_ptr()


@given(st.lists(st.integers(0, 8), unique=True).map(sorted), frame_sizes, st.integers(1, 3))
def test_slots_are_gathered_head_by_head(slots: list[int], frame: Any, heads: int) -> None:
    (buffer,) = cut([Size(9, heads)], frame, torch.empty(0))
    buffer.copy_(torch.randn(buffer.shape))
    copy = gathered(buffer, slots)
    assert torch.equal(copy, buffer[:, slots])
    check_buffers([copy])


def store_of(row: Sequence[HeadRole], kind: type[KVStore] = RingStore) -> Any:
    heads: dict[HeadRole, list[int]] = {}
    for head, role in enumerate(row):
        heads.setdefault(role, []).append(head)
    return kind({r: Heads(i, len(row)) for r, i in heads.items()}, window=WINDOW, layer=0)


def plain(x: Tensor, *_: object) -> Tensor:
    return x


def write(store: Any, frames: range, batch: int = 1, dtype: torch.dtype = torch.float32) -> list[Any]:
    """One pass over a chunk; what every role sees, by its turn."""
    count = sum(len(heads) for heads in store.heads.values())
    x = frame_tensor(frames, 0, batch, count, PATCHES).to(dtype)
    store.write(Chunk(frames.start, x, -x, GRID, x))
    return [
        store.view(role, "denoise", plain, query) for role in store.heads for query in queries(role, frames)
    ]


def buffers_of(store: Any) -> dict[str, list[Tensor]]:
    """Buffers by name, tokens in front of frames included."""
    found: dict[str, list[Tensor]] = {}
    for bank in store._banks.values():
        for name, buffer in bank.buffers.items():
            found.setdefault(name, []).append(with_front(buffer, bank.front(name, PATCHES)))
    return found


@given(
    row=st.lists(roles(WINDOW, CHUNK), min_size=1, max_size=5),
    lengths=st.lists(st.integers(1, CHUNK), min_size=1, max_size=6),
    batch=st.integers(1, 2),
)
def test_all_heads_of_a_layer_are_reached_in_one_piece_of_memory(row: Any, lengths: Any, batch: int) -> None:
    store, start = store_of(row), 0
    for length in lengths:
        views = write(store, range(start, start + length), batch)
        start += length
        buffers = buffers_of(store)
        for some in buffers.values():
            check_buffers(some)
        assert len(buffers["raw"]) == len(buffers["v"]) == len(store.heads)
        storages = {buffer.untyped_storage() for some in buffers.values() for buffer in some}
        assert len(storages) == len(buffers), "keys, rotated keys and values apart"
        for view in views:
            for x in (view.k, view.v):
                segments(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_view_is_a_slice_of_the_buffers(dtype: torch.dtype) -> None:
    store = store_of([Local(1), Memory(1, 2, 2), Local(1), Local(3)])
    for start in range(0, 12 * CHUNK, CHUNK):
        views = write(store, range(start, start + CHUNK), dtype=dtype)
        buffers = buffers_of(store)
        assert {view.k.untyped_storage() for view in views} == {buffers["rotated"][0].untyped_storage()}
        assert {view.v.untyped_storage() for view in views} == {buffers["v"][0].untyped_storage()}


def addresses(store: Any) -> list[int]:
    return [x.data_ptr() for bank in store._banks.values() for x in bank.tensors()]


def test_buffers_stay_over_chunks_videos_and_resets() -> None:
    store = store_of([Local(1), Memory(1, 2, 2), Wave(near=9, far=WINDOW, period=3, cap=2)])
    for start in range(0, 12 * CHUNK, CHUNK):
        write(store, range(start, start + CHUNK))
    before = addresses(store), store.nbytes()
    for start in (*range(12 * CHUNK, 24 * CHUNK, CHUNK), *range(0, 12 * CHUNK, CHUNK)):
        write(store, range(start, start + CHUNK))
        assert (addresses(store), store.nbytes()) == before
    store.reset()
    for start in range(0, 12 * CHUNK, 2):
        write(store, range(start, start + 2))
        assert (addresses(store), store.nbytes()) == before


def test_a_role_without_capacity_moves_all_buffers_and_the_history_with_them() -> None:
    row = [Local(2), Full(), Memory(1, 2, 2)]
    store, moves, last = store_of(row), 0, None
    for start in range(0, 64, CHUNK):
        views = write(store, range(start, start + CHUNK))
        for view in views:
            numbers = [f for f in view.frames if f is not None]
            assert numbers == sorted(numbers)
            assert torch.equal(view.v, -view.k), "keys and values moved alike"
        whole = frame_tensor(range(start + CHUNK), 0, 1, len(row), PATCHES)
        assert torch.equal(views[1].k, whole[:, :, :, 1:2])
        moves, last = moves + (addresses(store) != last), addresses(store)
    assert moves <= 6, "its buffer doubles"


def test_another_batch_leaves_nothing_of_the_buffers_before() -> None:
    store = store_of([Local(2), Full()])
    for start in range(0, 8 * CHUNK, CHUNK):
        write(store, range(start, start + CHUNK), batch=2)
    other = store_of([Local(2), Full()])
    for each in (store, other):
        write(each, range(CHUNK), batch=1, dtype=torch.bfloat16)
    assert store.nbytes() == other.nbytes()


@pytest.mark.parametrize("store", [LeanStore, RingStore])
def test_the_buffers_before_are_free_when_those_of_another_batch_are_made(
    store: type[KVStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, left = store_of([Local(2), Full()], store), []
    for start in range(0, 3 * CHUNK, CHUNK):
        write(held, range(start, start + CHUNK))
    before = [StorageWeakRef(x.untyped_storage()) for bank in held._banks.values() for x in bank.tensors()]

    def watched(*given: Any) -> Any:
        left.extend(ref for ref in before if not ref.expired())
        return cut(*given)

    monkeypatch.setattr("headforcing.stores.buffered.cut", watched)
    write(held, range(CHUNK), batch=2)
    assert len(before) > 3
    assert left == []


def test_memory_that_runs_out_while_buffers_are_made_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of([Local(2), Full()])
    write(store, range(CHUNK))
    held, made = store._banks[Full()].slots(*[torch.zeros(1, 1, PATCHES, 2, DIM)] * 2), []

    def full(sizes: Any, *rest: Any) -> Any:
        made.append(sizes)
        if len(made) == 3:
            raise torch.OutOfMemoryError("planted")
        return cut(sizes, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("headforcing.stores.buffered.cut", full)
        with pytest.raises(torch.OutOfMemoryError):
            write(store, range(CHUNK, 2 * CHUNK))
    assert store._banks[Full()].slots(*[torch.zeros(1, 1, PATCHES, 2, DIM)] * 2) == held
    start = store.committed
    view = write(store, range(start, start + CHUNK))[1]
    assert torch.equal(view.k, frame_tensor(range(start + CHUNK), 0, 1, 2, PATCHES)[:, :, :, 1:])


# Planted bugs -------------------------------------------------------------------------------------


class Apart(RotatedBank):
    """Makes its own buffers."""

    def move(self, buffers: Any, slots: int) -> None:
        super().move({name: buffer.clone() for name, buffer in buffers.items()}, slots)


def test_a_role_with_memory_of_its_own_is_found() -> None:
    store = store_of([Local(1), Local(2)])
    store._banks[Local(1)] = Apart(Local(1), store.heads[Local(1)])
    write(store, range(CHUNK))
    with pytest.raises(AssertionError):
        check_buffers(buffers_of(store)["v"])


@pytest.mark.parametrize(
    "buffers",
    [
        lambda flat: [flat[:6].view(1, 3, 1, 1, 2), flat[8:].view(1, 4, 1, 1, 2)],
        lambda flat: [flat[:6].view(1, 3, 1, 1, 2), flat[6:].view(1, 5, 1, 1, 2)],
        lambda flat: [flat.view(1, 2, 2, 2, 2)],
    ],
    ids=["a hole", "the longest last", "token by token"],
)
def test_buffers_that_lie_otherwise_are_found(buffers: Any) -> None:
    with pytest.raises(AssertionError):
        check_buffers(buffers(torch.zeros(16)))
