"""MemRoPE's averages: the released rule on lists of frames, for any window, sink, weights and chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.model.pipeline import NOISE_LEVELS, DemoPipeline
from headforcing.demo.world.scene import sample_scene
from headforcing.errors import RoleError, WindowError
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.maps.role_map import RoleMap
from headforcing.roles.memrope import Averages, Averaging
from headforcing.stores import STORES, store_class
from headforcing.types import Chunk, Heads
from tests.examples import examples
from tests.strategies import frame_tensor

PATCHES, HEADS, DIM, WINDOW = 3, 2, 4, 21


def turn(x: torch.Tensor, positions: Any, *_: int) -> torch.Tensor:
    """Stands for RoPE: exact, and different for every position."""
    return x + 100.0 * torch.tensor(list(positions), dtype=x.dtype)[:, None, None, None]


def drawn(frames: range, seed: int, batch: int) -> torch.Tensor:
    return frame_tensor(frames, seed, batch, HEADS, PATCHES, DIM)


class Rule:
    """The released rule for one video: which frames are held, and two averages `[P, H, D]` in float64."""

    def __init__(self, window: int, sink: int, slow: float, fast: float, frames: Any) -> None:
        self.window, self.sink, self.weights, self.frames = window, sink, (slow, fast), frames
        self.held: list[int] = []
        self.averages: list[torch.Tensor] | None = None  # keys and values one behind the other
        self.fits = True

    def begin(self, new: list[int], chunk: int) -> None:
        self.held += new
        self.fits = self.fits and len(self.held) + chunk <= self.window
        if self.fits:
            return
        first, behind = self.held[: self.sink], self.held[self.sink :]
        recent = self.window - chunk - 2 - self.sink
        gone = behind[: max(0, len(behind) - recent)]
        self.held = first + behind[len(gone) :]
        if not gone:
            return
        if self.averages is None:
            gone = gone[2:] if len(gone) > 2 else gone[-1:]
        mean = sum(self.frames(frame).mean(0) for frame in gone) / len(gone)  # over patches, then frames
        if self.averages is None:
            self.averages = [mean, mean]
        else:
            pairs = zip(self.weights, self.averages, strict=True)
            self.averages = [w * mean + (1 - w) * old for w, old in pairs]


def check_averages(role: Averaging, steps: list[tuple[int, int]], store: str, batch: int = 1) -> Rule:
    """A noisy run against the rule; `steps` are lengths of chunks and what the next one takes back."""
    made = store_class(store)({role: Heads(range(HEADS), HEADS)}, window=WINDOW, layer=0)

    def both(sample: int) -> Any:
        def frames(frame: int) -> torch.Tensor:
            sides = [drawn(range(frame, frame + 1), seed, batch) for seed in (0, 1)]
            return torch.stack([side[sample, 0] for side in sides], 1).double()  # [P, 2, H, D]

        return frames

    rules = [Rule(role.window, role.sink, role.slow, role.fast, both(sample)) for sample in range(batch)]
    start, before = 0, 0
    for length, overlap in steps:
        frames = range(start, start + length)
        k, v = (drawn(frames, seed, batch) for seed in (0, 1))
        for rule in rules:
            rule.begin(list(range(before, start)), length)
        for noise in (3.0, -7.0, 0.0):
            made.write(Chunk(start, k + noise, v + 2 * noise))
            view, tokens = made.view(role, "denoise", turn), made.view_compressed(role, turn)
            held = rules[0].held
            assert list(view.frames) == [*held, *frames]
            assert made.frames(role) == [rule.held for rule in rules]
            shift = 0 if rules[0].averages is None else 2
            places = [rank if rank < role.sink else rank + shift for rank in range(len(view.frames))]
            assert list(view.positions) == places
            assert places[-1] < role.window
            assert shift or tokens is None
            for sample, rule in enumerate(rules):
                if shift:
                    seen = [x[sample].unflatten(0, (2, PATCHES)).double() for x in tokens]
                    for x in seen:
                        assert torch.equal(x, x[:, :1].expand_as(x)), "the same at every patch"
                    for which, place in enumerate((role.sink, role.sink + 1)):
                        key, value = rule.averages[which]
                        torch.testing.assert_close(seen[0][which, 0], key + 100.0 * place, atol=1e-4, rtol=0)
                        torch.testing.assert_close(seen[1][which, 0], value, atol=1e-5, rtol=0)
        before, start = start, start + length - min(overlap, length - 1)
    return rules[0]


@st.composite
def averagings(draw: Any, longest: int = 4) -> Averaging:
    sink = draw(st.integers(0, 4))
    window = draw(st.integers(sink + 2 + longest, 16))
    weight = st.floats(0.001, 1.0)
    return Averaging(window, sink, draw(weight), draw(weight))


alone = st.tuples(st.integers(1, 4), st.just(0))


@settings(max_examples=examples(20, nightly=400))
@given(averagings(), st.lists(alone, min_size=8, max_size=14), st.sampled_from(sorted(STORES)))
def test_averages_are_those_of_the_rule(role, steps, store):
    check_averages(role, steps, store)


@settings(max_examples=examples(20, nightly=400))
@given(
    averagings(),
    st.lists(st.tuples(st.integers(2, 4), st.integers(0, 1)), min_size=8, max_size=12),
    st.sampled_from(sorted(STORES)),
)
def test_frames_that_a_chunk_takes_back_are_not_averaged(role, steps, store):
    check_averages(role, steps, store, batch=2)


@settings(max_examples=examples(15, nightly=300))
@given(averagings(), st.integers(1, 4), st.integers(0, 9))
def test_all_stores_see_the_same_bit_for_bit(role, chunk, seed):
    heads = {role: Heads(range(HEADS), HEADS)}
    stores = [store_class(name)(heads, window=WINDOW, layer=0) for name in STORES]
    for start in range(0, 12 * chunk, chunk):
        x = drawn(range(start, start + chunk), seed, 2)
        for noise in (1.0, 0.0):
            for store in stores:
                store.write(Chunk(start, x + noise, noise - x))
            one, *others = (store.view(role, "denoise", turn) for store in stores)
            for two in others:
                assert (one.frames, one.positions) == (two.frames, two.positions)
                assert torch.equal(one.k, two.k)
                assert torch.equal(one.v, two.v)
            first, *rest = (store.view_compressed(role, turn) for store in stores)
            for seen in rest:
                assert (first is None) == (seen is None)
                assert all(torch.equal(a, b) for a, b in zip(first or (), seen or (), strict=True))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("chunk", [1, 3])
def test_the_released_numbers_by_hand(store, chunk):
    """Chunk 3: frames 3 and 4 are lost, 5 to 7 are averaged first, three more in every chunk after."""
    role = Averaging()
    made = store_class(store)({role: Heads(range(1), 1)}, window=WINDOW, layer=0)
    found = {}
    for start in range(0, 30, chunk):
        x = torch.arange(start, start + chunk).float().view(1, chunk, 1, 1, 1).expand(-1, -1, PATCHES, -1, -1)
        made.write(Chunk(start, x + 50.0, x))
        made.write(Chunk(start, -x, x))
        view = made.view(role, "denoise", lambda x, _: x)
        asked: list[int] = []
        tokens = made.view_compressed(role, lambda x, positions, asked=asked: asked.extend(positions) or x)
        assert torch.equal(view.k, -view.v)
        averages = [] if tokens is None else tokens[1].unflatten(1, (2, PATCHES))[0, :, 0, 0, 0].tolist()
        assert not averages or tokens[0].flatten().tolist() == [-x for x in tokens[1].flatten().tolist()]
        found[start] = (view.frames, view.positions, tuple(asked), pytest.approx(averages, rel=1e-5))
    if chunk == 3:
        assert found[9] == (tuple(range(12)), tuple(range(12)), (), [])
        places = (0, 1, 2, 5, 6, 7, 8, 9, 10, 11)
        assert found[12] == ((0, 1, 2, *range(8, 15)), places, (3, 4), [6.0, 6.0])
        slow, fast = 0.99 * 6 + 0.01 * 9, 0.9 * 6 + 0.1 * 9
        assert found[15] == ((0, 1, 2, *range(11, 18)), places, (3, 4), [slow, fast])
        slow, fast = 0.99 * slow + 0.01 * 12, 0.9 * fast + 0.1 * 12
        assert found[18] == ((0, 1, 2, *range(14, 21)), places, (3, 4), [slow, fast])
    else:
        places = (0, 1, 2, *range(5, 12))
        assert found[11] == (tuple(range(12)), tuple(range(12)), (), [])
        assert found[12] == ((0, 1, 2, *range(6, 13)), places, (3, 4), [5.0, 5.0])
        assert found[13] == ((0, 1, 2, *range(7, 14)), places, (3, 4), [5 + 0.01, 5 + 0.1])


class Swapped(Averages):
    """With a bug: the slow average is the fast one."""

    def _averaged(self, held, x):
        return super()._averaged(None if held is None else held.flip(1), x).flip(1)


class Generous(Averages):
    """With a bug: nothing is lost at the first overflow."""

    def evicted(self, past):
        if self._both is None:
            self._both = self._averaged(None, past.k), self._averaged(None, past.v)
            self._kinds, self._patches = (past.k.dtype, past.v.dtype), past.k.shape[2]
        else:
            super().evicted(past)


class FrameByFrame(Averages):
    """With a bug: frames that leave together are taken in one by one."""

    def evicted(self, past):
        if self._both is None:
            return super().evicted(past)
        for index in range(past.k.shape[1]):
            one = slice(index, index + 1)
            super().evicted(type(past)(past.frames[one], past.k[:, one], past.v[:, one], None, 0, {}))
        return None


class Mixed(Averages):
    """With a bug: values are averages of keys."""

    def evicted(self, past):
        super().evicted(type(past)(past.frames, past.k, past.k, None, 0, {}))


class OneHead(Averages):
    """With a bug: all heads get the first one's."""

    def _averaged(self, held, x):
        return super()._averaged(held, x[..., :1, :].expand_as(x))


