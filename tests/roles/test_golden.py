"""Golden frame sets: what every head of every preset sees, chunk by chunk, against one plain rule each.

The rules below know frames, numbers and Python lists, and nothing of roles. Keys are values here, and say
which frame they are of, so that whatever is seen of the wrong frame, or twice, or not at all, is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from headforcing.measure.memory import steady
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.maps.preset import Preset
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from headforcing.stores import STORES, store_class
from headforcing.stores.ring import RingStore
from headforcing.types import Chunk, Heads

WINDOW, CHUNKS = 21, 71
LENGTHS = (3, 1)
GRID, PATCHES, NOISE = (6, 4), 24, 4


def video(frames: int) -> torch.Tensor:
    """Keys, which are also values, `[frames, patches, channels]`: frame, patch, and random numbers."""
    x = torch.randn(frames, PATCHES, 2 + NOISE, generator=torch.Generator().manual_seed(5))
    x[..., 0] = torch.arange(frames)[:, None] / 64
    x[..., 1] = torch.arange(PATCHES) / 64
    return x


@dataclass
class Past:
    """What a rule may look at: the video until the chunk that begins at `start`, in chunks of `chunk`."""

    video: torch.Tensor
    start: int
    chunk: int

    @property
    def frames(self) -> range:
        """Every frame there was."""
        return range(self.start)

    @property
    def last(self) -> list[int]:
        """The last frame, if any."""
        return list(self.frames[-1:])


@dataclass
class Sees:
    """Whole frames of the past, and tokens beside them."""

    frames: Sequence[int]
    beside: torch.Tensor | None = None


Rule = Callable[[Past, int], Sees]
"""What a query frame sees of the past."""


# The rules ----------------------------------------------------------------------------------------


def everything(past: Past, query: int) -> Sees:
    return Sees(past.frames)


def last_of_window(past: Past, query: int) -> Sees:
    """The last 21 frames, the current chunk among them."""
    return Sees([f for f in past.frames if f >= past.start + past.chunk - 21])


def sink_and_last(sink: int, window: int) -> Rule:
    """The first frames, and the last ones: so many in all, the current chunk among them."""

    def rule(past: Past, query: int) -> Sees:
        first = past.start + past.chunk - (window - sink)
        return Sees([f for f in past.frames if f < sink or f >= first])

    return rule


def streaming(past: Past, query: int) -> Sees:
    """The first chunk is the sink."""
    return sink_and_last(past.chunk, 21)(past, query)


def infinity_rope(past: Past, query: int) -> Sees:
    """Frame 0, and five frames that end with the current chunk: the last two, for a chunk of three."""
    behind = {3: 2, 1: 4}[past.chunk]
    return Sees(sorted({0, *past.frames[-behind:]} & set(past.frames)))


def first_frame(past: Past, query: int) -> Sees:
    return Sees(past.frames[:1])


def last_frame(past: Past, query: int) -> Sees:
    return Sees(past.last)


def first_and_last_frame(past: Past, query: int) -> Sees:
    return Sees(sorted({*past.frames[:1], *past.last}))


def last_chunk(past: Past, query: int) -> Sees:
    return Sees([f for f in past.frames if f >= past.start - past.chunk])


def cycle(sink: int, phase: Callable[[int], int]) -> Rule:
    """The last four frames of one phase out of six, but none of the first ones or the last one."""

    def rule(past: Past, query: int) -> Sees:
        ends = {*past.frames[:sink], *past.last}
        middle = [f for f in past.frames if f % 6 == phase(query) and f not in ends]
        return Sees(sorted({*ends, *middle[-4:]}))

    return rule


def veil(past: Past, query: int) -> Sees:
    """The last four complete blocks of four frames, but for one that touches the last frame."""
    complete = [range(first, first + 4) for first in range(0, past.start - 3, 4)][-4:]
    blocks = [block for block in complete if past.start - 1 not in block]
    tokens = []
    for block in blocks:
        for top in range(0, GRID[0], 2):
            for left in range(0, GRID[1], 2):
                square = [row * GRID[1] + column for row in (top, top + 1) for column in (left, left + 1)]
                tokens.append(torch.stack([past.video[f, p] for f in block for p in square]).mean(0))
    return Sees(sorted({*past.frames[:3], *past.last}), torch.stack(tokens) if tokens else None)


def moving_pieces(past: Past, query: int) -> Sees:
    """A sixth of a frame at a time, six times: what is least like the next frame, of those just finished."""
    ends = first_and_last_frame(past, query)
    if past.start < 3 * past.chunk:
        return ends
    scores = {}
    for frame in range(past.start - past.chunk - 1, past.start - 1):
        for piece in range(6):
            tokens = range(4 * piece, 4 * piece + 4)
            alike = [
                torch.cosine_similarity(*past.video[frame : frame + 2, p].double(), dim=0) for p in tokens
            ]
            scores[frame, piece] = sum(alike) / 4
    chosen = sorted(sorted(scores, key=scores.__getitem__)[:6])
    return Sees(ends.frames, torch.cat([past.video[f, 4 * p : 4 * p + 4] for f, p in chosen]))


def averages(past: Past, query: int) -> Sees:
    """Three first frames, two averages and the rest of twelve; frames 3 and 4 are in no average."""
    recent = 12 - 3 - 2 - past.chunk
    if past.start + past.chunk <= 12:
        return Sees(past.frames)
    slow = fast = None
    for start in range(0, past.start + 1, past.chunk):
        if start + past.chunk <= 12:
            continue
        left = range(max(3, start - past.chunk - recent) if slow is not None else 5, start - recent)
        mean = past.video[left.start : left.stop].double().mean((0, 1))
        slow = mean if slow is None else 0.99 * slow + 0.01 * mean
        fast = mean if fast is None else 0.9 * fast + 0.1 * mean
    beside = torch.stack([slow, fast])[:, None].expand(-1, PATCHES, -1).flatten(0, 1)
    return Sees([*range(3), *range(past.start - recent, past.start)], beside.float())


def asked_for(past: Past, query: int) -> Sees:
    """Ten first frames, two frames of tokens, last ones; tokens are chosen whenever 21 frames are too few."""
    whole: list[int] = []
    chosen: list[tuple[int, int]] = []
    for start in range(0, past.start + 1, past.chunk):
        if len(whole) + (2 if chosen else 0) + past.chunk > 21:
            last = whole[len(whole) - max(4 - past.chunk, 0) :]
            gone = [f for f in whole if f >= 10 and f not in last]
            asked = past.video[start - 4 : start].double().sum((0, 1))
            among = chosen + [(f, p) for f in gone for p in range(PATCHES)]
            every = (past.video[:start].double() @ asked).tolist()
            scores = {(f, p): every[f][p] for f, p in among}
            chosen = sorted(sorted(among, key=lambda at: -scores[at])[: 2 * PATCHES])
            whole = [*range(10), *last]
        if start < past.start:
            whole = [*whole, *range(start, start + past.chunk)]
    return Sees(whole, torch.stack([past.video[f, p] for f, p in chosen])) if chosen else Sees(whole)


def memory_of(chunk: int) -> Rule:
    """First frame, last ones, and between them those chosen one by one as frames leave the last ones.

    The two that are most alike, by the mean cosine of the same patch, are told apart by the next most alike
    frame of the others: the one that is nearer to it goes.
    """
    chosen_places, recent = {3: (8, 9), 1: (9, 10)}[chunk]
    chosen: list[int] = []
    joined = [1]

    def rule(past: Past, query: int) -> Sees:
        def alike(a: int, b: int) -> float:
            return float(torch.cosine_similarity(past.video[a], past.video[b], dim=-1).mean())

        for frame in range(joined[0], past.start - recent):
            joined[0] = frame + 1
            chosen.append(frame)
            if len(chosen) > chosen_places:
                table = {(a, b): alike(a, b) for a in chosen for b in chosen if a != b}
                pair = max(table, key=table.__getitem__)
                rest = [f for f in chosen if f not in pair]
                chosen.remove(max(pair, key=lambda f: max(table[f, g] for g in rest)))
        return Sees([*past.frames[:1], *chosen, *range(max(1, past.start - recent), past.start)])

    return rule


RULES: dict[tuple[str, str], Callable[[int], Rule]] = {
    ("full", "all"): lambda _: everything,
    ("sliding_window", "all"): lambda _: last_of_window,
    ("streaming_llm", "all"): lambda _: streaming,
    ("infinity_rope", "all"): lambda _: infinity_rope,
    ("memrope", "all"): lambda _: averages,
    ("deep_forcing", "all"): lambda _: asked_for,
    ("head_forcing", "anchor"): lambda _: first_frame,
    ("head_forcing", "local"): lambda _: last_frame,
    ("head_forcing", "memory"): memory_of,
    ("pyramid_forcing", "wave"): lambda _: cycle(1, lambda query: query % 6),
    ("pyramid_forcing", "anchor"): lambda _: cycle(3, lambda query: 0),
    ("pyramid_forcing", "veil"): lambda _: veil,
    ("dummy_forcing", "sink"): lambda _: first_frame,
    ("dummy_forcing", "neighbour"): lambda _: last_chunk,
    ("dummy_forcing", "dummy"): lambda _: last_frame,
    ("forcing_kv", "static"): lambda _: first_and_last_frame,
    ("forcing_kv", "dynamic"): lambda _: moving_pieces,
}
"""A rule for every label of every preset, for a length of chunks."""


# The check ----------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a store showed: frames of the view, and tokens beside them."""

    query: int
    past: Past
    frames: list[int]
    beside: torch.Tensor | None


