"""Stores: a clean run through the reference beside a noisy run through every other store."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import Phase as Phase_
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    run_state_machine_as_test,
)

from headforcing.errors import (
    ChunkOrderError,
    NonFiniteKVError,
    StreamError,
    StreamShapeError,
    WindowError,
    module_names,
)
from headforcing.roles import (
    Anchor,
    Averaging,
    EmaSink,
    Full,
    HeadRole,
    Local,
    Memory,
    Participating,
    Veil,
)
from headforcing.roles.base import newest_rows
from headforcing.roles.blocks import Blocks
from headforcing.roles.episodic import MaxMin, similarity
from headforcing.stores import STORES, Bank, KVStore, store_class
from headforcing.stores.compressed import CompressedHistories
from headforcing.stores.reference import ReferenceStore
from headforcing.stores.ring import RingStore
from headforcing.stores.rotated import RotatedBank
from headforcing.stores.switch import Switch
from headforcing.types import Chunk, FrameTable, Heads, Phase, Selection
from tests.examples import examples
from tests.machine import CHUNK, ROLES, WINDOW, VideoMachine, encode, grouped, tell_story
from tests.oracle import RULES
from tests.planted import with_banks
from tests.strategies import frame_tensor, kinds

FAST_STORES = [store for name, store in STORES.items() if name != "reference"]


def built_in() -> set[type[HeadRole]]:
    """Classes of roles that the folder `headforcing/roles` defines."""
    package, found, todo = "headforcing.roles", set(), [HeadRole]
    for name in module_names(package):
        importlib.import_module(f"{package}.{name}")
    while todo:
        subclasses = todo.pop().__subclasses__()
        todo += subclasses
        found |= {cls for cls in subclasses if cls.__module__.startswith(f"{package}.")}
    return {cls for cls in found if not inspect.isabstract(cls)}


def check_drawn(classes: set[type[HeadRole]]) -> None:
    assert classes == set(kinds(WINDOW, CHUNK))


def test_every_role_in_the_folder_is_drawn():
    check_drawn(built_in())


def test_a_role_that_is_not_drawn_is_found():
    with pytest.raises(AssertionError):
        check_drawn({*built_in(), EverySecond})
    with pytest.raises(AssertionError):
        check_drawn(built_in() - {Full})


@pytest.mark.parametrize("kind", kinds(WINDOW, CHUNK), ids=lambda kind: kind.__name__)
def test_what_is_drawn_is_of_its_class_and_fits_every_chunk(kind):
    @settings(max_examples=examples(30))
    @given(kinds(WINDOW, CHUNK)[kind], st.integers(1, CHUNK))
    def check(role: HeadRole, chunk: int) -> None:
        assert type(role) is kind
        role.fit(WINDOW, chunk)

    check()


SETTINGS = settings(stateful_step_count=12, max_examples=examples(15, nightly=2000))


def test_every_role_has_a_rule():
    assert set(RULES) == built_in()


@pytest.mark.parametrize("store", FAST_STORES, ids=lambda store: store.__name__)
def test_every_store_and_every_role_do_what_the_docstrings_say(store):
    """Through noisy passes, overlaps, rolling windows, prompt switches of every mode, marks, new videos."""
    machine = type("Machine", (VideoMachine,), {"store": store})
    run_state_machine_as_test(machine, settings=SETTINGS)


def test_the_story_has_every_role():
    assert {type(role) for role in ROLES} == built_in()


FIRST = {type(role): role for role in reversed(ROLES)}
"""The first role of every class."""


@pytest.mark.parametrize(
    "role",
    [
        pytest.param(role, id=str(role), marks=() if role in FIRST.values() else pytest.mark.slow)
        for role in ROLES
    ],
)
def test_every_role_goes_through_every_mode(role):
    tell_story(role)


def test_tokens_are_selected_again_after_a_recache_that_left_no_queries():
    machine = VideoMachine()
    machine.start(row=[Participating(7, 0, 1, 1)], usual=[], batch=1, seed=0, lengths=[3] * 6)
    machine.change_scene(Switch("recache", frames=1), [3, 3, 3])


def keep_one_less(self: HeadRole, kept: Selection, table: FrameTable) -> Selection:
    rows = (*kept.before, *kept.after)
    return kept if kept.chosen is not None else Selection(rows[:-1])


def keep_one_more(self: HeadRole, kept: Selection, table: FrameTable) -> Selection:
    gone = [] if kept.chosen is not None else sorted({*range(len(table))} - {*kept.before})
    return Selection(tuple(sorted({*kept.before, *gone[-1:]}))) if gone else kept


def forget_a_first_frame(self: HeadRole, kept: Selection, table: FrameTable) -> Selection:
    return replace(kept, before=kept.before[1:]) if getattr(self, "sink", 0) else kept


@pytest.mark.parametrize(
    "wrong", [keep_one_less, pytest.param(keep_one_more, marks=pytest.mark.slow), forget_a_first_frame]
)
def test_a_role_that_keeps_other_frames_is_found(wrong, monkeypatch):
    changed, found = set(), set()

    def plant(kind: type[HeadRole]) -> None:
        right = kind.retain

        def retain(self: HeadRole, table: FrameTable) -> Selection:
            kept = right(self, table)
            kept = kept if isinstance(kept, Selection) else Selection(tuple(kept))
            other = wrong(self, kept, table)
            changed.update([self] if other != kept else [])
            return other

        monkeypatch.setattr(kind, "retain", retain)

    for kind in built_in():
        plant(kind)
    for role in ROLES:
        try:
            tell_story(role)
        except (AssertionError, RuntimeError, WindowError):
            found.add(role)
    assert found == changed
    assert len(found) > len(ROLES) / 2


COMPRESSED = {Averaging, EmaSink, Participating}


def gaps_are_compressed(patch: pytest.MonkeyPatch) -> None:
    """Frames that were dropped by a switch take places."""
    right = Bank.choose

    def choose(self: Bank, chunk: range, pin: Any, gap: int) -> Any:
        return right(self, chunk, pin, gap or int(self.frames != tuple(range(len(self.frames)))))

    patch.setattr(Bank, "choose", choose)


def full_too_early(patch: pytest.MonkeyPatch) -> None:
    for kind in COMPRESSED:
        right = kind.retain
        patch.setattr(
            kind,
            "retain",
            lambda self, table, right=right: right(self, replace(table, chunk=table.chunk + 1)),
        )


def compressed_takes_no_place(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompressedHistories, "gap", lambda *_: 0)


def kept_frames_are_not_merged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Blocks, "restarted", lambda *_: None)


def chosen_frames_are_never_first(patch: pytest.MonkeyPatch) -> None:
    """Those that were chosen by content are no first frames of the scene that begins with them."""
    patch.setattr("headforcing.stores.scenes._with_first", lambda frames, _: frames)


def positions_of_what_is_seen(patch: pytest.MonkeyPatch) -> None:
    def visible(self: HeadRole, table: FrameTable, phase: Phase) -> Any:
        return newest_rows(self, table, tuple(range(len(table))), phase)

    patch.setattr(HeadRole, "visible", visible)


@pytest.mark.parametrize(
    ("plant", "kinds_hit"),
    [
        (gaps_are_compressed, COMPRESSED),
        (full_too_early, COMPRESSED),
        (compressed_takes_no_place, COMPRESSED),
        (kept_frames_are_not_merged, {Veil}),
        (chosen_frames_are_never_first, {Memory}),
        pytest.param(positions_of_what_is_seen, {Memory, Anchor}, marks=pytest.mark.slow),
    ],
    ids=lambda plant: getattr(plant, "__name__", ""),
)
def test_the_story_catches_planted_bugs(plant, kinds_hit, monkeypatch):
    plant(monkeypatch)
    hit = set()
    for role in ROLES:
        if type(role) in kinds_hit - hit:
            try:
                tell_story(role)
            except (AssertionError, WindowError):
                hit.add(type(role))
    assert hit == kinds_hit


class Leaky(RingStore):
    """Commits on every write."""

    def _stage(self, chunk: Chunk) -> None:
        super()._stage(chunk)
        if self._pending is not None and self._pending.start:
            for bank in self._banks.values():
                bank.append(self._pending, self._pending)


class Sticky(RotatedBank):
    """Forgets to forget."""

    def clear(self) -> None:
        pass


class Greedy(RingStore):
    """Keeps what the role says to evict, once it has enough."""

    def _begin(self, own: range) -> None:
        if all(len(bank.frames) < 8 for bank in self._banks.values()):
            super()._begin(own)


class Mixed(RingStore):
    """Shows the values of another pass."""

    def _stage(self, chunk: Chunk) -> None:
        if chunk.frames != getattr(self, "seen", None):
            self.values = chunk.v
        self.seen = chunk.frames
        super()._stage(replace(chunk, v=self.values))


class Frozen(RingStore):
    """Never rotates history again."""

    def view(self, role: HeadRole, phase: Phase, encode: Any, query: int | None = None) -> Any:
        bank = self._banks[role]
        if query is not None:
            return super().view(role, phase, encode, query)
        placed = [role.positions_of((*bank.frames, *self._pending), len(self._pending), self.window)]
        held = len(bank.frames) - 1
        bank._rotated_to[:held] = placed[0][:held]
        return super().view(role, phase, encode, query)


class Lasting(RingStore):
    """Shows what was merged, averaged or cut for the first chunk that saw any."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compressed.forget_views = lambda: None


