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
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
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
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.base import bounded
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.episodic import MaxMin, ThresholdFifo, Uniform, similarity
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from headforcing.roles.rolling_forcing import Rolling
from headforcing.stores import STORES, KVStore, store_class
from headforcing.stores.reference import ReferenceStore
from headforcing.stores.ring import RingStore
from headforcing.stores.rotated import RotatedBank
from headforcing.types import Chunk, FrameTable, Heads, Phase
from tests.examples import examples
from tests.planted import with_banks
from tests.strategies import GRID, frame_tensor, kinds, queries, roles

WINDOW, CHUNK = 12, 4
PATCHES = GRID[0] * GRID[1]
FAST_STORES = [store for name, store in STORES.items() if name != "reference"]


def encode(x: torch.Tensor, positions: Any, patch: int = 1) -> torch.Tensor:
    """Stands for RoPE: exact, and different for every position."""
    return x + 1000.0 * torch.tensor(positions, dtype=x.dtype)[:, None, None, None]


def grouped(row: list[HeadRole]) -> dict[HeadRole, Heads]:
    heads: dict[HeadRole, list[int]] = {}
    for head, role in enumerate(row):
        heads.setdefault(role, []).append(head)
    return {role: Heads(indices, len(row)) for role, indices in heads.items()}


class Definition:
    """What a role keeps, written on frame numbers and Python lists only, for one sample."""

    def __init__(self, role: HeadRole) -> None:
        self.role = role
        self.kept, self.episodic = [], []
        self.chunks, self.last, self.cut = 0, None, []
        self.fits, self.averages, self.gone = True, None, []

    def begin(self, new: list[int], own: range, keys: dict[int, torch.Tensor]) -> None:
        role, frames = self.role, self.kept + new
        if isinstance(role, SlidingWindow):
            self.kept = self._sinks(frames) + self._last(frames, role.window - role.sink - len(own))
        elif isinstance(role, Wave | Strided):
            phases = range(role.period) if isinstance(role, Wave) else [0]
            self.kept = sorted(
                {f for phase in phases for f in self.cycle(range(own.start), own.start, phase)}
            )
        elif isinstance(role, Rolling):
            self.kept = self._sinks(frames) + self._last(frames, role.window - role.sink)
        elif isinstance(role, Local | Anchor):
            self.kept = self._sinks(frames) + self._last(frames, role.recent)
        elif isinstance(role, Veil):
            self.kept = [f for f in frames if f < role.sink or f >= own.start - role.recent]
        elif isinstance(role, Dynamic):
            self.kept = self._sinks(frames) + self._last(frames, 1)
            self._pieces(role, new)
        elif isinstance(role, Averaging):
            self._average(role, frames, len(own), keys)
        elif isinstance(role, Participating):
            taken = len(frames) + len(own) + (0 if self.fits else role.chosen)
            self.fits = self.fits and taken <= role.window
            recent = len(frames) if taken <= role.window else max(0, role.recent - len(own))
            self.kept = self._sinks(frames) + self._last(frames, recent)
            self.gone += [f for f in frames if f not in self.kept]
        elif isinstance(role, Memory):
            self._memory(role, frames, keys)
        else:
            self.kept = frames

    def cycle(self, frames: Any, start: int, phase: int) -> list[int]:
        """What a query of this phase reads: sinks, frames of the same phase, and the last ones."""
        role = self.role
        ends = [f for f in frames if f < role.sink or f >= start - role.recent]
        middle = [f for f in frames if f % role.period == phase and f not in ends]
        return sorted(ends + middle[max(len(middle) - role.cap, 0) :])

    def _memory(self, role: Memory, frames: list[int], keys: dict[int, torch.Tensor]) -> None:
        sinks, recent = self._sinks(frames), self._last(frames, role.recent)
        for frame in [f for f in frames if f not in sinks + recent + self.episodic]:
            self.episodic.append(frame)
            if len(self.episodic) > role.episodic:
                self.episodic.remove(self._victim(role, keys))
        self.kept = sinks + self.episodic + recent

    def _pieces(self, role: Dynamic, new: list[int]) -> None:
        """Frames that are cut: the last one of the chunk before, and all of this one but the last."""
        if not new:
            return
        before, self.last, self.chunks = self.last, new[-1], self.chunks + 1
        early = before is None or self.chunks <= role.skip
        self.cut = [] if early else [f for f in (before, *new[:-1]) if f >= role.sink]

    def _average(self, role: Averaging, frames: list[int], chunk: int, keys: dict[int, torch.Tensor]) -> None:
        self.fits = self.fits and len(frames) + chunk <= role.window
        recent = len(frames) if self.fits else role.window - chunk - 2 - role.sink
        self.kept = self._sinks(frames) + self._last(frames, recent)
        gone = [f for f in frames if f not in self.kept]
        if not gone:
            return
        if self.averages is None:
            gone = gone[2:] or gone[-1:]
        mean = torch.stack([keys[f] for f in gone]).double().mean((0, 1))
        olds = [mean, mean] if self.averages is None else self.averages
        self.averages = [
            w * mean + (1 - w) * old for w, old in zip((role.slow, role.fast), olds, strict=True)
        ]

    def check_beside(self, values: torch.Tensor | None, start: int, keys: Any) -> None:
        """Values `[m, Hr, D]` of compressed tokens; a value is its key with another sign."""
        role = self.role
        if isinstance(role, Veil) and role.blocks:
            complete = [b for b in range(0, start, role.block) if b + role.block <= start][-role.blocks :]
            read = [b for b in complete if b + role.block <= start - role.recent]
            expected = [torch.stack([keys(f) for f in range(b, b + role.block)]) for b in read]
            expected = [-_squares(x, role.patch) for x in expected]
        elif isinstance(role, Averaging) and self.averages is not None:
            expected = [-average.expand(PATCHES, -1, -1) for average in self.averages]
        elif isinstance(role, Dynamic) and self.cut:
            bands = [-band for f in self.cut for band in keys(f).unflatten(0, (role.pieces, -1))]
            seen = values.unflatten(0, (role.pieces, -1))
            rows = [[torch.equal(band, piece) for band in bands].index(True) for piece in seen]
            assert rows == sorted(set(rows)), "in order, none twice"
            return
        elif isinstance(role, Participating) and self.gone:
            past = torch.cat([-keys(f) for f in self.gone])
            found = (values[:, None] == past).all((2, 3))
            assert found.any(1).all(), "tokens of frames that went"
            rows = found.int().argmax(1).tolist()
            assert rows == sorted(set(rows)), "in order, none twice"
            assert len(rows) == min(role.chosen * PATCHES, len(past))
            return
        else:
            expected = []
        assert (values is None) == (not expected), role
        if expected:
            torch.testing.assert_close(values.double(), torch.cat(expected).double(), atol=1e-4, rtol=1e-4)

    def _sinks(self, frames: list[int]) -> list[int]:
        return [f for f in frames if f < self.role.sink]

    def _last(self, frames: list[int], count: int) -> list[int]:
        others = [f for f in frames if f >= self.role.sink]
        return others[max(len(others) - count, 0) :]

    def _victim(self, role: Memory, keys: dict[int, torch.Tensor]) -> int:
        bank = self.episodic
        if role.episodic == 0:
            return bank[-1]
        if isinstance(role.update, Uniform):
            if len(bank) < 3:
                return bank[-1]
            gaps = {b: c - a for a, b, c in zip(bank, bank[1:], bank[2:], strict=False)}
            return max(f for f, gap in gaps.items() if gap == min(gaps.values()))

        def alike(a: int, b: int) -> float:
            return torch.nn.functional.cosine_similarity(keys[a], keys[b], dim=-1).mean().item()

        newest = bank[-1]
        if isinstance(role.update, ThresholdFifo):
            nearest = max((alike(newest, f) for f in bank[:-1]), default=-1.0)
            return bank[0] if nearest < 1 - role.update.novelty else newest
        a, b = max(((x, y) for x in bank for y in bank if x < y), key=lambda pair: alike(*pair))
        rest = [f for f in bank if f not in (a, b)]
        second = [max((alike(f, g) for g in rest), default=-2.0) for f in (a, b)]
        return a if second[0] > second[1] else b


