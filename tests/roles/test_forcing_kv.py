"""Forcing-KV's dynamic heads: the pieces that a plain loop over all bands would choose, layer after layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.model.pipeline import DemoPipeline
from headforcing.demo.world.scene import sample_scene
from headforcing.errors import RoleError, StreamShapeError, WindowError
from headforcing.roles import Local
from headforcing.roles.forcing_kv import Dynamic, Pieces
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.maps.role_map import RoleMap
from headforcing.stores import STORES, store_class
from headforcing.types import Chunk, Heads
from tests.examples import examples
from tests.strategies import frame_tensor

GRID, PATCHES, DIM, WINDOW = (4, 3), 12, 4, 24


def turn(x: torch.Tensor, positions: Any, *_: int) -> torch.Tensor:
    """RoPE in time, pair by pair; in float64, so that its last bits do not hang on what is turned with it."""
    angle = torch.tensor(list(positions), dtype=torch.float64)[:, None, None, None] * torch.tensor([0.7, 0.1])
    a, b = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    return turned.flatten(-2).to(x.dtype)


def least_alike(keys: torch.Tensor, pieces: int) -> list[list[tuple[int, int]]]:
    """Per sample, frame and band of those least like the next frame, of rotated keys `[B, n, P, H, D]`."""
    found = []
    size = keys.shape[2] // pieces
    for sample in keys.double():
        scores = []
        for frame in range(len(sample) - 1):
            for piece in range(pieces):
                cosines = []
                for token in range(piece * size, (piece + 1) * size):
                    one, two = sample[frame, token].flatten(), sample[frame + 1, token].flatten()
                    cosines.append(float(one @ two / (one.norm() * two.norm())))
                scores.append((sum(cosines) / size, frame, piece))
        found.append(sorted((frame, piece) for _, frame, piece in sorted(scores)[:pieces]))
    return found


def cut(x: torch.Tensor, choice: list[list[tuple[int, int]]], pieces: int) -> torch.Tensor:
    """The bands of a choice, of frames `[B, n, P, H, D]`, as tokens."""
    size = x.shape[2] // pieces
    return torch.stack(
        [
            torch.cat([sample[frame, piece * size : (piece + 1) * size] for frame, piece in each])
            for sample, each in zip(x, choice, strict=True)
        ]
    )


def candidates(starts: list[int], role: Dynamic) -> list[int]:
    """Frames that are cut when the last of these chunks begins: each has a next one that is finished."""
    if len(starts) - 1 <= max(role.skip, 1):
        return []
    before, start = starts[-2:]
    return [frame for frame in range(before - 1, start - 1) if frame >= role.sink]


def expected_places(
    role: Dynamic, start: int, length: int, cuts: int
) -> tuple[list[int], list[int], list[int]]:
    """Whole frames, where they sit, and where the frames that were cut sit."""
    ends = sorted({*range(min(role.sink, start)), *range(max(0, start - 1), start)})
    frames = [*ends, *range(start, start + length)]
    if role.positions == "absolute":
        return frames, frames, list(range(start - 1 - cuts, start - 1))
    places = list(range(len(frames)))
    if cuts:
        places = [
            place if frame < role.sink else place + cuts for place, frame in zip(places, frames, strict=True)
        ]
    return frames, places, list(range(role.sink, role.sink + cuts))


def check_pieces(role: Dynamic, lengths: list[tuple[int, int]], batch: int, heads: int, store: str) -> int:
    """A noisy run against the definition, by steps and overlaps of chunks; says how often it saw pieces."""
    made = store_class(store)({role: Heads(range(heads), heads)}, window=WINDOW, layer=1)
    starts, seen, start = [], 0, 0
    for step, overlap in lengths:
        starts.append(start)
        length = step + overlap
        k, v = (
            frame_tensor(range(start, start + length), seed, batch, heads, PATCHES, DIM) for seed in (0, 1)
        )
        for noise in (3.0, 0.0):
            made.write(Chunk(start, k + noise, v - noise, GRID))
            view, tokens = made.view(role, "denoise", turn), made.view_compressed(role, turn)
            cuts = candidates(starts, role)
            frames, places, where = expected_places(role, start, length, len(cuts))
            assert list(view.frames) == frames
            assert list(view.positions) == places
            if not cuts:
                assert tokens is None
                continue
            past = range(cuts[0], cuts[-1] + 2)
            k_past, v_past = (frame_tensor(past, seed, batch, heads, PATCHES, DIM) for seed in (0, 1))
            turned = turn(k_past, [*where, where[-1] + 1])
            choice = least_alike(turned, role.pieces)
            assert torch.equal(tokens[0], cut(turned, choice, role.pieces))
            assert torch.equal(tokens[1], cut(v_past, choice, role.pieces))
            seen += 1
        start += step
    return seen


dynamics = st.builds(
    lambda sink, pieces, skip, positions: Dynamic(sink, pieces, skip, positions=positions),
    st.integers(0, 4),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.integers(0, 3),
    st.sampled_from(["absolute", "compact"]),
)
steps = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1)), min_size=4, max_size=7)


@settings(max_examples=examples(50, nightly=1000))
@given(dynamics, steps, st.integers(1, 2), st.integers(1, 3), st.sampled_from(sorted(STORES)))
def test_pieces_are_those_of_a_plain_loop(role, lengths, batch, heads, store):
    check_pieces(role, lengths, batch, heads, store)


@pytest.mark.parametrize("store", STORES)
def test_pieces_are_first_seen_after_the_third_chunk_and_then_always(store):
    for skip, chunks in ((0, 2), (1, 2), (2, 3), (4, 5)):
        assert check_pieces(Dynamic(skip=skip), [(3, 0)] * 8, 1, 2, store) == 2 * (8 - chunks)


@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("sink", [3, 7, 10])
def test_no_frame_is_seen_whole_and_in_pieces(sink, positions):
    check_pieces(Dynamic(sink, skip=0, positions=positions), [(3, 0)] * 8, 1, 1, "ring")


class First(Pieces):
    """With a bug: the first pieces."""

    def _choice(self, past, k):
        return torch.arange(self.role.pieces).expand(k.shape[0], -1)


class Unrotated(Pieces):
    """With a bug: compares keys before RoPE."""

    def _choice(self, past, k):
        return super()._choice(past, past.k)


class OneForAll(Pieces):
    """With a bug of the released code: the first video of a batch chooses for all."""

    def _choice(self, past, k):
        return super()._choice(past, k)[:1].expand(k.shape[0], -1)


class ByHead(Pieces):
    """With a bug: the first head chooses for all."""

    def _choice(self, past, k):
        return super()._choice(past, k[..., :1, :])


class Early(Pieces):
    """With a bug: heads are cut from the first chunk on that has one before."""

    def add(self, past):
        self._chunks += 2
        super().add(past)


class Stuck(Pieces):
    """With a bug: keeps its first choice."""

    def add(self, past):
        seen, where = self._seen, self._cut
        super().add(past)
        if seen is not None:
            self._seen, self._cut = seen, where


@dataclass(frozen=True)
class WithBug(Dynamic):
    """Pieces of another class."""

    kind: ClassVar[type[Pieces]] = Pieces

    def compressed(self):
        return self.kind(self)


@pytest.mark.parametrize(
    "kind", [First, Unrotated, OneForAll, ByHead, Early, Stuck], ids=lambda k: k.__name__
)
def test_the_loop_catches_planted_bugs(kind):
    assert check_pieces(WithBug(), [(3, 0)] * 8, 2, 3, "ring") == 10
    broken = type("Broken", (WithBug,), {"kind": kind})
    with pytest.raises(AssertionError):
        check_pieces(broken(), [(3, 0)] * 8, 2, 3, "ring")


@pytest.mark.parametrize("store", STORES)
def test_videos_of_a_batch_choose_for_themselves(store):
    role, found = Dynamic(), []
    for samples in ([0], [1], [0, 1]):
        made = store_class(store)({role: Heads(range(2), 2)}, window=WINDOW, layer=1)
        for start in range(0, 12, 3):
            x = torch.cat([frame_tensor(range(start, start + 3), 9 + s, 1, 2, PATCHES, DIM) for s in samples])
            made.write(Chunk(start, x, -x, GRID))
        found.append(made.view_compressed(role, turn))
    for side in (0, 1):
        assert torch.equal(torch.cat([found[0][side], found[1][side]]), found[2][side])
    assert not torch.equal(found[0][1].abs().argsort(1), found[1][1].abs().argsort(1))


# One layer chooses for those that follow -----------------------------------------------------------


def layers_of(row: list[Dynamic], shared: bool, store: str = "ring") -> list[Any]:
    made = [
        store_class(store)({role: Heads(range(2), 2)}, window=WINDOW, layer=layer)
        for layer, role in enumerate(row)
    ]
    if shared:
        for each in made[1:]:
            each.compressed.shared = made[0].compressed.shared
    return made


def run_layers(made: list[Any], row: list[Dynamic], video: int, chunks: int = 6) -> list[list[Any]]:
    """Values in view, chunk by chunk and layer by layer; passes go through all layers, as in a model."""
    found = []
    for start in range(0, 3 * chunks, 3):
        for noise in (1.0, 0.0):
            seen = []
            for layer, (store, role) in enumerate(zip(made, row, strict=True)):
                x = frame_tensor(range(start, start + 3), 100 * video + layer, 1, 2, PATCHES, DIM)
                store.write(Chunk(start, x + noise, x - noise, GRID))
                store.view(role, "denoise", turn)
                tokens = store.view_compressed(role, turn)
                seen.append(None if tokens is None else tokens[1].clone())
        found.append(seen)
    return found


def chosen_by(video: int, layer: int, leader: int, start: int, role: Dynamic) -> torch.Tensor:
    """Values of a layer, if another one chose."""
    past = range(start - 4, start)
    keys = frame_tensor(past, 100 * video + leader, 1, 2, PATCHES, DIM)
    choice = least_alike(turn(keys, past), role.pieces)
    return cut(frame_tensor(past, 100 * video + layer, 1, 2, PATCHES, DIM), choice, role.pieces)


@pytest.mark.parametrize(
    ("shared", "store"),
    [
        *((True, "ring"), (False, "lean")),
        *(pytest.param(True, store, marks=pytest.mark.slow) for store in ("lean", "reference")),
        *(pytest.param(False, store, marks=pytest.mark.slow) for store in ("ring", "reference")),
    ],
)
def test_the_first_layer_chooses_for_all_that_follow_and_anew_in_every_chunk_and_video(shared, store):
    """Video 1 has the frames of video 0, so an old choice would look as if it were for them."""
    role, other = Dynamic(), Dynamic(pieces=4)
    row = [other, role, role, other, role]
    leaders = [0, 1, 1, 0, 1] if shared else range(5)
    made = layers_of(row, shared, store)
    for video in range(3):
        for index, seen in enumerate(run_layers(made, row, video)):
            for layer, (tokens, leader) in enumerate(zip(seen, leaders, strict=True)):
                if index < 3:
                    assert tokens is None
                else:
                    assert torch.equal(tokens, chosen_by(video, layer, leader, 3 * index, row[layer]))


class Old(Pieces):
    """With a bug: takes any choice over, also its own of the last video."""

    def _choice(self, past, k):
        before = past.shared.get("choice")
        return super()._choice(past, k) if before is None else before.pieces


def test_an_old_choice_would_be_found():
    role = type("Stale", (WithBug,), {"kind": Old})()
    made = layers_of([role] * 2, True)
    for index, seen in enumerate(run_layers(made, [role] * 2, 0)):
        if index == 3:
            assert torch.equal(seen[1], chosen_by(0, 1, 0, 9, role))
        if index > 3:
            assert not torch.equal(seen[1], chosen_by(0, 1, 0, 3 * index, role))


# In a model ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_with_dynamic_heads_matches_attention_written_out():
    model = DemoModel(DemoConfig(dim=64, heads=4, layers=3)).randomize(torch.Generator().manual_seed(0))
    model = model.eval().requires_grad_(False)
    static, dynamic, leader = Local(1, sink=1, positions="absolute"), Dynamic(pieces=4), 1
    table = [[static] * 4, [dynamic, static, dynamic, Local(2)], [static, dynamic, dynamic, dynamic]]
    committed: list[dict[int, Any]] = [{}, {}, {}]
    choices: dict[int, list[list[tuple[int, int]]]] = {}
    checked, rotate = 0, find_adapter(model).rotate

    def check(seen) -> None:
        nonlocal checked
        start, past = seen.call.start, committed[seen.layer]
        for part, frames, positions in zip(seen.parts, seen.frames, seen.positions, strict=True):
            heads = list(part.heads.indices)
            if table[seen.layer][heads[0]] != dynamic:
                continue
            ends = sorted({0, start - 1}) if start else []
            assert list(frames) == list(positions) == [*ends, *range(start, start + 3)]

            def held(frames, side, past=past, heads=heads):
                return torch.stack([past[frame][side][:, :, heads] for frame in frames], 1)

            own = [x[:, :, :, heads] for x in (seen.chunk.k, seen.chunk.v)]
            k, v = (torch.cat([held(ends, side), x], 1) if ends else x for side, x in enumerate(own))
            k, v = rotate(k, seen.call, frames).flatten(1, 2), v.flatten(1, 2)
            if start >= 9:
                before = range(start - 4, start)
                turned = rotate(held(before, 0), seen.call, before)
                if seen.layer == leader:
                    choices[start] = least_alike(turned, 4)
                k = torch.cat([cut(turned, choices[start], 4), k], 1)
                v = torch.cat([cut(held(before, 1), choices[start], 4), v], 1)
                checked += 1
            logits = torch.einsum("blhd,bmhd->bhlm", part.q, k) / part.q.shape[-1] ** 0.5
            expected = torch.einsum("bhlm,bmhd->blhd", logits.softmax(-1), v)
            torch.testing.assert_close(part.heads.take(seen.out), expected, atol=1e-4, rtol=1e-4)
        for index, frame in enumerate(seen.chunk.frames):  # the last pass over a chunk is what stays
            past[frame] = (seen.chunk.k[:, index], seen.chunk.v[:, index])

    prompts = sample_scene(2, torch.Generator().manual_seed(1)).prompts(torch.arange(10))
    with hf.apply_head_forcing(model, table) as handle, handle.observe(check):
        pipeline = DemoPipeline(model)
        fast = pipeline.generate(prompts, generator=torch.Generator().manual_seed(2))
        checked_once = checked
        again = pipeline.generate(prompts, generator=torch.Generator().manual_seed(2))
    assert checked_once == 7 * 5 * 2
    assert checked == 2 * checked_once
    assert torch.equal(fast, again)
    with hf.apply_head_forcing(model, table, store="reference"):
        slow = DemoPipeline(model).generate(prompts, generator=torch.Generator().manual_seed(2))
    assert torch.equal(fast, slow)


# Edges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("chunks", [70, pytest.param(2000, marks=pytest.mark.slow)])
def test_bytes_stay_bounded_and_a_reset_forgets(store, chunks):
    """Held: a first and a last frame, the current chunk, pieces, and a copy of the last frame.

    In `ring` also rotated keys, and pieces once more, in front of frames.
    """
    role, x = Dynamic(), torch.randn(1, 3, PATCHES, 1, DIM, generator=torch.Generator().manual_seed(1))
    made, sizes = store_class(store)({role: Heads(range(1), 1)}, window=WINDOW, layer=1), set()
    for start in range(0, 3 * chunks, 3):
        made.write(Chunk(start, x, x, GRID))
        made.view(role, "denoise", turn)
        made.view_compressed(role, turn)
        if start >= 9:
            sizes.add(made.nbytes())
    frame = 2 * x[:, :1].nbytes
    more = {"reference": 0, "lean": 5 * 8, "ring": (5 * frame) // 2 + frame + 5 * 8}  # numbers last
    assert sizes == {7 * frame + more[store]}
    made.write(Chunk(0, x, x, GRID))
    assert made.view_compressed(role, turn) is None
    made.reset()
    for start in (0, 3, 6):
        made.write(Chunk(start, x, x, GRID))
        assert made.view_compressed(role, turn) is None


@pytest.mark.parametrize("grid", [None, (5, 1), (1, 7)])
def test_frames_that_have_no_equal_bands_are_refused_before_anything_changes(grid):
    store = store_class("ring")({Dynamic(): Heads(range(1), 1)}, window=WINDOW, layer=1)
    x = torch.zeros(1, 3, 12, 1, 4)
    store.write(Chunk(0, x, x, GRID))
    before = store.nbytes()
    with pytest.raises(StreamShapeError, match="cannot cut them into 6 equal pieces"):
        store.write(Chunk(3, x, x, grid))
    assert (store.committed, store.nbytes()) == (0, before)


@pytest.mark.parametrize("wrong", [{"pieces": 0}, {"positions": "clamped"}, {"sink": -1}, {"skip": 1.0}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RoleError):
        Dynamic(**wrong)


def test_what_was_cut_needs_places_where_positions_are_compact():
    assert Dynamic(positions="compact").fit(8, 3)
    with pytest.raises(WindowError, match="takes 8 positions of 7"):
        Dynamic(positions="compact").fit(7, 3)
    assert Dynamic().fit(5, 3)


def test_dynamic_heads_survive_a_file():
    one = RoleMap(((Dynamic(2, 4, 1, positions="compact"), *PRESETS["forcing_kv"].roles(21, 3).values()),))
    two = RoleMap.from_json(one.to_json())
    assert two == one
    assert hash(two) == hash(one)
    assert {role.compressed().role for role in two.counts() if isinstance(role, Dynamic)} == {
        Dynamic(2, 4, 1, positions="compact"),
        Dynamic(),
    }