@dataclass(frozen=True)
class WithBug(Averaging):
    """Averages of another class."""

    kind: ClassVar[type[Averages]] = Averages

    def compressed(self):
        return self.kind(self)


class Keen(WithBug):
    """With a bug: averages before it must."""

    def retain(self, table):
        rows = len(table)
        return range(rows) if rows < 6 else sorted({*range(self.sink), *range(rows - 4, rows)})


class NoRoom(WithBug):
    """With a bug: keeps a frame more beside its averages than the window has room for."""

    def retain(self, table):
        kept = list(super().retain(table))
        return (
            kept if len(kept) == len(table) else [*range(self.sink), kept[self.sink] - 1, *kept[self.sink :]]
        )


@pytest.mark.parametrize(
    "broken",
    [type(k.__name__, (WithBug,), {"kind": k}) for k in (Swapped, Generous, FrameByFrame, Mixed, OneHead)]
    + [Keen, NoRoom],
    ids=lambda cls: cls.__name__,
)
def test_the_rule_catches_planted_bugs(broken):
    assert check_averages(WithBug(), [(3, 0)] * 8, "ring").averages is not None
    with pytest.raises((AssertionError, WindowError)):
        check_averages(broken(), [(3, 0)] * 8, "ring")


@pytest.mark.parametrize("store", STORES)
def test_what_noisy_passes_wrote_is_not_averaged(store):
    """Two runs, one with passes that write enormous numbers: the same bits."""
    role, found = Averaging(), []
    for noises in ((), (1e9, -1e9)):
        made = store_class(store)({role: Heads(range(1), 1)}, window=WINDOW, layer=0)
        for start in range(0, 30, 3):
            x = frame_tensor(range(start, start + 3), 0, 1, 1)
            for noise in noises:
                made.write(Chunk(start, x + noise, x * noise))
                made.view(role, "denoise", turn)
                made.view_compressed(role, turn)
            made.write(Chunk(start, x, -x))
        found.append(made.view_compressed(role, turn))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_bytes_stay_bounded_and_averages_stay_averages(store, dtype, chunks):
    role = Averaging()
    made = store_class(store)({role: Heads(range(1), 1)}, window=WINDOW, layer=0)
    sizes, x = set(), torch.full((1, 3, PATCHES, 1, DIM), 0.7, dtype=dtype)
    for start in range(0, 3 * chunks, 3):
        made.write(Chunk(start, x, -x))
        tokens = made.view_compressed(role, lambda x, _: x)
        if start >= 12:
            sizes.add(made.nbytes())
    assert len(sizes) == 1
    assert tokens[0].dtype == tokens[1].dtype == dtype
    torch.testing.assert_close(tokens[0], x[:, 0].repeat(1, 2, 1, 1))
    torch.testing.assert_close(tokens[1], -tokens[0])
    made.write(Chunk(0, x, x))
    assert made.view_compressed(role, turn) is None


