"""EMA-Sink: a rolled list of frames whose first ones change, for any window, sink, weight and chunks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import headforcing as hf
from headforcing.errors import RoleError, WindowError
from headforcing.roles import SlidingWindow
from headforcing.roles.maps.role_map import RoleMap
from headforcing.roles.reward_forcing import EmaSink, MixedSink
from headforcing.stores import STORES, store_class
from headforcing.types import Chunk, Heads
from tests.examples import examples
from tests.hosts.reward_forcing import RewardForcingHost
from tests.strategies import frame_tensor

PATCHES, HEADS, DIM, WINDOW = 3, 2, 4, 21
Both = tuple[Tensor, Tensor]
"""Keys before RoPE, and values."""


def turn(x: Tensor, positions: Any, *_: int) -> Tensor:
    """Stands for RoPE: different for every position."""
    return x + 100.0 * torch.tensor(list(positions), dtype=x.dtype)[:, None, None, None]


class Rule:
    """One cache of `window` slots: its frames, and what of them was changed, `[B, P, H, D]` each."""

    def __init__(self, window: int, sink: int, alpha: float) -> None:
        self.window, self.sink, self.alpha = window, sink, alpha
        self.slots: list[Both] = []
        self.evictions: list[int] = []

    def begin(self, length: int) -> None:
        """A chunk begins; those before it are finished."""
        over = length + len(self.slots) - self.window
        if over <= 0:
            return
        self.evictions.append(over)
        first, gone = self.slots[: self.sink], self.slots[self.sink : self.sink + over]
        if over == self.sink:
            first = [
                tuple(self.alpha * x + (1 - self.alpha) * y for x, y in zip(one, other, strict=True))
                for one, other in zip(first, gone, strict=True)
            ]
        else:
            first[:over] = gone[: self.sink]
        self.slots = first + self.slots[self.sink + over :]

    def seen(self, own: list[Both]) -> Both:
        """All that a pass over the frames `own` attends to, `[B, tokens, H, D]`; keys rotated."""
        k, v = (torch.stack(side, 1) for side in zip(*self.slots, *own, strict=True))
        return turn(k, range(k.shape[1])).flatten(1, 2), v.flatten(1, 2)


def check_sink(role: EmaSink, steps: list[tuple[int, int]], store: str, dtype: Any = torch.float32) -> Rule:
    """A noisy run against the rule; `steps` are lengths of chunks and what the next one takes back."""
    made = store_class(store)({role: Heads(range(HEADS), HEADS)}, window=WINDOW, layer=0)
    rule, start, pending = Rule(role.window, role.sink, role.alpha), 0, list[Both]()
    for length, overlap in steps:
        rule.slots += pending
        rule.begin(length)
        sides = [frame_tensor(range(start, start + length), seed, 2, HEADS, PATCHES, DIM) for seed in (0, 1)]
        for noise in (3.0, -7.0, 0.0):
            k, v = (x.to(dtype) * (1 + noise) for x in sides)
            made.write(Chunk(start, k, v))
            view, tokens = made.view(role, "denoise", turn), made.view_compressed(role, turn)
            own = list(zip(k.unbind(1), v.unbind(1), strict=True))
            parts = [view.k.flatten(1, 2), view.v.flatten(1, 2)]
            if tokens is not None:
                parts = [torch.cat(pair, 1) for pair in zip(tokens, parts, strict=True)]
            assert (tokens is not None) == bool(rule.evictions)
            for found, expected in zip(parts, rule.seen(own), strict=True):
                assert found.dtype == dtype
                assert torch.equal(found, expected)
        moved = length - min(overlap, length - 1)
        pending, start = own[:moved], start + moved
    return rule


@st.composite
def sinks(draw: Any, longest: int = 4) -> EmaSink:
    sink = draw(st.integers(1, 4))
    return EmaSink(draw(st.integers(sink + longest, 14)), sink, draw(st.floats(0.0, 1.0)))


@settings(max_examples=examples(25, nightly=400))
@given(
    sinks(),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 0, 0, 1])), min_size=7, max_size=12),
    st.sampled_from(sorted(STORES)),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_everything_attended_to_is_that_of_the_rule_bit_for_bit(role, steps, store, dtype):
    check_sink(role, steps, store, dtype)


@pytest.mark.parametrize(
    ("role", "evictions"),
    [
        (EmaSink(), [3, 3, 3]),
        (EmaSink(8, 3), [1, 3, 3, 3]),
        (EmaSink(8, 2), [1, 3, 3, 3]),
        (EmaSink(7, 2), [2, 3, 3, 3]),
        (EmaSink(7, 1), [2, 3, 3, 3]),
    ],
    ids=str,
)
def test_both_ways_to_change_the_sink_are_met_by_chunks_of_three(role, evictions):
    assert check_sink(role, [(3, 0)] * 6, "ring").evictions == evictions


def test_the_released_numbers_by_hand():
    """Frames 3 to 5 are mixed in before chunk 9, frames 6 to 8 before chunk 12."""
    role = EmaSink()
    made, found = store_class("ring")({role: Heads(range(1), 1)}, window=WINDOW, layer=0), {}
    for start in range(0, 15, 3):
        x = torch.arange(start, start + 3.0).view(1, 3, 1, 1, 1)
        made.write(Chunk(start, 10 * x, x))
        view = made.view(role, "denoise", lambda x, _: x)
        asked: list[int] = []
        tokens = made.view_compressed(role, lambda x, places, asked=asked: asked.extend(places) or x)
        values = None if tokens is None else tokens[1].flatten().clone()
        found[start] = view.frames, view.positions, asked, values
    assert found[6] == (tuple(range(9)), tuple(range(9)), [], None)
    assert found[9][:3] == (tuple(range(6, 12)), tuple(range(3, 9)), [0, 1, 2])
    assert found[12][:3] == (tuple(range(9, 15)), tuple(range(3, 9)), [0, 1, 2])
    once = torch.tensor([0.999 * n + 0.001 * (3 + n) for n in range(3)])
    twice = torch.tensor([0.999 * old + 0.001 * (6 + n) for n, old in enumerate(once.tolist())])
    torch.testing.assert_close(found[9][3], once)
    torch.testing.assert_close(found[12][3], twice)


class OtherWeight(MixedSink):
    """With a bug: the weights are exchanged."""

    def _mixed(self, sink: Tensor, evicted: Tensor) -> Tensor:
        return super()._mixed(evicted, sink) if sink.shape == evicted.shape else super()._mixed(sink, evicted)


class KeysOnly(MixedSink):
    """With a bug: values of the sink stay."""

    def evicted(self, past: Any) -> None:
        before = past.v[:, : self.role.sink] if self._sink is None else self._sink[1]
        super().evicted(past)
        self._sink = self._sink[0], before


class ChunkLate(MixedSink):
    """With a bug: frames are mixed in when the next ones are evicted."""

    _waiting: Any = None

    def evicted(self, past: Any) -> None:
        if self._sink is None:
            self._sink = tuple(x[:, : self.role.sink] for x in (past.k, past.v))
            self._waiting = tuple(x[:, self.role.sink :] for x in (past.k, past.v))
            return
        waiting, self._waiting = self._waiting, (past.k, past.v)
        self._sink = tuple(self._mixed(x, y) for x, y in zip(self._sink, waiting, strict=True))


class EveryPass(MixedSink):
    """With a bug: every pass mixes the last evicted frames in again."""

    _last: Any = None

    def evicted(self, past: Any) -> None:
        super().evicted(past)
        self._last = past

    def view(self, start: int, query: int | None, encode: Any) -> Any:
        if self._last is not None and len(self._last.frames) == self.role.sink:
            super().evicted(self._last)
        return super().view(start, query, encode)


class TrueTimes(MixedSink):
    """With a bug: the sink goes along with the video."""

    def view(self, start: int, query: int | None, encode: Any) -> Any:
        return super().view(start, query, lambda x, places: encode(x, [place + start for place in places]))


class NeverReplaced(MixedSink):
    """With a bug: another number of frames changes nothing."""

    def _mixed(self, sink: Tensor, evicted: Tensor) -> Tensor:
        return super()._mixed(sink, evicted) if sink.shape == evicted.shape else sink.clone()


class Wide(MixedSink):
    """With a bug in bfloat16: sums are taken in float32."""

    def _mixed(self, sink: Tensor, evicted: Tensor) -> Tensor:
        return super()._mixed(sink.float(), evicted.float()).to(sink.dtype)


@dataclass(frozen=True)
class WithBug(EmaSink):
    """A sink of another class."""

    kind: ClassVar[type[MixedSink]] = MixedSink

    def compressed(self) -> MixedSink:
        return self.kind(self)


BUGS = (OtherWeight, KeysOnly, ChunkLate, EveryPass, TrueTimes, NeverReplaced, Wide)


@pytest.mark.parametrize("broken", BUGS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("store", ["reference", "ring"])
def test_the_rule_catches_planted_bugs(broken, store):
    steps, dtype = [(3, 0)] * 7, torch.bfloat16 if broken is Wide else torch.float32
    check_sink(WithBug(8, 3, 0.75), steps, store, dtype)
    with pytest.raises((AssertionError, RuntimeError)):
        check_sink(type("Broken", (WithBug,), {"kind": broken})(8, 3, 0.75), steps, store, dtype)


@pytest.mark.parametrize("broken", BUGS[:-1], ids=lambda kind: kind.__name__)
def test_so_does_the_stand_in(broken):
    assert film(type("Broken", (WithBug,), {"kind": broken})(8, 3, 0.75)) != film(None)


@pytest.mark.parametrize("window", [7, 8, 9])
@pytest.mark.parametrize("sink", [1, 2, 3])
def test_own_is_what_the_stand_in_does_with_any_sink(window, sink):
    assert film("own", window, sink) == film(None, window, sink)


@functools.cache
def film(roles: Any, window: int = 8, sink: int = 3) -> list[bytes]:
    """Two videos of a stand-in on the same caches: every output, as bits."""
    host = RewardForcingHost()
    host.slots = window
    model = host.model()
    for block in model.blocks:
        block.self_attn.local_attn_size, block.self_attn.sink_size = window, sink
    handle = None if roles is None else hf.apply_head_forcing(model, roles)
    caches, outs = host.caches(model, 2), []
    with torch.no_grad():
        for frames in (18, 12):
            for start in range(0, frames, 3):
                outs += [host.call(model, caches, start, 3, draw).numpy().tobytes() for draw in (1, 0)]
            host.new_video(model, caches)
    assert handle is None or handle.status().bypassed == 0
    return outs


@pytest.mark.parametrize("mode", ["smooth", "cut"])
def test_after_a_prompt_switch_the_sink_is_the_first_frames_that_are_stored(mode):
    host = RewardForcingHost()
    model = host.model()
    handle = hf.apply_head_forcing(model, "own")
    caches, stored = host.caches(model), {}
    with torch.no_grad():
        for start in range(0, 30, 3):
            if start == 15:
                handle.switch_prompt(mode)
            host.call(model, caches, start, 3, 1)
            host.call(model, caches, start, 3, 0)
            (stored[start],) = handle.frames(0, 0)[0]
    assert stored[12] == [10, 11]
    assert stored[15] == []
    assert stored[18] == [15, 16, 17]
    assert stored[21] == [19, 20], "15 to 17 are the sink, the first of which 18 replaced"


def test_bytes_stay_bounded_and_are_those_of_the_window():
    role = EmaSink()
    made, sizes = store_class("lean")({role: Heads(range(1), 1)}, window=WINDOW, layer=0), []
    for start in range(0, 60, 3):
        x = frame_tensor(range(start, start + 3), 0, 1, 1)
        made.write(Chunk(start, x, -x))
        made.view_compressed(role, turn)
        sizes.append(made.nbytes())
    assert len(set(sizes[5:])) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"positions": "absolute"}, "no time of its own"),
        ({"sink": 0}, "use SlidingWindow"),
        ({"alpha": 1.5}, "alpha from 0.0 to 1.0, got 1.5"),
        ({"alpha": 1}, "got 1"),
        ({"alpha": float("nan")}, "got nan"),
    ],
)
def test_impossible_numbers_are_refused(wrong, said):
    with pytest.raises(RoleError, match=said):
        EmaSink(**wrong)


def test_a_window_without_room_is_refused():
    with pytest.raises(WindowError, match="at least 6"):
        EmaSink(5, 3).fit(21, 3)
    with pytest.raises(WindowError, match="at most 18"):
        EmaSink(22, 3).fit(21, 3)
    assert EmaSink(6, 3).fit(21, 3) == EmaSink(6, 3)


def test_the_map_of_a_sink_survives_json():
    one = RoleMap(((EmaSink(10, 2, 0.1 + 0.2), EmaSink()),))
    assert RoleMap.from_json(one.to_json()) == one


def test_without_eviction_it_is_a_sliding_window():
    equal = [one == other for one, other in zip(film(EmaSink(8)), film(SlidingWindow(8, 3)), strict=True)]
    assert equal == [*[True] * 4, *[False] * 8, *[True] * 4, *[False] * 4], "passes of chunks of three"