def shown(role: HeadRole, chunk: int, store: Any, chunks: int = CHUNKS) -> Iterator[Seen]:
    """Everything that is seen, of a noisy run."""
    role = role.fit(WINDOW, chunk)
    made = store({role: Heads(range(1), 1)}, window=WINDOW, layer=0)
    x = video(chunks * chunk)
    for start in range(0, len(x), chunk):
        own = x[None, start : start + chunk, :, None]
        for noise in (2.0, -1.0, 0.0):
            k, v = own + noise, own + noise**2
            made.write(Chunk(start, k, v, GRID, k))
            for query in range(start, start + chunk):
                asked = query if "query" in role.depends_on else None
                view = made.view(role, "denoise", as_it_is, asked)
                beside = made.view_compressed(role, as_it_is, asked)
                past, held = Past(x, start, chunk), len(view.positions) - chunk
                if noise == 0.0:
                    assert torch.equal(view.k, view.v), "keys and values are of the same frames"
                    assert torch.equal(view.v[0, held:, :, 0], own[0, :, :, 0])
                else:
                    assert torch.equal(view.k[:, held:], k), "the current chunk as this pass wrote it"
                    assert torch.equal(view.v[:, held:], v)
                    assert torch.equal(view.k[:, :held], view.v[:, :held])
                frames = (64 * view.v[0, :held, 0, 0, 0]).tolist()
                assert all(frame == int(frame) for frame in frames)
                told = [frame for frame in view.frames if frame is not None]
                assert set(told) <= {*frames, *range(start, start + chunk)}
                assert torch.equal(view.v[0, :held, :, 0], x[[int(frame) for frame in frames]])
                if beside is not None:
                    assert torch.equal(*beside)
                yield Seen(
                    query, past, [int(f) for f in frames], None if beside is None else beside[1][0, :, 0]
                )


