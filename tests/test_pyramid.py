"""Pyramid Forcing's waves and strided heads: the frames and positions of its released configuration."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headforcing as hf
from headforcing.demo.model import DemoConfig, DemoModel
from headforcing.demo.pipeline import DemoPipeline
from headforcing.demo.world import sample_scene
from headforcing.errors import RoleError
from headforcing.pyramid import Strided, Wave
from headforcing.role_map import RoleMap
from headforcing.roles import Local
from headforcing.stores import store_class
from headforcing.types import Chunk, Heads

WAVES = {
    3: ([], [], []),
    6: ([], [1], [2]),
    9: ([3], [4], [5]),
    12: ([6], [1, 7], [2, 8]),
    21: ([3, 9, 15], [4, 10, 16], [5, 11, 17]),
    24: ([6, 12, 18], [1, 7, 13, 19], [2, 8, 14, 20]),
    27: ([3, 9, 15, 21], [4, 10, 16, 22], [5, 11, 17, 23]),
    60: ([36, 42, 48, 54], [37, 43, 49, 55], [38, 44, 50, 56]),
    63: ([39, 45, 51, 57], [40, 46, 52, 58], [41, 47, 53, 59]),
}
STRIDES = {
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
"""Middle frames by start of the chunk; sinks, the frame before the chunk and the chunk come on top."""


def seen(role, chunk: int, until: int, store: str = "reference") -> dict[int, list[list[int]]]:
    """Frames that every query frame of every chunk sees; keys and values are the frame's number."""
    heads = Heads(range(1), 1)
    made = store_class(store)({role: heads}, window=21, layer=0)
    found = {}
    for start in range(0, until, chunk):
        numbers = torch.arange(start, start + chunk, dtype=torch.float32).view(1, chunk, 1, 1, 1)
        made.write(Chunk(start, numbers + 0.5, numbers + 0.5))  # a noisy pass
        made.write(Chunk(start, numbers.clone(), numbers.clone()))
        found[start] = []
        for query in range(start, start + chunk):
            view = made.view(role, "denoise", lambda x, positions: x, query)
            assert view.k.flatten().tolist() == view.v.flatten().tolist() == list(view.frames)
            found[start].append(list(view.frames))
    return found


@pytest.mark.parametrize("store", ["reference", "ring"])
def test_the_golden_frames_of_a_wave(store):
    found = seen(Wave(), 3, 66, store)
    for start, middles in WAVES.items():
        sink = [] if start == 1 else [0]
        for query, middle in enumerate(middles):
            assert found[start][query] == [*sink, *middle, *range(start - 1, start + 3)], (start, query)


@pytest.mark.parametrize("store", ["reference", "ring"])
def test_the_golden_frames_of_a_strided_head(store):
    found = seen(Strided(), 3, 66, store)
    for start, middle in STRIDES.items():
        expected = sorted({0, 1, 2, *middle, *range(start - 1, start + 3)})
        assert found[start] == [expected] * 3, start


@pytest.mark.parametrize("chunk", [1, 3])
def test_in_steady_state_a_wave_reads_nine_frames_and_a_strided_head_eleven(chunk):
    for role, attended in ((Wave(), 1 + 4 + 1 + chunk), (Strided(), 3 + 4 + 1 + chunk)):
        found = seen(role, chunk, 72)
        assert {len(frames) for start in range(36, 72, chunk) for frames in found[start]} == {attended}


def by_definition(role, start: int, query: int, chunk: int) -> list[int]:
    """The rule, in one line per region, on all frames there ever were."""
    sinks = {frame for frame in range(start) if frame < role.sink}
    recents = {frame for frame in range(start) if frame >= start - role.recent}
    phase = query % role.period if isinstance(role, Wave) else 0
    middle = [f for f in range(start) if f % role.period == phase and f not in sinks | recents]
    kept = middle[max(0, len(middle) - role.cap) :]
    return sorted({*sinks, *kept, *recents, *range(start, start + chunk)})


roles = st.builds(
    lambda kind, sink, period, cap, recent: kind(sink, period, cap, recent),
    st.sampled_from([Wave, Strided]),
    st.integers(0, 4),
    st.integers(1, 7),
    st.integers(0, 4),
    st.integers(0, 5),
)


