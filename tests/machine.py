"""A state machine that drives two stores through videos of any kind, beside the rules of `tests.oracle`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from headforcing.errors import StreamError
from headforcing.roles import (
    Anchor,
    Averaging,
    Dilated,
    Dynamic,
    EmaSink,
    Full,
    HeadRole,
    Local,
    Memory,
    Participating,
    Rolling,
    SlidingWindow,
    Strided,
    Veil,
    Wave,
)
from headforcing.roles.base import bounded
from headforcing.roles.episodic import ThresholdFifo, Uniform
from headforcing.roles.positions import TRUE
from headforcing.stores import KVStore
from headforcing.stores.reference import ReferenceStore
from headforcing.stores.ring import RingStore
from headforcing.stores.switch import Switch
from headforcing.types import Chunk, Heads, Phase, Truncation
from tests import oracle
from tests.oracle import Frame, Head
from tests.strategies import GRID, frame_tensor, queries, roles

WINDOW, CHUNK = 12, 4
PATCHES = GRID[0] * GRID[1]
NAMES = ("a", "b")


drawn = functools.lru_cache(10_000)(frame_tensor)


def encode(x: Tensor, positions: Any, patch: int = 1) -> Tensor:
    """Stands for RoPE: exact, and different for every position."""
    return x + 1000.0 * torch.tensor(positions, dtype=x.dtype)[:, None, None, None]


def grouped(row: list[HeadRole]) -> dict[HeadRole, Heads]:
    heads: dict[HeadRole, list[int]] = {}
    for head, role in enumerate(row):
        heads.setdefault(role, []).append(head)
    return {role: Heads(indices, len(row)) for role, indices in heads.items()}


def switches() -> st.SearchStrategy[Switch]:
    keeps = st.lists(st.sampled_from(["sink", "episodic"]), max_size=2, unique=True)
    return st.one_of(
        st.sampled_from([Switch("continue"), Switch("smooth"), Switch("smooth")]),
        st.builds(lambda keep: Switch("cut", tuple(keep)), keeps),
        st.builds(lambda mark: Switch("recall", mark=mark), st.sampled_from(NAMES)),
        st.builds(lambda frames: Switch("recache", frames=frames), st.integers(1, 7)),
    )


USUAL: list[list[HeadRole]] = [
    [Local(3, 1), Veil(1, 1, 9, WINDOW, blocks=2, block=2)],
    [Memory(1, 2, 2), Averaging(8, 1, 0.25, 0.5)],
    [Memory(1, 3, 1, Uniform(), positions="absolute"), Full(), EmaSink(7, 2, 0.25)],
    [SlidingWindow(8, 2, positions="absolute"), Dynamic(1, 2, 0), Memory(1, 2, 3)],
    [Participating(8, 1, 4, 1), Local(2, 2, positions="clamped"), Veil(3, 1, 9, WINDOW, blocks=2, block=3)],
    [Wave(1, 1, 9, WINDOW, period=2, cap=2), Anchor(1, 2), Memory(2, 4, 2, ThresholdFifo())],
]
"""Roles for which every switch makes a difference."""


class VideoMachine(RuleBasedStateMachine):
    """One final write per chunk into the reference, any number of noisy ones into the other."""

    store: ClassVar[type[KVStore]] = RingStore
    reference: ClassVar[type[KVStore]] = ReferenceStore

    @initialize(
        row=st.lists(roles(WINDOW, CHUNK), max_size=2),
        usual=st.sampled_from(USUAL),
        batch=st.integers(1, 2),
        seed=st.integers(0, 9),
        lengths=st.lists(st.integers(1, CHUNK), min_size=3, max_size=7),
    )
    def start(
        self, row: list[HeadRole], usual: list[HeadRole], batch: int, seed: int, lengths: list[int]
    ) -> None:
        row = [*row, *usual]
        self.heads, self.num_heads = grouped(row), len(row)
        self.clean = self.reference(self.heads, window=WINDOW, layer=0)
        self.noisy = self.store(self.heads, window=WINDOW, layer=0)
        self.seed, self.take = seed, 0
        self._new_video(batch)
        for chunk, length in enumerate(lengths):
            self.next_chunk(length, overlap=0, passes=1)
            if chunk in (0, 2):
                self.mark(NAMES[chunk // 2])

    # Content

    def _new_video(self, batch: int) -> None:
        self.batch, self.pending, self.end = batch, None, 0
        self.due: list[str] = []
        self.switch: Switch | None = None
        self.marks: dict[str, dict[HeadRole, list[list[Frame]]]] = {}
        self.past = {
            role: [oracle.head(role, self._alike(role, sample)) for sample in range(batch)]
            for role in self.heads
        }

    def _alike(self, role: HeadRole, sample: int) -> oracle.Alike:
        @functools.cache
        def alike(a: Any, b: Any) -> float:
            keys = (self._content(role, sample, Frame(0, name)) for name in (a, b))
            return torch.cosine_similarity(*keys, dim=-1).mean().item()

        return lambda a, b: alike(*sorted((a.name, b.name)))

    def _content(self, role: HeadRole, sample: int, frame: Frame) -> Tensor:
        """Keys of a frame for the heads of a role, `[P, Hr, D]`; a value is its key with another sign."""
        number, take = frame.name
        return self._tensor(range(number, number + 1), take)[sample, 0][:, list(self.heads[role].indices)]

    def _contents(self, role: HeadRole, sample: int, frames: Iterable[Frame]) -> Tensor:
        return torch.stack([self._content(role, sample, frame) for frame in frames])

    def _tensor(self, frames: range, take: int) -> Tensor:
        return drawn(frames, self.seed + 10 * take, self.batch, self.num_heads, PATCHES)

    def _noise(self, frames: range, number: int, rolling: bool = False) -> Chunk:
        x = self._tensor(frames, -1 - number)
        return Chunk(frames.start, x, x, GRID, x, rolling)

    def _final(self, rolling: bool = False) -> Chunk:
        x, q = self._tensor(self.pending, self.take), self._tensor(self.pending, -50 - self.take)
        return Chunk(self.pending.start, x, -x, GRID, q, rolling)

    def _write_noise(self, chunk: Chunk) -> None:
        self.noisy.write(chunk)
        for role in self.heads:
            for query in queries(role, chunk.frames):
                self.noisy.view(role, "denoise", encode, query)
                self.noisy.view_compressed(role, encode, query)

    # What happens

    @rule(length=st.integers(1, CHUNK), overlap=st.integers(0, 2), passes=st.integers(0, 2))
    def next_chunk(self, length: int, overlap: int, passes: int) -> None:
        begin = self._begin(overlap)
        if self.pending is not None and not self._recomputes:
            length = max(length, self.pending.stop - begin)
        self._next(range(begin, begin + length), [begin + length] * passes)

    @rule(length=st.integers(1, CHUNK - 1), beyond=st.integers(1, CHUNK - 1), passes=st.integers(1, 4))
    def next_window(self, length: int, beyond: int, passes: int) -> None:
        """Several chunks are denoised at once, and the first of them is remembered."""
        begin, beyond = self._begin(), min(beyond, CHUNK - length)
        stops = [begin + length + beyond - number % (beyond + 1) for number in range(passes)]
        self._next(range(begin, begin + length), stops)

    @property
    def _recomputes(self) -> bool:
        return self.switch is not None and self.switch.mode == "recache"

    def _begin(self, overlap: int = 0) -> int:
        end = self.end if self.pending is None else self.pending.stop
        if self._recomputes:
            return end - self.switch.frames
        return end if self.pending is None else max(end - overlap, self.pending.start + 1)

    def _next(self, frames: range, stops: list[int]) -> None:
        """A chunk whose noisy passes end before `stops`; where they go beyond it, the first one does most."""
        longest = range(frames.start, max(frames.stop, *stops, 0))
        rolling = longest != frames
        for number, stop in enumerate(stops):
            self._write_noise(self._noise(range(frames.start, stop), number, rolling))
        if rolling:
            self.clean.write(self._noise(longest, 9, rolling))
        self._follow(longest)
        if rolling:
            self._everyone(lambda past: past.chunk_begins(frames.start, len(frames)))
        self.due, self.switch = [], None
        self.pending, self.end = frames, frames.start
        self.take += 1
        for store in (self.noisy, self.clean):
            store.write(self._final(rolling))

    def _follow(self, frames: range) -> None:
        """What the rules make of a chunk that begins."""
        begin, switch = frames.start, self.switch
        self._commit(begin)
        if not self._recomputes:
            self._everyone(lambda past: past.chunk_begins(begin, len(frames)))
        for name in self.due:
            marked = {role: [past.mark(begin) for past in samples] for role, samples in self.past.items()}
            self.marks[name] = marked
        if switch is None or switch.mode == "continue":
            return
        for role, samples in self.past.items():
            for sample, past in enumerate(samples):
                past.switch(switch, begin, switch.mark and self.marks[switch.mark][role][sample])
        self._everyone(lambda past: past.chunk_begins(begin, len(frames)))

    def _commit(self, stop: int) -> None:
        done = [(number, (number, self.take)) for number in self.pending or () if number < stop]
        if done:
            self._everyone(lambda past: past.commit(done))

    def _everyone(self, what: Callable[[Head], None]) -> None:
        for samples in self.past.values():
            for past in samples:
                what(past)

    @property
    def _recomputes_pending(self) -> bool:
        return self._recomputes and self.pending is not None and self.switch.frames == len(self.pending)

    @precondition(lambda self: self.pending is not None and not self._recomputes_pending)
    @rule(passes=st.integers(1, 2))
    def rewrite(self, passes: int) -> None:
        for number in range(passes):
            self._write_noise(self._noise(self.pending, 5 + number))
        for store in (self.noisy, self.clean):
            store.write(self._final())

    @precondition(lambda self: self.pending is not None)
    @rule(name=st.sampled_from(NAMES))
    def mark(self, name: str) -> None:
        for store in (self.clean, self.noisy):
            store.scenes.mark(name)
        self.due.append(name)

    @precondition(lambda self: self.pending is not None)
    @rule(wanted=switches())
    def ask(self, wanted: Switch) -> None:
        """In the middle of a chunk; the last one asked for counts."""
        refused = []
        for store in (self.clean, self.noisy):
            try:
                store.check_switch(wanted)
            except StreamError as error:
                refused.append(str(error))
        assert len(refused) in (0, 2)
        if refused:
            self._check_refusal(wanted, refused[0])
            return
        assert wanted.mark is None or wanted.mark in {*self.marks, *self.due}
        for store in (self.clean, self.noisy):
            store.scenes.ask(wanted)
        self.switch = wanted

    def _check_refusal(self, wanted: Switch, message: str) -> None:
        if wanted.mode == "recall":
            assert wanted.mark not in {*self.marks, *self.due}
            return
        assert wanted.mode == "recache"
        first = self.pending.stop - wanted.frames
        chosen = any(f.chosen for samples in self.past.values() for past in samples for f in past.stored)
        scene = max(past.origin + past.since for samples in self.past.values() for past in samples)
        assert first < scene or chosen, message

    @precondition(lambda self: self.pending is not None)
    @rule(wanted=switches(), lengths=st.lists(st.integers(1, CHUNK), min_size=1, max_size=4))
    def change_scene(self, wanted: Switch, lengths: list[int]) -> None:
        self.ask(wanted)
        if not self._recomputes_pending:
            self.rewrite(1)
        self.stores_and_rules_agree()
        for length in lengths:
            self.next_chunk(length, 0, 1)
            self.stores_and_rules_agree()

    @precondition(lambda self: self.pending is not None and self.switch is None)
    @rule()
    def commit(self) -> None:
        for store in (self.clean, self.noisy):
            store.commit()
        end, length = self.pending.stop, len(self.pending)
        self._commit(end)
        self._everyone(lambda past: past.chunk_begins(end, length))
        self.pending, self.end = None, end

    @property
    def _can_empty(self) -> bool:
        """Roles with true positions follow the base model instead: see tests/stores/test_shots.py."""
        asked = self.pending is None or self.switch is not None or self.due
        return not asked and not any(role.positions in TRUE for role in self.heads)

    @precondition(lambda self: self._can_empty)
    @rule(keep=st.integers(0, 3), lengths=st.lists(st.integers(1, CHUNK), min_size=1, max_size=4))
    def empty(self, keep: int, lengths: list[int]) -> None:
        """The base model empties its cache but for its first frames, and runs the chunk again."""
        for store in (self.clean, self.noisy):
            store.edit(Truncation(keep), self.pending.start)
        self._everyone(lambda past: past.empty(keep, self.pending.start))
        self._everyone(lambda past: past.chunk_begins(self.pending.start, len(self.pending)))
        self.rewrite(1)
        for length in lengths:
            self.next_chunk(length, 0, 1)
            self.stores_and_rules_agree()

    @precondition(lambda self: self.pending is not None and self.pending.start > 0 and self.take > 9)
    @rule(batch=st.integers(1, 2), length=st.integers(1, CHUNK), explicit=st.booleans())
    def new_video(self, batch: int, length: int, explicit: bool) -> None:
        if explicit:
            self.clean.reset()
            self.noisy.reset()
        elif self._recomputes and self.switch.frames == self.pending.stop:
            return  # frame 0 comes again
        self._new_video(batch)
        self.next_chunk(length, 0, 1)

    # What must hold

    @invariant()
    def stores_and_rules_agree(self) -> None:
        if getattr(self, "pending", None) is None:
            return
        for role, samples in self.past.items():
            expected = [[frame.name[0] for frame in past.stored] for past in samples]
            for store in (self.noisy, self.clean):
                assert store.frames(role) == expected, role
            for frames in expected:
                assert len(set(frames)) == len(frames), "no frame twice"
                assert all(frame < self.pending.start for frame in frames), "none from the future"
            room = role.capacity(len(self.pending))
            assert room is None or len(samples[0].stored) <= room
            for query in queries(role, self.pending):
                for phase in ("denoise", "clean"):
                    self._check_view(role, phase, query)
                self._check_compressed(role, query)

    def _check_view(self, role: HeadRole, phase: Phase, query: int | None) -> None:
        view, expected = (s.view(role, phase, encode, query) for s in (self.noisy, self.clean))
        assert (view.frames, view.positions) == (expected.frames, expected.positions)
        assert torch.equal(view.k, expected.k), role
        assert torch.equal(view.v, expected.v), role
        assert view.k.shape[3] == len(self.heads[role])
        own = [Frame(0, (number, self.take)) for number in self.pending]
        for sample, past in enumerate(self.past[role]):
            seen = past.attended(phase, query)
            names = [None if frame.chosen else frame.name[0] for frame in seen]
            assert view.frames == (*names, *self.pending), role
            assert list(view.positions) == past.positions(phase, query, WINDOW), role
            content = self._contents(role, sample, [*seen, *own])
            assert torch.equal(view.v[sample], -content), "values are those of the frames, as shot last"
            assert torch.equal(view.k[sample], encode(content, view.positions)), "and so are keys"
        assert view.positions[0] >= 0
        assert not bounded(role) or view.positions[-1] < WINDOW

    def _check_compressed(self, role: HeadRole, query: int | None) -> None:
        tokens, expected = (s.view_compressed(role, encode, query) for s in (self.noisy, self.clean))
        assert (tokens is None) == (expected is None)
        if tokens is not None:
            assert all(torch.equal(one, other) for one, other in zip(tokens, expected, strict=True))
            off = (tokens[0] + tokens[1]) / 1000.0
            assert torch.allclose(off, off.round(), atol=1e-4), "keys and values are of the same frames"
        for sample, past in enumerate(self.past[role]):
            values = None if tokens is None else -tokens[1][sample]
            check_compressed(role, past, values, functools.partial(self._contents, role, sample))

    @invariant()
    def marks_hold_what_they_name_and_no_more(self) -> None:
        if getattr(self, "pending", None) is None:
            return
        size = PATCHES * 4 * 4  # tokens, float32, D = 4
        held = sum(
            len(frames) * (2 * size * len(self.heads[role]) + 8)
            for marked in self.marks.values()
            for role, samples in marked.items()
            for frames in samples
        )
        for store in (self.noisy, self.clean):
            tensors = list(store.scenes.tensors())
            assert sum(t.numel() * t.element_size() for t in tensors) == held
            assert set(store.scenes.marks) == {*self.marks, *self.due}


STORY = [
    Switch("smooth"),
    Switch("cut", ("episodic",)),
    Switch("cut", ("sink",)),
    Switch("recache", frames=4),
    Switch("recall", mark="b"),
    Switch("recache", frames=1),
    Switch("smooth"),
    Switch("cut", ("sink", "episodic")),
    Switch("continue"),
    Switch("cut"),
]
ROLES = [
    *{role: None for row in USUAL for role in row},
    Rolling(7, 2),
    Strided(1, 1, 9, WINDOW, period=3, cap=2),
    Dilated(7, 2),
    Memory(1, 4, 2, clean_window=WINDOW),
    Anchor(3, 2, clean_window=WINDOW),
]


def tell_story(role: HeadRole, store: type[KVStore] = RingStore) -> None:
    """One role through all modes, always with the same chunks."""
    machine = type("Told", (VideoMachine,), {"store": store})()
    machine.start(row=[role], usual=[], batch=2, seed=0, lengths=[3, 3, 1, 2, 3, 4, 3])
    for switch in STORY:
        machine.ask(Switch("cut"))  # the last one asked for counts
        machine.change_scene(switch, [3, 4, 2, 3])


def tell_every_story() -> None:
    for role in ROLES:
        tell_story(role)


def check_compressed(
    role: HeadRole, past: Head, values: Tensor | None, contents: Callable[[list[Frame]], Tensor]
) -> None:
    """Compressed tokens `[m, Hr, D]` are of the frames that the rule names, as `contents` has them."""
    if isinstance(past, oracle.Veil):
        _same(values, [_squares(contents(block), role.patch) for block in past.blocks()])
    elif isinstance(past, oracle.Averaging):
        slow = fast = None
        for frames in past.averaged():
            mean = contents(frames).double().mean((0, 1))
            slow, fast = (
                mean if old is None else weight * mean + (1 - weight) * old
                for old, weight in ((slow, role.slow), (fast, role.fast))
            )
        _same(values, [x.expand(PATCHES, -1, -1) for x in (slow, fast) if x is not None])
    elif isinstance(past, oracle.EmaSink) and past.evicted:
        first, evicted = past.mixed()
        sink = contents(first)
        for frames in evicted:
            gone = contents(frames)[: role.sink]
            if len(frames) == role.sink:
                sink = role.alpha * sink + (1 - role.alpha) * gone
            else:
                sink = torch.cat([gone, sink[len(gone) :]])
        _same(values, [sink.flatten(0, 1)])
    elif isinstance(past, oracle.Dynamic) and past.cut():
        bands = contents(past.cut()).unflatten(1, (role.pieces, -1)).flatten(0, 1)
        assert values.shape[0] == PATCHES
        _are_some_of(values.unflatten(0, (role.pieces, -1)).flatten(1, 2), bands.flatten(1, 2))
    elif isinstance(past, oracle.Participating) and past.between():
        tokens = contents(past.between()).flatten(0, 1)
        assert len(values) == min(role.chosen * PATCHES, len(tokens))
        _are_some_of(values, tokens)
    else:
        assert values is None, role


def _same(values: Tensor | None, expected: list[Tensor]) -> None:
    assert (values is None) == (not expected)
    if values is not None:
        torch.testing.assert_close(values.double(), torch.cat(expected).double(), atol=1e-4, rtol=1e-4)


def _are_some_of(parts: Tensor, every: Tensor) -> None:
    found = (parts[:, None] == every).flatten(2).all(2)
    assert found.any(1).all(), "of frames that the rule names"
    rows = found.int().argmax(1).tolist()
    assert rows == sorted(set(rows)), "in order, none twice"


def _squares(frames: Tensor, side: int) -> Tensor:
    """The mean over frames `[n, P, Hr, D]` and squares of patches."""
    rows, columns = (range(0, length, side) for length in GRID)
    grid = frames.double().unflatten(1, GRID)
    return torch.stack([grid[:, r : r + side, c : c + side].mean((0, 1, 2)) for r in rows for c in columns])