def test_a_model_with_averages_matches_attention_written_out():
    model = DemoModel(DemoConfig(dim=64, heads=4, layers=2)).randomize(torch.Generator().manual_seed(0))
    model = model.eval().requires_grad_(False)
    role, rotate, checked = PRESETS["memrope"].roles(21, 3)["all"], find_adapter(model).rotate, 0
    committed: list[dict[int, Any]] = [{}, {}]
    rules: dict[int, tuple[int, Rule]] = {}

    def check(seen) -> None:
        nonlocal checked
        start, past = seen.call.start, committed[seen.layer]
        if start == 0:
            rules[seen.layer] = 0, Rule(12, 3, 0.01, 0.1, lambda f: past[f].transpose(0, 1).double())
        before, rule = rules[seen.layer]
        if before != start:
            rule.begin(list(range(before, start)), 3)
            rules[seen.layer] = start, rule
        (part,), (frames,), (positions,) = seen.parts, seen.frames, seen.positions
        assert list(frames) == [*rule.held, *range(start, start + 3)]
        own = torch.stack([seen.chunk.k, seen.chunk.v], 3)  # [B, F, P, 2, H, D]
        held = [past[frame][:, None] for frame in rule.held]
        k, v = torch.cat([*held, own], 1).unbind(3)
        k, v = rotate(k, seen.call, positions).flatten(1, 2), v.flatten(1, 2)
        if rule.averages is not None:
            both = torch.stack(rule.averages, 1).float()  # [B, slow and fast, 2, H, D]
            both = both[:, :, None].expand(-1, -1, seen.call.tokens_per_frame, -1, -1, -1)
            key, value = both.unbind(3)
            k = torch.cat([rotate(key, seen.call, [3, 4]).flatten(1, 2), k], 1)
            v = torch.cat([value.flatten(1, 2), v], 1)
            checked += 1
        logits = torch.einsum("blhd,bmhd->bhlm", part.q, k) / part.q.shape[-1] ** 0.5
        expected = torch.einsum("bhlm,bmhd->blhd", logits.softmax(-1), v)
        torch.testing.assert_close(seen.out, expected, atol=1e-4, rtol=1e-4)
        for index, frame in enumerate(seen.chunk.frames):  # the last pass over a chunk is what stays
            past[frame] = own[:, index]

    prompts = sample_scene(2, torch.Generator().manual_seed(1)).prompts(torch.arange(9))
    with hf.apply_head_forcing(model, "memrope") as handle, handle.observe(check):
        fast = DemoPipeline(model).generate(prompts, generator=torch.Generator().manual_seed(2))
    assert checked == 5 * (1 + len(NOISE_LEVELS)) * 2
    with hf.apply_head_forcing(model, role, store="reference"):
        slow = DemoPipeline(model).generate(prompts, generator=torch.Generator().manual_seed(2))
    assert torch.equal(fast, slow)


@given(averagings(), st.integers(1, 20))
def test_a_role_that_fits_never_asks_for_more_places_than_its_window(role, chunk):
    try:
        role.fit(WINDOW, chunk)
    except WindowError:
        assert role.window < role.sink + 2 + chunk or role.window > WINDOW
        return
    assert role.sink + 2 + chunk <= role.window <= WINDOW
    assume(chunk <= 6)
    check_averages(role, [(chunk, 0)] * 6, "reference")


@pytest.mark.parametrize(
    "wrong", [{"positions": "absolute"}, {"slow": 0.0}, {"fast": 1.5}, {"slow": 1}, {"window": -1}]
)
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RoleError):
        Averaging(**wrong)


def test_averages_survive_a_file():
    one = RoleMap(((Averaging(10, 2, 0.05, 0.5), Averaging(slow=0.1 + 0.2)),))
    two = RoleMap.from_json(one.to_json())
    assert two == one
    assert hash(two) == hash(one)