@given(roles, st.integers(1, 4), st.sampled_from(["reference", "ring"]))
def test_what_is_kept_is_enough_and_no_more_than_said(role, chunk, store):
    found = seen(role, chunk, 12 * chunk, store)
    for start, frames in found.items():
        for index, row in enumerate(frames):
            assert row == by_definition(role, start, start + index, chunk)


@given(roles, st.integers(1, 4), st.integers(0, 10**6))
def test_far_frames_sit_at_one_distance_and_near_ones_at_their_own(role, chunk, number):
    start = number * chunk
    for query in range(start, start + chunk):
        frames = (
            by_definition(role, start, query, chunk) if start < 400 else [0, *range(start - 1, start + chunk)]
        )
        places = role.place(frames, chunk, 21, query)
        own = places[len(frames) - chunk + query - start]
        assert 0 <= min(places) <= max(places) < role.far + chunk
        for frame, place in zip(frames, places, strict=True):
            if frame >= start - role.recent:
                assert own - place == query - frame
            else:
                assert place == 0
                assert own == query if query < role.near else own == min(max(query, role.near), role.far)


class Greedy(Wave):
    """A wave with a bug: it reads the phase of the chunk, not of the query."""

    def attend(self, table, phase):
        return super().attend(dataclasses.replace(table, query=table.start), phase)


class Forgetful(Wave):
    """A wave with a bug: it keeps only the phases of the chunk that begins."""

    def retain(self, table):
        return self._keep(table, [(table.start + frame) % self.period for frame in range(table.chunk)])


@pytest.mark.parametrize("broken", [Greedy(), Forgetful()])
def test_the_golden_frames_catch_planted_bugs(broken):
    found = seen(broken, 3, 66)
    wrong = [
        start
        for start, middles in WAVES.items()
        for query, middle in enumerate(middles)
        if found[start][query] != [0, *middle, *range(start - 1, start + 3)]
    ]
    assert wrong


@pytest.mark.parametrize("wrong", [{"positions": "clamped"}, {"period": 0}, {"near": 22}, {"cap": -1}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RoleError):
        Wave(**wrong)


CONFIG = DemoConfig(dim=64, layers=2)


def test_a_model_with_waves_matches_attention_written_out():
    """Every query frame on its own, against a softmax over the frames of the definition."""
    model = DemoModel(CONFIG).randomize(torch.Generator().manual_seed(0)).eval().requires_grad_(False)
    table = [[Wave(), Strided(), Local(2), Wave()]] * 2
    checked = 0

    def check(seen) -> None:
        nonlocal checked
        start, tokens = seen.call.start, seen.call.tokens_per_frame
        for part, frames, positions in zip(seen.parts, seen.frames, seen.positions, strict=True):
            role = table[seen.layer][part.heads.indices[0]]
            q, k, v = (x.transpose(1, 2).double() for x in (part.q, part.k, part.v))
            expected = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v
            got = part.heads.take(seen.out[:, part.rows]).transpose(1, 2)
            torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
            if not isinstance(role, Local):
                query = start + part.rows.start // tokens
                assert part.q.shape[1] == tokens
                assert list(frames) == by_definition(role, start, query, 3)
                assert positions == role.place(frames, 3, 21, query)
                checked += 1

    prompts = sample_scene(2, torch.Generator().manual_seed(1)).prompts(torch.arange(14))
    with hf.apply_head_forcing(model, table) as handle, handle.observe(check):
        fast = DemoPipeline(model).generate(prompts, generator=torch.Generator().manual_seed(2))
    assert checked == 14 * 5 * 2 * 2 * 3
    with hf.apply_head_forcing(model, table, store="reference"):
        slow = DemoPipeline(model).generate(prompts, generator=torch.Generator().manual_seed(2))
    assert torch.equal(fast, slow)


def test_waves_survive_a_file():
    role_map = RoleMap(((Wave(), Strided(cap=2)),))
    assert RoleMap.from_json(role_map.to_json()) == role_map