def _squares(frames: torch.Tensor, side: int) -> torch.Tensor:
    """The mean over frames `[n, P, Hr, D]` and squares of patches."""
    rows, columns = (range(0, length, side) for length in GRID)
    grid = frames.double().unflatten(1, GRID)
    return torch.stack([grid[:, r : r + side, c : c + side].mean((0, 1, 2)) for r in rows for c in columns])


class StoreMachine(RuleBasedStateMachine):
    """One final write per chunk into the reference, any number of noisy ones into the other."""

    store: ClassVar[type[KVStore]] = RingStore

    @initialize(
        row=st.lists(roles(WINDOW, CHUNK), min_size=1, max_size=4),
        batch=st.integers(1, 2),
        seed=st.integers(0, 9),
        lengths=st.lists(st.integers(1, CHUNK), min_size=3, max_size=10),
    )
    def start(self, row: list[HeadRole], batch: int, seed: int, lengths: list[int]) -> None:
        self.heads, self.num_heads = grouped(row), len(row)
        self.clean = ReferenceStore(self.heads, window=WINDOW, layer=0)
        self.noisy = self.store(self.heads, window=WINDOW, layer=0)
        self.seed = seed
        self._new_video(batch)
        for length in lengths:
            self.next_chunk(length, overlap=0, passes=1)

    def _new_video(self, batch: int) -> None:
        self.batch, self.pending = batch, None
        self.oracle = {role: [Definition(role) for _ in range(batch)] for role in self.heads}

    def _tensor(self, frames: range, salt: int = 0) -> torch.Tensor:
        return frame_tensor(frames, self.seed + salt, self.batch, self.num_heads, PATCHES)

    def _write(self, frames: range, noisy_passes: int, beyond: int = 0) -> None:
        """One chunk; where it rolls, its noisy passes bring up to `beyond` frames more, the first one all."""
        rolling, longest = beyond > 0, range(frames.start, frames.stop + beyond)
        k, v, q = self._tensor(frames), -self._tensor(frames), self._tensor(frames, salt=7)
        for salt in range(1, noisy_passes + 1):
            window = range(frames.start, longest.stop - (salt - 1) % (beyond + 1))
            noise = self._tensor(window, salt=100 * salt)
            self.noisy.write(Chunk(frames.start, noise, noise, GRID, noise, rolling))
            for role in self.heads:
                for query in queries(role, window):
                    self.noisy.view(role, "denoise", encode, query)
                    self.noisy.view_compressed(role, encode, query)
        if rolling:
            noise = self._tensor(longest, salt=9)
            self.clean.write(Chunk(frames.start, noise, noise, GRID, noise, rolling))
        for store in (self.noisy, self.clean):
            store.write(Chunk(frames.start, k, v, GRID, q, rolling))
        new = [] if self.pending is None else [f for f in self.pending if f < frames.start]
        self._define(new, longest)
        if rolling:
            self._define([], frames)
        self.pending = frames

    def _define(self, new: list[int], frames: range) -> None:
        for role, samples in self.oracle.items():
            heads = list(self.heads[role].indices)
            for sample, definition in enumerate(samples):
                known = [*definition.kept, *new]
                keys = {f: self._tensor(range(f, f + 1))[sample, 0][:, heads] for f in known}
                definition.begin(new, frames, keys)

    @rule(length=st.integers(1, CHUNK), overlap=st.integers(0, 2), passes=st.integers(0, 3))
    def next_chunk(self, length: int, overlap: int, passes: int) -> None:
        start = 0
        if self.pending is not None:
            start = max(self.pending.stop - overlap, self.pending.start + 1)
            length = max(length, self.pending.stop - start)
        self._write(range(start, start + length), passes)

    @rule(length=st.integers(1, CHUNK - 1), beyond=st.integers(1, CHUNK - 1), passes=st.integers(1, 4))
    def next_window(self, length: int, beyond: int, passes: int) -> None:
        """Several chunks are denoised at once, and the first of them is remembered."""
        start = 0 if self.pending is None else self.pending.stop
        self._write(range(start, start + length), passes, min(beyond, CHUNK - length))

    @precondition(lambda self: self.pending is not None)
    @rule(passes=st.integers(1, 2))
    def rewrite(self, passes: int) -> None:
        frames = self.pending
        for salt in range(passes):
            noise = self._tensor(frames, salt=100 * salt + 50)
            self.noisy.write(Chunk(frames.start, noise, noise, GRID, noise))
        k, q = self._tensor(frames), self._tensor(frames, salt=7)
        for store in (self.noisy, self.clean):
            store.write(Chunk(frames.start, k, -k, GRID, q))

    @precondition(lambda self: self.pending is not None and self.pending.start > 0)
    @rule(batch=st.integers(1, 2), length=st.integers(1, CHUNK), explicit=st.booleans())
    def new_video(self, batch: int, length: int, explicit: bool) -> None:
        if explicit:
            self.clean.reset()
            self.noisy.reset()
        self._new_video(batch)
        self._write(range(length), 1)

    @invariant()
    def views_agree_and_obey_the_definition(self) -> None:
        if getattr(self, "pending", None) is None:
            return
        now = self.pending
        for role, heads in self.heads.items():
            for query in queries(role, now):
                view = self._same_view(role, "denoise", query)
                assert view.k.shape[3] == len(heads)
                inside = self.oracle[role][0].role
                if isinstance(inside, Wave | Strided):
                    phase = query % inside.period if isinstance(inside, Wave) else 0
                    read = self.oracle[role][0].cycle(range(now.start), now.start, phase)
                    assert view.frames == (*read, *now)
                if isinstance(inside, Rolling):
                    kept = [*self.oracle[role][0].kept, *now]
                    clean = [f for f in kept if f >= now.stop - inside.window]
                    last = [f for f in kept if f >= now.stop - inside.window + inside.sink]
                    noisy = sorted({*kept[: inside.sink], *last, *now})
                    assert list(view.frames) == noisy
                    others = [f for f in noisy if f >= inside.sink or f in now]
                    before = range(others[0] - len(noisy) + len(others), others[0])
                    assert view.positions == (*before, *others)
                else:
                    clean = [f for f in view.frames if f is not None]
                if role.clean_window is not None:
                    clean = [f for f in clean if f >= now.stop - role.clean_window]
                if isinstance(inside, Rolling) or role.clean_window is not None:
                    assert list(self._same_view(role, "clean", query).frames) == clean
                self._check_beside(role, query)
            held = self.noisy.frames(role)
            assert held == self.clean.frames(role)
            assert held == [definition.kept for definition in self.oracle[role]], role
            for sample in held:
                assert sample == sorted(set(sample)), "no frame twice"
                assert all(frame < now.start for frame in sample), "none from the future"

    def _same_view(self, role: HeadRole, phase: Phase, query: int | None) -> Any:
        expected = self.clean.view(role, phase, encode, query)
        view = self.noisy.view(role, phase, encode, query)
        assert view.frames == expected.frames
        assert view.positions == expected.positions
        assert torch.equal(view.k, expected.k), role
        assert torch.equal(view.v, expected.v), role
        placed = torch.tensor(view.positions, dtype=view.k.dtype)[:, None, None, None]
        assert torch.allclose(view.k - 1000.0 * placed, -view.v, atol=1e-2), "K and V are of one frame"
        self._check_bounds(role, view.positions)
        return view

    def _check_beside(self, role: HeadRole, query: int | None) -> None:
        expected, seen = (store.view_compressed(role, encode, query) for store in (self.clean, self.noisy))
        assert (expected is None) == (seen is None)
        if seen is not None:
            assert torch.equal(seen[0], expected[0]), role
            assert torch.equal(seen[1], expected[1]), role
            off = (seen[0] + seen[1]) / 1000.0
            assert torch.allclose(off, off.round(), atol=1e-4), "keys and values are of the same frames"
        heads = list(self.heads[role].indices)
        for sample, definition in enumerate(self.oracle[role]):

            def keys(f: int, sample: int = sample) -> torch.Tensor:
                return self._tensor(range(f, f + 1))[sample, 0][:, heads]

            definition.check_beside(None if seen is None else seen[1][sample], self.pending.start, keys)

    def _check_bounds(self, role: HeadRole, positions: tuple[int, ...]) -> None:
        assert list(positions) == sorted(positions)
        assert len(set(positions)) == len(positions) or "query" in role.depends_on
        if bounded(role):
            assert positions[0] >= 0
            assert positions[-1] < WINDOW
        capacity = role.capacity(len(self.pending))
        assert capacity is None or len(positions) <= capacity + len(self.pending)


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


SETTINGS = settings(stateful_step_count=20, max_examples=examples(40, nightly=2000))


@pytest.mark.parametrize("store", FAST_STORES, ids=lambda store: store.__name__)
def test_noisy_rewrites_leave_no_trace_and_every_role_keeps_what_its_definition_names(store):
    machine = type("Machine", (StoreMachine,), {"store": store})
    run_state_machine_as_test(machine, settings=SETTINGS)


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
        if any(len(bank.frames) < 8 for bank in self._banks.values()):
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
    [Leaky, with_banks(Sticky), Greedy, Mixed, Frozen, Lasting, Withholding, Hasty],
    ids=lambda store: store.__name__,
)
def test_the_state_machine_catches_a_planted_bug(store):
    machine = type("Planted", (StoreMachine,), {"store": store})
    quick = settings(SETTINGS, phases=[Phase_.generate], report_multiple_bugs=False)
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