class Withholding(RingStore):
    """Does not say which frames go."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compressed.evicted = lambda *_: None


class Hasty(RingStore):
    """Merges, averages and cuts what the first pass wrote."""

    def _stage(self, chunk: Chunk) -> None:
        if chunk.frames != getattr(self, "_seen", None):
            self._first, self._seen = chunk, chunk.frames
        super()._stage(chunk)

    def _commit_before(self, start: int) -> None:
        add = self.compressed.add
        self.compressed.add = lambda role, frames, chunk: add(role, frames, self._instead(role, chunk))
        super()._commit_before(start)
        self.compressed.add = add

    def _instead(self, role: HeadRole, chunk: Chunk) -> Chunk:
        k, v = self.heads[role].take(self._first.k), self.heads[role].take(self._first.v)
        return replace(chunk, k=k, v=v)


@pytest.mark.parametrize(
    "store",
    [
        *(Leaky, Greedy, Mixed, Frozen, Lasting, Hasty),
        *(pytest.param(store, marks=pytest.mark.slow) for store in (with_banks(Sticky), Withholding)),
    ],
    ids=lambda store: store.__name__,
)
def test_the_state_machine_catches_a_planted_bug(store):
    machine = type("Planted", (VideoMachine,), {"store": store})
    quick = settings(SETTINGS, max_examples=1000, phases=[Phase_.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, RuntimeError, IndexError, StreamError, WindowError)):
        run_state_machine_as_test(machine, settings=quick)


def chunk_of(start: int, length: int = 3, batch: int = 1, heads: int = 2, **kind: Any) -> Chunk:
    x = frame_tensor(range(start, start + length), 0, batch, heads).to(**kind)
    return Chunk(start, x, -x)


@pytest.fixture(params=sorted(STORES))
def store(request) -> KVStore:
    return store_class(request.param)(grouped([Local(2), Memory(1, 2, 2)]), window=WINDOW, layer=7)


@dataclass(frozen=True)
class EverySecond(HeadRole):
    """Keeps everything, sees every second frame while denoising: a role that attends to a part."""

    depends_on: ClassVar[tuple[str, ...]] = ("phase",)

    def capacity(self, chunk: int) -> int | None:
        return WINDOW - chunk

    def retain(self, table: FrameTable) -> Any:
        return range(max(len(table) - (WINDOW - table.chunk), 0), len(table))

    def visible(self, table: FrameTable, phase: Phase) -> Any:
        return range(0, len(table), 2) if phase == "denoise" else range(max(len(table) - 2, 0), len(table))


@settings(max_examples=examples(40, nightly=1000))
@given(lengths=st.lists(st.integers(1, CHUNK), min_size=1, max_size=12), passes=st.integers(1, 3))
def test_a_role_that_attends_to_a_part_sees_the_same_in_every_store(lengths, passes):
    classes = (ReferenceStore, *FAST_STORES)
    stores = [cls(grouped([EverySecond(), Full()]), window=WINDOW, layer=0) for cls in classes]
    start = 0
    for length in lengths:
        for number in range(passes):
            chunk = chunk_of(start, length)
            for store in stores:
                store.write(Chunk(start, chunk.k + passes - number - 1, chunk.v))
            for phase in ("denoise", "clean"):
                one, *others = (store.view(EverySecond(), phase, encode) for store in stores)
                for two in others:
                    assert one.frames == two.frames
                    assert torch.equal(one.k, two.k)
                    assert torch.equal(one.v, two.v)
        start += length


@given(st.lists(st.integers(0, 40), min_size=2, max_size=8))
def test_chunks_must_come_in_order(starts):
    store = RingStore(grouped([Local(1)]), window=WINDOW, layer=3)
    pending = None
    for start in starts:
        expected = {0} if pending is None else {0, *range(pending, pending + 4)}
        if start in expected:
            store.write(chunk_of(start, heads=1))
            pending = start
        else:
            with pytest.raises(ChunkOrderError, match=rf"layer 3: a chunk starts at frame {start}, expected"):
                store.write(chunk_of(start, heads=1))


def test_a_chunk_that_would_lose_the_end_of_the_one_before_is_refused(store):
    store.write(chunk_of(0))
    store.write(chunk_of(3))
    with pytest.raises(ChunkOrderError, match="ends before frame 5, expected at least 6"):
        store.write(chunk_of(4, length=1))
    store.write(chunk_of(4, length=2))


def test_a_change_of_batch_or_dtype_inside_a_video_is_refused_and_harmless(store):
    for start in (0, 3, 6):
        store.write(chunk_of(start))
    before = store.frames(Local(2))
    for bad in (chunk_of(9, batch=2), chunk_of(9, dtype=torch.float64), chunk_of(6, batch=2)):
        with pytest.raises(StreamShapeError, match="layer 7: keys of this video were"):
            store.write(bad)
    assert store.frames(Local(2)) == before
    assert store.pending == range(6, 9)
    store.write(chunk_of(9))


def test_a_new_video_may_have_another_batch(store):
    store.write(chunk_of(0))
    store.write(chunk_of(3))
    store.write(chunk_of(0, batch=2))
    store.write(chunk_of(3, batch=2))
    assert store.frames(Local(2)) == [[1, 2], [1, 2]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_broken_chunk_is_not_committed_and_can_be_written_again(store, value, which):
    store.write(chunk_of(0))
    chunk = chunk_of(3)
    getattr(chunk, which)[0, 1, 0, 1, 2] = value
    store.write(chunk)
    with pytest.raises(NonFiniteKVError, match=r"layer 7, heads 1: keys or values of frames 3\.\.5"):
        store.write(chunk_of(6))
    assert store.pending == range(3, 6)
    assert store.frames(Local(2)) == [[1, 2]]
    store.write(chunk_of(3))
    store.write(chunk_of(6))
    assert store.frames(Local(2)) == [[4, 5]]


def test_a_chunk_longer_than_the_role_has_room_for_is_refused(store):
    store.write(chunk_of(0))
    with pytest.raises(WindowError, match="beside a chunk of 9"):
        store.write(chunk_of(3, length=9))
    store.write(chunk_of(3))


def test_committing_by_hand_ends_the_pending_chunk(store):
    store.write(chunk_of(0))
    store.commit()
    store.commit()
    assert store.pending is None
    assert store.committed == 3
    assert store.frames(Local(2)) == [[1, 2]]
    store.write(chunk_of(3))
    assert store.frames(Memory(1, 2, 2)) == [[0, 1, 2]]


def test_bytes_are_counted_from_the_tensors():
    store = RingStore(grouped([Local(2), Anchor(1)]), window=WINDOW, layer=0)
    assert store.nbytes() == 0
    store.write(chunk_of(0))
    token = 4 * 4  # float32, D = 4
    slots = (2 + 3) + (1 + 3)
    assert store.nbytes() == 3 * slots * 2 * token + 8 * slots


def test_a_longer_local_memory_never_takes_fewer_bytes():
    sizes = []
    for recent in range(6):
        store = RingStore(grouped([Local(recent)]), window=WINDOW, layer=0)
        for start in range(0, 30, 3):
            store.write(chunk_of(start, heads=1))
        sizes.append(store.nbytes())
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)


@given(frames=st.integers(2, 9), batch=st.integers(1, 3), seed=st.integers(0, 5))
def test_similarity_is_the_mean_cosine_of_colocated_keys(frames, batch, seed):
    keys = frame_tensor(range(frames), seed, batch, heads=3).double()
    slow = torch.stack(
        [
            torch.stack(
                [torch.cosine_similarity(keys[:, i], keys[:, j], dim=-1).mean((1, 2)) for j in range(frames)],
                -1,
            )
            for i in range(frames)
        ],
        1,
    )
    assert torch.allclose(similarity(keys).double(), slow, atol=1e-5)


@given(shown=st.lists(st.integers(0, 2), min_size=9, max_size=16))
def test_max_min_keeps_every_distinct_scene(shown):
    scenes = torch.randn(3, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    keys = torch.stack([scenes[scene] for scene in shown])[None]
    assume(len(set(shown)) == 3)
    kept = MaxMin().choose(keys, stored=0, capacity=3)[0].tolist()
    assert {shown[row] for row in kept} == {0, 1, 2}


def test_frames_are_chosen_by_keys_whatever_the_values_are():
    role, found = Memory(1, 3, 2), []
    for store in STORES:
        held = store_class(store)({role: Heads(range(1), 1)}, window=WINDOW, layer=0)
        for start in range(0, 30, 3):
            k, v = torch.randn(2, 1, 3, 4, 1, 8, generator=torch.Generator().manual_seed(start))
            held.write(Chunk(start, k, v))
        found.append(held.frames(role))
    assert found[1:] == found[:-1]


def test_samples_of_a_batch_remember_on_their_own():
    role = Memory(1, 2, 1)
    alone = []
    both = ReferenceStore(grouped([role]), window=WINDOW, layer=0)
    tensors = [frame_tensor(range(30), seed, 1, 1) for seed in (1, 2)]
    for x in tensors:
        single = RingStore(grouped([role]), window=WINDOW, layer=0)
        for start in range(0, 30, 3):
            single.write(Chunk(start, x[:, start : start + 3], x[:, start : start + 3]))
        alone += single.frames(role)
    for start in range(0, 30, 3):
        x = torch.cat([tensor[:, start : start + 3] for tensor in tensors])
        both.write(Chunk(start, x, x))
    assert both.frames(role) == alone
