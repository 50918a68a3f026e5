"""Pyramid Forcing's waves and strided heads: the frames and positions of its released configuration."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.model.pipeline import DemoPipeline
from headforcing.demo.world.scene import sample_scene
from headforcing.errors import RoleError, StreamShapeError, UnsupportedModelError, WindowError
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import Local
from headforcing.roles.maps.presets import pyramid_forcing
from headforcing.roles.maps.role_map import RoleMap
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from headforcing.stores import STORES, store_class
from headforcing.types import Chunk, Heads
from tests.examples import examples


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
    lambda kind, sink, period, cap, recent: kind(sink, recent, period=period, cap=cap),
    st.sampled_from([Wave, Strided]),
    st.integers(0, 4),
    st.integers(1, 7),
    st.integers(0, 4),
    st.integers(0, 5),
)


@given(roles, st.integers(1, 4), st.sampled_from(sorted(STORES)))
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
        places = role.positions_of(frames, chunk, 21, query)
        own = places[len(frames) - chunk + query - start]
        assert 0 <= min(places) <= max(places) < role.far + chunk
        for frame, place in zip(frames, places, strict=True):
            if frame >= start - role.recent:
                assert own - place == query - frame
            else:
                assert own - place == (query if query < role.near else min(max(query, role.near), role.far))


def test_the_frames_of_a_chunk_and_the_last_ones_sit_where_they_do_for_every_query_frame_of_it():
    for role in (Wave(), Strided(), Veil()):
        frames = [0, 1, 2, 71, 72, 73, 74]
        found = [role.positions_of(frames, 3, 21, query) for query in (72, 73, 74)]
        assert found == [(0, 0, 0, 20, 21, 22, 23), (1, 1, 1, 20, 21, 22, 23), (2, 2, 2, 20, 21, 22, 23)]


class Greedy(Wave):
    """A wave with a bug: it reads the phase of the chunk, not of the query."""

    def visible(self, table, phase):
        return super().visible(dataclasses.replace(table, query=table.start), phase)


class Forgetful(Wave):
    """A wave with a bug: it keeps only the phases of the chunk that begins."""

    def retain(self, table):
        return self._rows(table, [(table.start + frame) % self.period for frame in range(table.chunk)])


@pytest.mark.parametrize("broken", [Greedy(), Forgetful()])
def test_the_definition_catches_planted_bugs(broken):
    found = seen(broken, 3, 66)
    wrong = [
        start
        for start, rows in found.items()
        for query, row in enumerate(rows, start)
        if row != by_definition(broken, start, query, 3)
    ]
    assert wrong


@pytest.mark.parametrize("wrong", [{"positions": "clamped"}, {"period": 0}, {"near": 22}, {"cap": -1}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RoleError):
        Wave(**wrong)


CONFIG = DemoConfig(dim=64, heads=4, layers=2)


@pytest.mark.slow
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
                assert positions == role.positions_of(frames, 3, 21, query)
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
"""First frames of the merged blocks that a veil head reads, by start of the chunk."""

GRID = (4, 6)


class Blocks(NamedTuple):
    """Merged blocks as a query frame sees them, before RoPE."""

    positions: tuple[int, ...]
    k: torch.Tensor
    v: torch.Tensor


def blocks_of(store, role, query: int) -> Blocks | None:
    asked = []

    def spy(x, positions, patch):
        assert patch == role.patch
        asked.extend(positions)
        return x

    tokens = store.view_compressed(role, spy, query)
    if tokens is None:
        return None
    return Blocks(tuple(asked), *(x.unflatten(1, (len(asked), -1)) for x in tokens))


def merged(role, chunk: int, until: int, store: str = "ring", keys=None):
    """Per chunk: blocks read, their positions per query frame, keys and values, of a noisy run."""
    made = store_class(store)({role: Heads(range(2), 2)}, window=21, layer=0)
    keys = (
        keys
        if keys is not None
        else torch.randn(1, until, 24, 2, 4, generator=torch.Generator().manual_seed(0))
    )
    found = {}
    for start in range(0, until, chunk):
        own = keys[:, start : start + chunk]
        made.write(Chunk(start, own + 9.0, own - 9.0, GRID))  # a noisy pass
        made.write(Chunk(start, own, -own, GRID))
        found[start] = [blocks_of(made, role, query) for query in range(start, start + chunk)]
        assert [made.frames(role)[0]] == [
            sorted({*range(min(role.sink, start)), *range(max(0, start - role.recent), start)})
        ]
    return keys, found


def block_means(keys, starts, role: Veil) -> torch.Tensor:
    """The definition: the mean over all frames of a block and all patches of a square, at once."""
    means = []
    for start in starts:
        frames = keys[:, start : start + role.block].unflatten(2, GRID)  # [B, block, h, w, H, D]
        rows = []
        for top in range(0, GRID[0], role.patch):
            for left in range(0, GRID[1], role.patch):
                square = frames[:, :, top : top + role.patch, left : left + role.patch]
                rows.append(square.mean((1, 2, 3)))
        means.append(torch.stack(rows, 1))
    return torch.stack(means, 1)


@pytest.mark.parametrize("store", sorted(STORES))
def test_the_golden_blocks_of_a_veil(store):
    role = Veil()
    keys, found = merged(role, 3, 66, store)
    for start, blocks in VEILS.items():
        for query, view in enumerate(found[start], start):
            if not blocks:
                assert view is None
                continue
            torch.testing.assert_close(view.k, block_means(keys, blocks, role))
            torch.testing.assert_close(view.v, -block_means(keys, blocks, role))
            times = [block + 1 for block in blocks]  # the lower median of four frames
            own = role.positions_of([*range(start - 1, start + 3)], 3, 21, query)[1 + query - start]
            assert [own - place for place in view.positions] == [query - time for time in times]
            assert min(view.positions) >= 0


def test_a_veil_reads_three_blocks_where_the_chunk_starts_at_a_multiple_of_twelve_else_four():
    _, found = merged(Veil(), 3, 102)
    for start in range(18, 102, 3):
        assert {view.k.shape[1] for view in found[start]} == {3 if start % 12 == 0 else 4}


@settings(max_examples=examples(30, nightly=1000))
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 2]), st.integers(0, 2), st.integers(1, 4))
def test_merged_blocks_are_the_batched_mean_of_the_last_complete_ones(block, count, patch, recent, chunk):
    role = Veil(sink=1, recent=recent, blocks=count, block=block, patch=patch)
    keys, found = merged(role, chunk, 10 * chunk)
    for start, views in found.items():
        complete = [first for first in range(0, start, block) if first + block <= start][-count:]
        read = [first for first in complete if first + block <= start - recent]
        for view in views:
            if not read:
                assert view is None
            else:
                torch.testing.assert_close(view.k, block_means(keys, read, role))


@pytest.mark.parametrize("grid", [None, (3, 8), (8, 3)])
def test_a_grid_that_cannot_be_merged_is_refused_before_anything_changes(grid):
    store = store_class("ring")({Veil(): Heads(range(1), 1)}, window=21, layer=0)
    x = torch.zeros(1, 3, 24, 1, 4)
    with pytest.raises(StreamShapeError, match="multiples of 2"):
        store.write(Chunk(0, x, x, grid))
    store.write(Chunk(0, x, x, (4, 6)))
    before = store.nbytes()
    with pytest.raises(StreamShapeError):
        store.write(Chunk(3, x, x, grid))
    assert (store.committed, store.nbytes()) == (0, before)


def test_a_reset_forgets_blocks_and_bytes_stay_bounded():
    role, x = Veil(), torch.randn(1, 3, 24, 2, 4, generator=torch.Generator().manual_seed(1))
    store = store_class("ring")({role: Heads(range(2), 2)}, window=21, layer=0)
    sizes = []
    for start in range(0, 900, 3):
        store.write(Chunk(start, x, x, GRID))
        sizes.append(store.nbytes())
    assert len(set(sizes[60:])) <= 4  # with and without a block that is being filled
    assert max(sizes[60:]) == max(sizes[60:120])
    store.write(Chunk(0, x, x, GRID))
    assert store.view_compressed(role, lambda x, positions, patch: x, 0) is None


def test_merged_patches_are_rotated_where_the_top_left_one_is():
    from headforcing.adapters import rope

    table = torch.polar(torch.ones(32, 12, dtype=torch.float64), torch.rand(32, 12, dtype=torch.float64))
    x = torch.randn(1, 2, 24, 1, 24, dtype=torch.float64)
    whole = rope.rotate(x, table, [3, 5], *GRID)
    corners = [row * GRID[1] + column for row in (0, 2) for column in (0, 2, 4)]
    assert torch.equal(rope.rotate(x[:, :, corners], table, [3, 5], *GRID, patch=2), whole[:, :, corners])


@pytest.mark.slow
def test_a_model_with_veils_matches_attention_written_out():
    model = DemoModel(CONFIG).randomize(torch.Generator().manual_seed(0)).eval().requires_grad_(False)
    role, table = Veil(), [[Veil(), Veil(), Local(2), Wave()]] * 2
    committed: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {0: {}, 1: {}}
    checked = 0

    def check(seen) -> None:
        nonlocal checked
        start, tokens, past = seen.call.start, seen.call.tokens_per_frame, committed[seen.layer]
        grid, adapter = seen.call.grid[1:], find_adapter(model)
        for part, frames, positions in zip(seen.parts, seen.frames, seen.positions, strict=True):
            if table[seen.layer][part.heads.indices[0]] != role:
                continue
            query, heads = start + part.rows.start // tokens, list(part.heads.indices)
            blocks = [b for b in range(0, start, 4) if b + 4 <= start][-4:]
            blocks = [b for b in blocks if b + 4 <= start - 1]
            k, v = ([past[f][side][:, :, heads] for f in frames if f < start] for side in (0, 1))
            own = (x[:, :, :, heads].unbind(1) for x in (seen.chunk.k, seen.chunk.v))
            k, v = (torch.stack([*a, *b], 1) for a, b in zip((k, v), own, strict=True))
            keys, values = [seen.encode(k, positions).flatten(1, 2)], [v.flatten(1, 2)]
            for block in blocks:
                for side, out in ((0, keys), (1, values)):
                    x = torch.stack([past[f][side][:, :, heads] for f in range(block, block + 4)], 1)
                    small = (
                        x.unflatten(2, (grid[0] // 2, 2, grid[1] // 2, 2))
                        .mean((1, 3, 5))
                        .flatten(1, 2)[:, None]
                    )
                    if side == 0:
                        place = positions[len(frames) - 3 + query - start] - (query - block - 1)
                        small = adapter.rotate(small, seen.call, [place], 2)
                    out.append(small.flatten(1, 2))
            k, v = torch.cat(keys, 1), torch.cat(values, 1)
            logits = torch.einsum("blhd,bmhd->bhlm", part.q, k) / part.q.shape[-1] ** 0.5
            expected = torch.einsum("bhlm,bmhd->blhd", logits.softmax(-1), v)
            got = part.heads.take(seen.out[:, part.rows])
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            checked += len(blocks)
        for index, frame in enumerate(seen.chunk.frames):  # the last pass over a chunk is what stays
            past[frame] = (seen.chunk.k[:, index], seen.chunk.v[:, index])

    prompts = sample_scene(2, torch.Generator().manual_seed(1)).prompts(torch.arange(12))
    with hf.apply_head_forcing(model, table) as handle, handle.observe(check):
        pipeline = DemoPipeline(model)
        fast = pipeline.generate(prompts, generator=torch.Generator().manual_seed(2))
        assert handle.status().stored_bytes > 0
    assert checked > 500
    with hf.apply_head_forcing(model, table, store="reference"):
        slow = DemoPipeline(model).generate(prompts, generator=torch.Generator().manual_seed(2))
    assert torch.equal(fast, slow)


def test_the_published_counts_give_the_published_frames():
    """Third-party arithmetic on the released table and configuration: 9.87 attended, 18.5 stored."""
    flat = ["wave"] * 156 + ["anchor"] * 172 + ["veil"] * 32
    role_map = pyramid_forcing([flat[at : at + 12] for at in range(0, 360, 12)])
    attended = stored = 0.0
    for role, heads in role_map.counts().items():
        merges = isinstance(role, Veil)
        blocks = role.blocks / role.patch**2 if merges else 0.0
        read = role.capacity(3) + 3 if merges else len(by_definition(role, 600, 600, 3))
        attended += heads * (read + blocks)
        stored += heads * (role.capacity(3) + 3 + blocks)
    assert attended / 360 == pytest.approx(9.87, abs=0.005)
    assert stored / 360 == pytest.approx(18.5, abs=0.05)


@pytest.mark.parametrize("chunks", [42, pytest.param(350, marks=pytest.mark.slow)])
def test_a_pyramid_runs_in_constant_memory(chunks):
    model = DemoModel(CONFIG).randomize(torch.Generator().manual_seed(0)).eval().requires_grad_(False)
    roles, sizes = pyramid_forcing([["wave", "anchor", "veil", "wave"]] * 2), {}
    prompts = sample_scene(1, torch.Generator().manual_seed(1)).prompts(torch.arange(1)).expand(1, chunks, -1)
    given = torch.randn(1, 3, 3 * chunks, 48, 72, generator=torch.Generator().manual_seed(2))
    with hf.apply_head_forcing(model, roles) as handle:
        video = DemoPipeline(model).generate(
            prompts,
            generator=torch.Generator(),
            first_chunk=given,
            callback=lambda index, _: sizes.update({index: handle.status().stored_bytes}),
        )
    assert video.shape[2] == 3 * chunks
    assert len({sizes[index] for index in range(30, chunks)}) <= 4  # a block fills and is done, over and over


def reach(role: Veil, chunk: int) -> int:
    """Distance from the oldest block in view to the newest query frame, over all starts of a chunk."""
    found = [0]
    for start in range(0, 40 * chunk, chunk):
        complete = [b for b in range(0, start, role.block) if b + role.block <= start][-role.blocks :]
        query = start + chunk - 1
        read = [b for b in complete if b + role.block <= start - role.recent]
        found += [query - (b + (role.block - 1) // 2) for b in read]
    return max(found)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.integers(1, 8))
def test_a_veil_fits_only_where_no_block_is_older_than_the_far_frames(block, count, recent, chunk):
    role = Veil(recent=recent, blocks=count, block=block)
    try:
        role.fit(21, chunk)
    except WindowError:
        return
    assert reach(role, chunk) <= role.far


def test_the_published_veil_fits_chunks_of_three_and_not_of_five():
    assert Veil().fit(21, 3) == Veil()
    for role, chunk in ((Veil(), 5), (Wave(recent=25), 3)):
        with pytest.raises(WindowError, match="raise far"):
            role.fit(21, chunk)


def test_positions_below_zero_are_refused_by_rope():
    from headforcing.adapters import rope

    table = torch.polar(torch.ones(32, 12, dtype=torch.float64), torch.rand(32, 12, dtype=torch.float64))
    with pytest.raises(RoleError, match="none below 0"):
        rope.rotate(torch.zeros(1, 2, 24, 1, 24), table, [-1, 0], *GRID)


def test_merged_blocks_take_no_positions() -> None:
    """They are where their frames were."""
    history = Veil().compressed()
    assert history is not None
    assert history.gap == 0


@pytest.mark.parametrize("role", [Wave(), Strided(), Veil()])
def test_passes_may_alternate_between_inference_mode_and_no_grad(role):
    stores = [store_class(name)({role: Heads(range(2), 2)}, window=21, layer=0) for name in sorted(STORES)]
    for start in range(0, 30, 3):
        x = torch.randn(1, 3, 24, 2, 4, generator=torch.Generator().manual_seed(start))
        for number, mode in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode)):
            with mode():
                for store in stores:
                    store.write(Chunk(start, x + number, x, GRID))
                for query in range(start, start + 3):
                    views = [store.view(role, "denoise", lambda y, at: y * 2, query) for store in stores]
                    assert all(torch.equal(view.k, views[0].k) for view in views)
                    assert all(torch.equal(view.v, views[0].v) for view in views)


@pytest.mark.parametrize(("role", "most"), [(Wave(), 2 * 29 + 3 * 2 * 9), (Strided(), 2 * 11 + 3 * 2 * 11)])
def test_no_more_is_held_than_raw_keys_values_and_what_is_packed(role, most):
    """In frames of keys or values: what is kept, and keys and values of what each query frame sees."""
    store = store_class("ring")({role: Heads(range(2), 2)}, window=21, layer=0)
    x = torch.zeros(1, 3, 24, 2, 4)
    for start in range(0, 90, 3):
        store.write(Chunk(start, x, x, GRID))
        for query in range(start, start + 3):
            store.view(role, "denoise", lambda y, _: y, query)
    slots = role.capacity(3) + 3
    assert store.nbytes() <= most * x[:, :1].nbytes + 8 * slots


def test_a_grid_may_not_change_inside_a_video():
    store = store_class("ring")({Veil(): Heads(range(1), 1)}, window=21, layer=0)
    x = torch.zeros(1, 3, 24, 1, 4)
    store.write(Chunk(0, x, x, (4, 6)))
    with pytest.raises(StreamShapeError, match="start a new video"):
        store.write(Chunk(3, x, x, (6, 4)))
    store.write(Chunk(0, x, x, (6, 4)))


class OldAdapter(SelfForcing):
    """An adapter from before roles merged patches."""

    def rotate(self, x, call, positions):
        return super().rotate(x, call, positions)


def test_what_cannot_merge_is_refused_at_once():
    model = DemoModel(CONFIG).eval()
    with pytest.raises(UnsupportedModelError, match="takes no patch"):
        hf.apply_head_forcing(model, Veil(), adapter=OldAdapter())
    hf.apply_head_forcing(model, Wave(), adapter=OldAdapter()).remove()