def as_it_is(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x


def check_role(role: HeadRole, rule: Rule, chunk: int, store: Any, chunks: int = CHUNKS) -> int:
    """Every query frame of every pass sees what the rule says; how many tokens beside frames there were."""
    tokens, known = 0, {}
    for seen in shown(role, chunk, store, chunks):
        now = (seen.past.start, seen.query)
        if now not in known:
            known[now] = rule(seen.past, seen.query)
        expected = known[now]
        assert seen.frames == list(expected.frames), now
        assert len(set(seen.frames)) == len(seen.frames)
        assert (seen.beside is None) == (expected.beside is None), now
        if expected.beside is not None:
            torch.testing.assert_close(seen.beside, expected.beside, atol=1e-5, rtol=0)
            tokens += len(expected.beside)
    return tokens


def check_complete(presets: Mapping[str, Preset]) -> None:
    """Every label of every preset has a rule, and every rule a label."""
    labels = {
        (n, label) for n, preset in presets.items() for c in LENGTHS for label in preset.roles(WINDOW, c)
    }
    assert labels == set(RULES)


LONG = [
    pytest.param(chunk, store, CHUNKS, marks=pytest.mark.slow)
    for chunk in LENGTHS
    for store in STORES
    if (chunk, store) != (1, "lean")
]


@pytest.mark.parametrize(("chunk", "store", "chunks"), [(3, "ring", 36), (1, "lean", CHUNKS), *LONG])
@pytest.mark.parametrize(("name", "label"), RULES)
def test_every_head_of_every_preset_sees_what_its_rule_says(name, label, chunk, store, chunks):
    role = PRESETS[name].roles(WINDOW, chunk)[label]
    tokens = check_role(role, RULES[name, label](chunk), chunk, store_class(store), chunks)
    assert bool(tokens) == (role.compressed() is not None)


def test_no_preset_is_without_a_rule():
    check_complete(PRESETS)


def test_a_preset_without_a_rule_is_found():
    with pytest.raises(AssertionError):
        check_complete({**PRESETS, "new": replace(PRESETS["full"], name="new")})
    with pytest.raises(AssertionError):
        check_complete({name: preset for name, preset in PRESETS.items() if name != "memrope"})


# Planted bugs -------------------------------------------------------------------------------------


class Late(RingStore):
    """Shows the values of the pass before."""

    def _stage(self, chunk: Chunk) -> None:
        other = getattr(self, "values", chunk)
        super()._stage(replace(chunk, v=other.v) if other.start == chunk.start else chunk)
        self.values = chunk


class Noisy(RingStore):
    """Commits the first pass over a chunk."""

    def _stage(self, chunk: Chunk) -> None:
        first = getattr(self, "first", chunk)
        self.first = first if first.start == chunk.start else chunk
        super()._stage(chunk)

    def _commit_before(self, start: int) -> None:
        super()._stage(self.first)
        super()._commit_before(start)


class Shifted(RingStore):
    """Moves values by a row whenever it moves keys."""

    def _begin(self, own: range) -> None:
        super()._begin(own)
        for bank in self._banks.values():
            if bank.frames:
                bank._v[:, : len(bank.frames)] = bank._v[:, : len(bank.frames)].roll(1, 1)


@pytest.mark.parametrize("store", [Late, Noisy, Shifted], ids=lambda store: store.__name__)
@pytest.mark.parametrize(("name", "label"), [("infinity_rope", "all"), ("pyramid_forcing", "wave")])
def test_a_store_with_a_bug_is_found(store, name, label):
    role = PRESETS[name].roles(WINDOW, 3)[label]
    with pytest.raises(AssertionError):
        check_role(role, RULES[name, label](3), 3, store)


WRONG: dict[tuple[str, str], list[HeadRole]] = {
    ("sliding_window", "all"): [SlidingWindow(20), SlidingWindow(21, sink=1)],
    ("streaming_llm", "all"): [SlidingWindow(21, sink=2), SlidingWindow(20, sink=3)],
    ("infinity_rope", "all"): [SlidingWindow(6, sink=2), SlidingWindow(7, sink=1)],
    ("memrope", "all"): [Averaging(slow=0.02), Averaging(fast=0.2), Averaging(sink=2), Averaging(13)],
    ("deep_forcing", "all"): [
        SlidingWindow(21, sink=10),
        Participating(sink=9),
        Participating(recent=5),
        Participating(chosen=3),
        Participating(20),
    ],
    ("head_forcing", "anchor"): [Anchor(2), Anchor(1, 1)],
    ("head_forcing", "local"): [Local(2), Local(1, sink=1)],
    ("head_forcing", "memory"): [Memory(1, 9, 8), Memory(2, 8, 8)],
    ("pyramid_forcing", "wave"): [Wave(cap=3), Wave(period=5), Wave(sink=2), Wave(recent=2), Strided(sink=1)],
    ("pyramid_forcing", "anchor"): [Strided(cap=5), Strided(period=7), Strided(sink=2), Wave(sink=3)],
    ("pyramid_forcing", "veil"): [Veil(blocks=3), Veil(recent=2), Veil(block=3), Veil(patch=1), Veil(sink=1)],
    ("dummy_forcing", "neighbour"): [Local(2), Local(4)],
    ("forcing_kv", "static"): [Local(1), Local(2, sink=1), Local(1, sink=2)],
    ("forcing_kv", "dynamic"): [Dynamic(pieces=4), Dynamic(skip=1), Dynamic(skip=3), Dynamic(sink=2)],
}


@pytest.mark.parametrize(("name", "label"), WRONG)
def test_a_role_with_other_numbers_is_found(name, label):
    for role in WRONG[name, label]:
        with pytest.raises(AssertionError):
            check_role(role, RULES[name, label](3), 3, RingStore)


# Tables by hand: third-party arithmetic on the released configurations -----------------------------


def at(name: str, label: str, start: int, chunk: int = 3, store: str = "ring") -> list[Seen]:
    """What every query frame of one chunk sees in its clean pass."""
    role = PRESETS[name].roles(WINDOW, chunk)[label]
    found = shown(role, chunk, store_class(store), start // chunk + 1)
    return [seen for seen in found if seen.past.start == start][-chunk:]


SIXTY = {
    ("full", "all"): [*range(60)],
    ("sliding_window", "all"): [*range(42, 60)],
    ("streaming_llm", "all"): [0, 1, 2, *range(45, 60)],
    ("infinity_rope", "all"): [0, 58, 59],
    ("memrope", "all"): [0, 1, 2, 56, 57, 58, 59],
    ("deep_forcing", "all"): [*range(10), 56, 57, 58, 59],
    ("head_forcing", "anchor"): [0],
    ("head_forcing", "local"): [59],
    ("pyramid_forcing", "anchor"): [0, 1, 2, 36, 42, 48, 54, 59],
    ("pyramid_forcing", "veil"): [0, 1, 2, 59],
    ("dummy_forcing", "sink"): [0],
    ("dummy_forcing", "neighbour"): [57, 58, 59],
    ("dummy_forcing", "dummy"): [59],
    ("forcing_kv", "static"): [0, 59],
    ("forcing_kv", "dynamic"): [0, 59],
}
"""Whole frames that the chunk of frames 60 to 62 sees beside itself."""


@pytest.mark.parametrize("store", ["reference", pytest.param("lean", marks=pytest.mark.slow), "ring"])
@pytest.mark.parametrize(("name", "label"), SIXTY)
def test_the_table_of_frame_sixty(name, label, store):
    assert [seen.frames for seen in at(name, label, 60, store=store)] == [SIXTY[name, label]] * 3


WAVES = {
    3: [[], [], []],
    6: [[], [1], [2]],
    9: [[3], [4], [5]],
    12: [[6], [1, 7], [2, 8]],
    21: [[3, 9, 15], [4, 10, 16], [5, 11, 17]],
    24: [[6, 12, 18], [1, 7, 13, 19], [2, 8, 14, 20]],
    27: [[3, 9, 15, 21], [4, 10, 16, 22], [5, 11, 17, 23]],
    60: [[36, 42, 48, 54], [37, 43, 49, 55], [38, 44, 50, 56]],
    63: [[39, 45, 51, 57], [40, 46, 52, 58], [41, 47, 53, 59]],
}
ANCHORS = {
    3: [],
    6: [],
    9: [6],
    12: [6],
    21: [6, 12, 18],
    24: [6, 12, 18],
    27: [6, 12, 18, 24],
    60: [36, 42, 48, 54],
    63: [42, 48, 54, 60],
}
VEILS = {
    3: [],
    6: [0],
    9: [0, 4],
    12: [0, 4],
    21: [4, 8, 12, 16],
    24: [8, 12, 16],
    27: [8, 12, 16, 20],
    60: [44, 48, 52],
    63: [44, 48, 52, 56],
}


@pytest.mark.parametrize("start", WAVES)
def test_the_tables_of_pyramid_forcing(start):
    """By start of the chunk: frames of the middle, and first frames of merged blocks."""
    waves, anchors, veils = (at("pyramid_forcing", label, start) for label in ("wave", "anchor", "veil"))
    for wave, middle in zip(waves, WAVES[start], strict=True):
        assert wave.frames == [0, *middle, start - 1]
    for seen in anchors:
        assert seen.frames == sorted({0, 1, 2, *ANCHORS[start], start - 1})
    for seen in veils:
        assert seen.frames == sorted({0, 1, 2, start - 1})
        merged = [] if seen.beside is None else seen.beside.unflatten(0, (-1, PATCHES // 4))[:, 0, 0] * 64
        assert [float(mean) for mean in merged] == [first + 1.5 for first in VEILS[start]]


def test_the_pieces_of_forcing_kv_at_frame_sixty():
    """Six of the eighteen pieces of frames 56 to 58, each whole; none before frame 9."""
    for start in (0, 3, 6):
        assert all(seen.beside is None for seen in at("forcing_kv", "dynamic", start))
    for start in (9, 60):
        (tokens,) = {tuple(map(tuple, seen.beside.tolist())) for seen in at("forcing_kv", "dynamic", start)}
        assert len(tokens) == PATCHES
        found = [(round(64 * token[0]), round(64 * token[1])) for token in tokens]
        assert found == sorted(set(found)), "in order of time and space, none twice"
        assert {frame for frame, _ in found} <= {start - 4, start - 3, start - 2}
        for piece in range(6):
            (frame, first), *others = found[4 * piece : 4 * piece + 4]
            assert first % 4 == 0
            assert others == [(frame, first + patch) for patch in (1, 2, 3)]


# Published counts ---------------------------------------------------------------------------------


def means(name: str, what: str, heads: Mapping[str, int] | None = None) -> float:
    """Mean over the published heads of what a role stores or sees, current chunk of three included."""
    preset = PRESETS[name]
    heads = dict(heads or preset.published)
    roles = preset.roles(WINDOW, 3)
    found = {label: getattr(steady(roles[label].fit(WINDOW, 3), WINDOW, 3), what) for label in heads}
    return float(sum(found[label] * count for label, count in heads.items()) / sum(heads.values()))


def test_the_published_means_of_pyramid_forcing():
    """9.87 is published as if a veil always saw four blocks; in one chunk of four it sees three."""
    assert PRESETS["pyramid_forcing"].published == {"wave": 156, "anchor": 172, "veil": 32}
    assert means("pyramid_forcing", "most") == pytest.approx(9.87, abs=0.005)
    assert means("pyramid_forcing", "most", {"veil": 32}) == 8
    assert means("pyramid_forcing", "attended") == pytest.approx(9.86, abs=0.005)
    assert means("pyramid_forcing", "attended", {"veil": 32}) == 7.9375
    assert means("pyramid_forcing", "stored") == pytest.approx(
        18.53, abs=0.02
    )  # 18.5, blocks under way apart
    assert means("pyramid_forcing", "stored", {"veil": 32}) == 8 + 3 / 16


def test_the_published_means_of_forcing_kv():
    """2.61 stored frames are published, without the current chunk; here comes a copy of the last one."""
    assert PRESETS["forcing_kv"].published == {"static": 141, "dynamic": 219}
    assert means("forcing_kv", "attended") == pytest.approx(5.61, abs=0.005)
    copies = 219 / 360
    assert means("forcing_kv", "stored") - 3 - copies == pytest.approx(2.61, abs=0.005)


@pytest.mark.parametrize(
    ("name", "label", "stored", "attended"),
    [
        ("dummy_forcing", "sink", 1, 4),
        ("dummy_forcing", "neighbour", 3, 6),
        ("dummy_forcing", "dummy", 1, 4),
        ("forcing_kv", "static", 2, 5),
        ("pyramid_forcing", "wave", 26, 9),
        ("pyramid_forcing", "anchor", 8, 11),
        ("infinity_rope", "all", 3, 6),
        ("memrope", "all", 7, 12),
        ("streaming_llm", "all", 18, 21),
    ],
)
def test_the_table_of_frames_stored_and_seen(name, label, stored, attended):
    """Stored without the current chunk of three, seen with it; 29 and 11 frames are published with it."""
    assert means(name, "stored", {label: 1}) == pytest.approx(stored + 3, abs=0.001)  # averages: 2 tokens
    assert means(name, "attended", {label: 1}) == attended


def test_deep_forcing_sees_sixteen_and_nineteen_frames_in_turn():
    assert means("deep_forcing", "attended", {"all": 1}) == (16 + 19) / 2
    assert means("deep_forcing", "most", {"all": 1}) == 19
