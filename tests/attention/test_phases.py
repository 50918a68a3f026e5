"""Phases: who tells the clean pass from noisy ones, and a role that sees less in it."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import headforcing as hf
from headforcing.attention.observation import Observation
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.model.pipeline import NOISE_LEVELS, DemoPipeline
from headforcing.demo.world.words import PROMPT_WORDS
from headforcing.errors import (
    RoleError,
    StreamError,
    UnsupportedModelError,
    WindowError,
)
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.base import bounded, sees_compressed
from headforcing.roles.episodic import Uniform
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.maps.role_map import RoleMap
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from headforcing.stores import STORES, store_class
from headforcing.testing import snapshot
from headforcing.types import Chunk, Heads, KVView
from tests.hosts.rig import Caches, Rig
from tests.strategies import frame_tensor, queries

WINDOW, CHUNK = 12, 4


def encode(x: Tensor, positions: Any, patch: int = 1) -> Tensor:
    """Stands for RoPE: exact, and different for every position."""
    return x + 1000.0 * torch.tensor(positions, dtype=x.dtype)[:, None, None, None]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# The role -------------------------------------------------------------------------------------------


class Pair:
    """A role and the same one inside Commit Forcing, side by side in one store."""

    def __init__(self, role: HeadRole, window: int, store: str) -> None:
        self.role, self.forced = role, dataclasses.replace(role, clean_window=window)
        heads = {self.role: Heads([0], 2), self.forced: Heads([1], 2)}
        self.store = store_class(store)(heads, window=WINDOW, layer=0)

    def write(self, start: int, length: int, take: int = 0) -> None:
        x = frame_tensor(range(start, start + length), take, 1, 1, tokens=4).expand(-1, -1, -1, 2, -1)
        self.store.write(Chunk(start, x, -x, (2, 2)))

    def see(self, role: HeadRole, phase: Any, query: int | None = None) -> KVView:
        return self.store.view(role, phase, encode, query)


def same(one: KVView, other: KVView) -> bool:
    known = (one.frames, one.positions) == (other.frames, other.positions)
    return known and torch.equal(one.k, other.k) and torch.equal(one.v, other.v)


ROLES: list[HeadRole] = [
    Full(),
    Local(3, 1),
    Local(8),
    Local(2, 3, positions="clamped"),
    Anchor(3, 2),
    SlidingWindow(8, 2),
    SlidingWindow(9, 1, positions="absolute"),
    Memory(1, 2, 3),
    Memory(2, 4, 2, Uniform()),
    Memory(1, 3, 2, Uniform(), positions="absolute"),
    Wave(1, 2, 9, WINDOW, period=3, cap=2),
    Strided(2, 1, 9, WINDOW, period=2, cap=3),
    Veil(2, 2, 9, WINDOW, blocks=2, block=2),
]


@given(
    role=st.sampled_from(ROLES),
    window=st.integers(CHUNK, 16),
    lengths=st.lists(st.integers(1, CHUNK), min_size=1, max_size=9),
    store=st.sampled_from(sorted(STORES)),
)
def test_the_clean_pass_sees_the_newest_frames_and_noisy_ones_what_the_role_sees(
    role: HeadRole, window: int, lengths: list[int], store: str
) -> None:
    pair, start = Pair(role, window, store), 0
    for length in lengths:
        for take in (1, 0):
            pair.write(start, length, take)
            for query in queries(role, range(start, start + length)):
                plain = pair.see(role, "denoise", query)
                assert same(pair.see(pair.forced, "denoise", query), plain)
                clean = pair.see(pair.forced, "clean", query)
                newest = [
                    row for row, f in enumerate(plain.frames) if f is not None and f >= _first(pair, window)
                ]
                assert clean.frames == tuple(plain.frames[row] for row in newest)
                assert torch.equal(clean.v, plain.v[:, newest])
                assert torch.equal(clean.k, encode(_raw(plain)[:, newest], clean.positions))
                assert clean.positions[0] >= 0
                assert not bounded(role) or clean.positions[-1] < WINDOW
                if None not in plain.frames and window >= start + length:
                    assert same(clean, plain), "a window as large as everything"
                assert same(pair.see(pair.forced, "denoise", query), plain), "also after a clean look"
        assert pair.store.frames(pair.forced) == pair.store.frames(role)
        start += length


def _first(pair: Pair, window: int) -> int:
    assert pair.store.pending is not None
    return pair.store.pending.stop - window


def _raw(view: KVView) -> Tensor:
    """Keys before RoPE: values are their negatives."""
    return -view.v


@pytest.mark.parametrize(
    "role",
    [Averaging(12, 3), Local(5), Local(5, 2, positions="clamped"), Memory(1, 2, 4)],
    ids=lambda role: type(role).__name__,
)
@pytest.mark.parametrize("window", [3, 4, 6])
def test_neighbours_stay_neighbours_in_the_clean_pass(role: HeadRole, window: int) -> None:
    pair = Pair(role, window, "ring")
    for start in range(0, 30, 3):
        pair.write(start, 3)
        clean = pair.see(pair.forced, "clean")
        steps = [b - a for a, b in zip(clean.positions, clean.positions[1:], strict=False)]
        frames = [b - a for a, b in zip(clean.frames, clean.frames[1:], strict=False)]  # type: ignore[operator]
        assert steps == frames


def test_frames_chosen_by_content_and_compressed_tokens_are_hidden_in_the_clean_pass() -> None:
    memory = Pair(Memory(1, 3, 2), 9, "ring")
    for start in range(0, 30, 3):
        memory.write(start, 3)
    assert memory.see(memory.role, "denoise").frames.count(None) == 3
    assert memory.see(memory.forced, "clean").frames == (25, 26, 27, 28, 29)
    known = Pair(Memory(1, 3, 2, Uniform()), 9, "ring")
    for start in range(0, 30, 3):
        known.write(start, 3)
    assert all(frame >= 21 for frame in known.see(known.forced, "clean").frames if frame is not None)
    for role in (Veil(), Averaging(), Dynamic()):
        forced = dataclasses.replace(role, clean_window=6)
        assert [sees_compressed(forced, phase) for phase in ("denoise", "clean")] == [True, False]
        assert type(forced.compressed()) is type(role.compressed())


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Local(clean_window=-1), RoleError, "expected a number of frames"),
        (lambda: Local(clean_window=3.0), RoleError, "expected a number of frames"),
        (lambda: Local(clean_window=True), RoleError, "expected a number of frames"),
        (lambda: Local(clean_window=2).fit(12, 3), WindowError, "does not see the current chunk"),
        (lambda: Local(10, clean_window=3).fit(12, 3), WindowError, "keeps 10 frames"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


EVERY: list[HeadRole] = [
    Local(6),
    Anchor(),
    Memory(),
    Memory(1, 2, 2, Uniform(), positions="absolute"),
    SlidingWindow(6, 1, positions="absolute"),
    Full(),
    *PRESETS["pyramid_forcing"].roles(9, 3).values(),
    Averaging(9, 2),
    Dynamic(1, 4),
]


@pytest.mark.parametrize("role", EVERY, ids=lambda role: type(role).__name__)
def test_it_comes_back_from_a_file_as_it_was(role: HeadRole, tmp_path: Any) -> None:
    roles = RoleMap.uniform(dataclasses.replace(role, clean_window=6), 2, 4).fit(2, 4, 9, 3)
    roles.save(tmp_path / "roles.json")
    assert RoleMap.load(tmp_path / "roles.json").layers == roles.layers
    assert dataclasses.replace(roles.layers[0][0], clean_window=None) == role.fit(9, 3), "open numbers too"


# Models ---------------------------------------------------------------------------------------------

Seen = list[tuple[int, str, int, tuple[tuple[int | None, ...], ...]]]


def watched(rig: Rig, handle: hf.HeadForcing, caches: Caches, starts: range, passes: int = 2) -> Seen:
    """Layer, phase, start and frames of every look, over a video."""
    seen: Seen = []

    def note(o: Observation) -> None:
        seen.append((o.layer, o.call.phase, o.call.start, tuple(o.frames)))

    with handle.observe(note):
        for start in starts:
            for draw in reversed(range(passes)):
                rig.call(caches, start, 3, draw=draw)
    return seen


def test_the_host_tells_the_clean_pass_and_every_layer_hears() -> None:
    rig = Rig(9)
    handle = hf.apply_head_forcing(rig.model, Local(6, clean_window=3))
    for layer, phase, start, frames in watched(rig, handle, rig.caches(), range(0, 15, 3), passes=3):
        assert layer in (0, 1)
        first = start if phase == "clean" else max(start - 6, 0)
        assert frames == (tuple(range(first, start + 3)),)
    phases = [
        phase for layer, phase, *_ in watched(rig, handle, rig.caches(), range(0, 6, 3), 3) if not layer
    ]
    assert phases == ["denoise", "denoise", "clean"] * 2


@pytest.mark.parametrize(
    "role", [Local(6), Memory(1, 3, 2), Full(), Wave(near=6, far=9)], ids=lambda r: type(r).__name__
)
def test_with_the_clean_pass_left_out_it_is_the_role_inside(role: HeadRole) -> None:
    """Until the first clean pass that sees less, and for ever where the window is as large as everything."""
    outputs = []
    for wrapped in (role, dataclasses.replace(role, clean_window=99)):
        rig = Rig(9)
        hf.apply_head_forcing(rig.model, wrapped)
        caches = rig.caches()
        chunks = 2 if isinstance(role, Memory) else 6  # later frames are chosen by content
        outputs.append(rig.video(caches, chunks))
    assert equal(*outputs)


def test_a_role_that_sees_less_in_the_clean_pass_makes_another_video_from_the_second_chunk_on() -> None:
    outputs = []
    for wrapped in (Local(6), Local(6, clean_window=3)):
        rig = Rig(9)
        hf.apply_head_forcing(rig.model, wrapped)
        outputs.append(rig.video(rig.caches(), 3))
    alike = [torch.equal(x, y) for x, y in zip(*outputs, strict=True)]
    assert alike == [True, True, True, False, False, False]  # noisy and clean pass of three chunks


def written_out(o: Observation, role: Local, keys: dict[int, Tensor], values: dict[int, Tensor]) -> Tensor:
    """Attention of all heads to the frames they should see, one softmax, nothing clever."""
    start, chunk = o.call.start, o.q.shape[1]
    kept = list(range(max(start - role.recent, 0), start))
    if o.call.phase == "clean":
        kept = [frame for frame in kept if frame >= start + chunk - role.clean_window]
    k = torch.cat([*(keys[frame] for frame in kept), o.chunk.k], 1)
    v = torch.cat([*(values[frame] for frame in kept), o.chunk.v], 1)
    places = range(len(kept) + chunk)
    k, q = o.encode(k, tuple(places)), o.encode(o.q, tuple(places[len(kept) :]))
    q, k, v = (x.flatten(1, 2).transpose(1, 2).double() for x in (q, k, v))  # [B, H, tokens, D]
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


def test_on_the_demo_pipeline_attention_is_what_the_definition_says() -> None:
    model = DemoModel(DemoConfig(dim=64, heads=4, layers=2, window=9))
    model.randomize(torch.Generator().manual_seed(3))
    model.eval().requires_grad_(False)
    role = Local(6, clean_window=4)
    pipe = DemoPipeline(model)
    handle = hf.apply_head_forcing(model, role)
    keys: list[dict[int, Tensor]] = [{}, {}]
    values: list[dict[int, Tensor]] = [{}, {}]
    phases = []

    def check(o: Observation) -> None:
        phases.append(o.call.phase)
        expected = written_out(o, role, keys[o.layer], values[o.layer])
        assert torch.allclose(o.out.double(), expected, atol=1e-5)
        if o.call.phase == "clean":
            for index in range(o.q.shape[1]):
                keys[o.layer][o.call.start + index] = o.chunk.k[:, index : index + 1].clone()
                values[o.layer][o.call.start + index] = o.chunk.v[:, index : index + 1].clone()

    prompts = torch.arange(PROMPT_WORDS).view(1, 1, -1)
    with handle.observe(check):
        pipe.generate(prompts, 4, generator=torch.Generator().manual_seed(0))
    one_chunk = ["denoise"] * 2 * len(NOISE_LEVELS) + ["clean"] * 2
    assert phases == one_chunk * 4


# Who does not know, and who is told wrong -----------------------------------------------------------


class Deaf(SelfForcing):
    """Cannot tell which pass it is."""

    def clock(self, model: Any) -> None:
        return None


def test_without_a_clock_the_role_is_refused_at_apply_and_nothing_changes() -> None:
    rig = Rig(9)
    before = snapshot(rig.model)
    rows = [[Local(6)] * 4, [Local(6), Local(6), Local(6), Local(6, clean_window=3)]]
    with pytest.raises(UnsupportedModelError, match=r"clean_window=3.*self_forcing cannot tell which pass"):
        hf.apply_head_forcing(rig.model, rows, adapter=Deaf())
    assert before.diff(snapshot(rig.model)) == []
    handle = hf.apply_head_forcing(rig.model, Local(6), adapter=Deaf())
    applied = snapshot(rig.model)
    with pytest.raises(UnsupportedModelError):
        hf.apply_head_forcing(rig.model, rows, adapter=Deaf(), replace=True)
    assert applied.diff(snapshot(rig.model)) == []
    handle.remove()
    assert before.diff(snapshot(rig.model)) == []


def test_a_model_inside_which_two_could_be_the_clock_is_refused() -> None:
    rig = Rig(9)
    rig.model.other = torch.nn.ModuleDict(
        {"time_embedding": torch.nn.Identity(), "blocks": torch.nn.Identity()}
    )
    with pytest.raises(UnsupportedModelError, match="cannot tell which pass"):
        hf.apply_head_forcing(rig.model, Local(6, clean_window=3))


def test_roles_that_do_not_ask_bring_no_hook_and_read_nothing() -> None:
    rig = Rig(9)
    hf.apply_head_forcing(rig.model, Local(6))
    assert not rig.model._forward_pre_hooks


def test_a_host_that_writes_its_cache_at_another_level_must_say_so() -> None:
    for noise, works in ((0, False), (0.1, True)):
        rig = Rig(9)
        handle = hf.apply_head_forcing(
            rig.model, Local(6, clean_window=3), adapter=SelfForcing(context_noise=noise)
        )
        caches = rig.caches()
        for draw in (3, 2, 1):
            rig.call(caches, 0, 3, draw=draw)
        if works:
            assert [phase for _, phase, *_ in watched(rig, handle, caches, range(3, 6, 3))][-1] == "denoise"
            continue
        held = [stream.store.committed for layer in handle._layers for stream in layer.streams.values()]
        with pytest.raises(
            StreamError, match=r"frames 0\.\.2 had no clean pass.*SelfForcing\(context_noise="
        ):
            rig.call(caches, 3, 3, draw=3)
        assert held == [
            stream.store.committed for layer in handle._layers for stream in layer.streams.values()
        ]
        rig.call(caches, 0, 3, draw=0)  # a clean pass helps
        rig.call(caches, 3, 3, draw=3)


def test_attention_outside_the_model_does_not_know_its_phase() -> None:
    rig = Rig(9)
    hf.apply_head_forcing(rig.model, Local(6, clean_window=3))
    caches = rig.caches()
    for number in list(rig.model._forward_pre_hooks):
        del rig.model._forward_pre_hooks[number]
    with pytest.raises(StreamError, match="outside the model that tells it"):
        rig.call(caches, 0, 3)


def test_two_threads_in_different_passes_are_told_apart() -> None:
    """While one thread is between two layers of a pass, another one makes a whole pass of the other kind."""
    rig = Rig(9)
    handle = hf.apply_head_forcing(rig.model, Local(6, clean_window=3))
    alone = watched(rig, handle, rig.caches(), range(0, 9, 3))
    seen: dict[bool, Seen] = {True: [], False: []}
    mine, theirs = rig.caches(), rig.caches()
    other_passes = [(start, draw) for start in range(0, 9, 3) for draw in (1, 0)]

    def note(o: Observation) -> None:
        here = threading.current_thread() is threading.main_thread()
        seen[here].append((o.layer, o.call.phase, o.call.start, tuple(o.frames)))
        if here and o.layer == 0 and other_passes:
            start, draw = other_passes.pop(0)
            worker = threading.Thread(target=lambda: rig.call(theirs, start, 3, draw=draw))
            worker.start()
            worker.join()

    rig.call(mine, 0, 3, draw=1)  # so that the passes are of different kinds from now on
    with handle.observe(note):
        for start in range(0, 9, 3):
            for draw in (0,) if start == 0 else (1, 0):
                rig.call(mine, start, 3, draw=draw)
    assert seen[True] == alone[2:]
    assert seen[False] == alone[:-2]


# Nothing stays --------------------------------------------------------------------------------------


def test_after_remove_the_model_is_what_it_was() -> None:
    rig = Rig(9)
    before = snapshot(rig.model)
    for _ in range(2):
        handle = hf.apply_head_forcing(rig.model, Local(6, clean_window=3))
        assert len(rig.model._forward_pre_hooks) == 1
        caches = rig.caches()
        rig.video(caches, 2)
        handle.remove()
        assert before.diff(snapshot(rig.model)) == []
    handle = hf.apply_head_forcing(rig.model, Local(6, clean_window=3))
    del handle
    hf.apply_head_forcing(rig.model, Local(6, clean_window=3))
    assert len(rig.model._forward_pre_hooks) == 1
    hf.apply_head_forcing(rig.model, Local(6, clean_window=6), replace=True)
    assert len(rig.model._forward_pre_hooks) == 1
    hf.apply_head_forcing(rig.model, Local(), replace=True)
    assert not rig.model._forward_pre_hooks
    hf.remove_head_forcing(rig.model)
    assert before.diff(snapshot(rig.model)) == []


def test_a_deep_copy_is_cleaned_on_its_own() -> None:
    rig = Rig(9)
    hf.apply_head_forcing(rig.model, Local(6, clean_window=3))
    twin = copy.deepcopy(rig.model)
    hf.remove_head_forcing(twin)
    assert (len(twin._forward_pre_hooks), len(rig.model._forward_pre_hooks)) == (0, 1)
    twin = copy.deepcopy(rig.model)
    hf.remove_head_forcing(rig.model)
    assert (len(twin._forward_pre_hooks), len(rig.model._forward_pre_hooks)) == (1, 0)


def test_a_wrapper_of_the_model_hears_as_well() -> None:
    rig = Rig(9)
    wrapper = torch.nn.Sequential(rig.model)
    handle = hf.apply_head_forcing(wrapper, Local(6, clean_window=3), window=9, chunk=3)
    assert {phase for _, phase, *_ in watched(rig, handle, rig.caches(), range(0, 3, 3))} == {
        "denoise",
        "clean",
    }
    handle.remove()
    assert not rig.model._forward_pre_hooks


def test_a_switch_and_a_clean_pass_go_together() -> None:
    """After a cut the clean pass sees the newest frames of the new scene only."""
    rig = Rig(9)
    handle = hf.apply_head_forcing(rig.model, Local(6, clean_window=5))
    caches = rig.caches()
    watched(rig, handle, caches, range(0, 12, 3))
    handle.switch_prompt("cut")
    clean = [
        frames for _, phase, _, frames in watched(rig, handle, caches, range(12, 21, 3)) if phase == "clean"
    ]
    assert clean[::2] == [((12, 13, 14),), ((13, 14, 15, 16, 17),), ((16, 17, 18, 19, 20),)]


# Known to be wrong ----------------------------------------------------------------------------------


def test_a_deep_copy_sees_less_in_the_clean_pass_too() -> None:
    rig = Rig(9)
    role = Local(6, clean_window=3)
    handle = hf.apply_head_forcing(rig.model, role)
    expected = watched(rig, handle, rig.caches(), range(0, 9, 3))
    rig.model = copy.deepcopy(rig.model)
    own = hf.apply_head_forcing(rig.model, role)
    assert own is not handle
    assert watched(rig, own, rig.caches(), range(0, 9, 3)) == expected


@pytest.mark.parametrize("how", ["wrong start", "failed pass"])
def test_a_refused_or_failed_pass_does_not_count_as_the_last_one(how: str) -> None:
    rig = Rig(9)
    hf.apply_head_forcing(rig.model, Local(6, clean_window=3))
    caches = rig.caches()
    rig.video(caches, 2)
    if how == "wrong start":
        with pytest.raises(StreamError, match="expected 6"):
            rig.call(caches, 12, 3, draw=1)
    else:
        removable = rig.model.blocks[0].self_attn.q.register_forward_hook(_fail)
        with pytest.raises(MemoryError):
            rig.call(caches, 6, 3, draw=1)
        removable.remove()
    rig.call(caches, 6, 3, draw=1)


def _fail(*_: Any) -> None:
    raise MemoryError


def test_a_commit_by_hand_without_a_clean_pass_is_refused() -> None:
    rig = Rig(9)
    handle = hf.apply_head_forcing(rig.model, Local(6, clean_window=3))
    caches = rig.caches()
    rig.call(caches, 0, 3, draw=1)
    with pytest.raises(StreamError, match="no clean pass"):
        handle.commit()


def test_pieces_of_a_role_and_of_the_same_one_inside_are_chosen_apart() -> None:
    inner, seen = Dynamic(1, 4, 0), []
    for beside in (Local(clean_window=3), dataclasses.replace(inner, clean_window=3)):
        first = store_class("ring")({inner: Heads([0], 2), beside: Heads([1], 2)}, window=WINDOW, layer=0)
        second = store_class("ring")({inner: Heads([0, 1], 2)}, window=WINDOW, layer=1)
        second.compressed.shared = first.compressed.shared
        for start in range(0, 12, 3):
            x = frame_tensor(range(start, start + 3), 0, 1, 2, tokens=4)
            for store in (first, second):
                store.write(Chunk(start, x, x, (2, 2)))
                tokens = [store.view_compressed(role, encode) for role in store.heads]
        assert tokens[0] is not None
        seen.append(tokens[0][1])
    assert torch.equal(*seen), "the second layer takes over what the same role chose in the first"
