"""Prompt switches: no flushed frame is seen again, a cut is a new video, the new prompt is heard."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import headforcing as hf
from headforcing.demo.world.words import PROMPT_WORDS, WORDS
from headforcing.errors import (
    ChunkOrderError,
    NonFiniteKVError,
    OptionError,
    RoleError,
    StreamActiveError,
    StreamError,
    UnsupportedModelError,
    WindowError,
)
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.episodic import Uniform
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Veil, Wave
from headforcing.stores import STORES, KVStore
from headforcing.stores.compressed import CompressedHistories
from headforcing.stores.ring import RingStore
from headforcing.stores.scenes import Scenes
from headforcing.stores.switch import Switch
from headforcing.testing import snapshot
from headforcing.types import Chunk
from tests.hosts.rig import Caches, Rig
from tests.machine import WINDOW, grouped, tell_every_story
from tests.strategies import frame_tensor

GRID = (2, 2)

# Planted bugs ---------------------------------------------------------------------------------------


def smooth_keeps_recent_frames(patch: pytest.MonkeyPatch) -> None:
    tiers = Switch.tiers.fget
    keep = property(lambda s: ("sink", "episodic", "recent") if s.mode == "smooth" else tiers(s))
    patch.setattr(Switch, "tiers", keep)


def a_cut_does_not_restart_time(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Switch, "restarts", property(lambda s: s.mode == "recall"))


def recall_returns_another_mark(patch: pytest.MonkeyPatch) -> None:
    right = Scenes._survivors

    def wrong(self: Scenes, switch: Switch, *rest: Any) -> Any:
        if switch.mark is not None:
            switch = replace(switch, mark=min(self._marks))
        return right(self, switch, *rest)

    patch.setattr(Scenes, "_survivors", wrong)


def a_switch_takes_effect_at_once(patch: pytest.MonkeyPatch) -> None:
    right = KVStore.write

    def wrong(self: KVStore, chunk: Chunk) -> None:
        asked = self.scenes._switch
        if chunk.frames == self._pending and asked is not None and asked.mode in ("smooth", "cut"):
            self._apply_switch(chunk.start)
        right(self, chunk)

    patch.setattr(KVStore, "write", wrong)


def compressed_histories_outlive_a_switch(patch: pytest.MonkeyPatch) -> None:
    right = KVStore._apply_switch

    def wrong(self: KVStore, start: int) -> None:
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(CompressedHistories, "clear", CompressedHistories.forget_views)
            right(self, start)

    patch.setattr(KVStore, "_apply_switch", wrong)


def the_first_switch_asked_for_counts(patch: pytest.MonkeyPatch) -> None:
    right = Scenes.ask
    patch.setattr(Scenes, "ask", lambda self, switch: right(self, self._switch or switch))


def a_mark_forgets_episodic_frames(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("headforcing.stores.scenes.recalled", lambda role: ("sink", "recent"))


def frames_run_again_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("headforcing.stores.scenes._rows_before", lambda frames, first: range(len(frames)))


PLANTED = [
    smooth_keeps_recent_frames,
    a_cut_does_not_restart_time,
    recall_returns_another_mark,
    a_switch_takes_effect_at_once,
    compressed_histories_outlive_a_switch,
    the_first_switch_asked_for_counts,
    a_mark_forgets_episodic_frames,
    frames_run_again_stay,
]


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(plant, marks=pytest.mark.slow if plant is recall_returns_another_mark else ())
        for plant in PLANTED  # that one shows late in the story
    ],
    ids=lambda plant: plant.__name__,
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError, StreamError, RoleError, WindowError)):
        tell_every_story()


# Stores, case by case -------------------------------------------------------------------------------


def chunk_of(start: int, length: int = 3, take: int = 0, heads: int = 1) -> Chunk:
    x = frame_tensor(range(start, start + length), take, 1, heads, tokens=4)
    return Chunk(start, x, x, GRID, x)


def told(role: HeadRole, store: str = "ring") -> KVStore:
    return STORES[store](grouped([role]), window=WINDOW, layer=0)


@pytest.mark.parametrize("store", sorted(STORES))
def test_frames_run_again_are_recent_and_a_later_smooth_switch_drops_them(store: str) -> None:
    role = Local(6)
    held = told(role, store)
    for start in (0, 3):
        held.write(chunk_of(start))
    for mode, frames, start in (("smooth", 0, 6), ("recache", 6, 3), ("smooth", 0, 6)):
        held.scenes.ask(Switch(mode, frames=frames))
        held.write(chunk_of(start, take=1))
    assert held.frames(role) == [[]]


@pytest.mark.parametrize("store", sorted(STORES))
@pytest.mark.parametrize(
    ("role", "full"),
    [(Averaging(), [0, 1, 2, 29, 30, 31, 32]), (Participating(12, 3, 4, 2), [0, 1, 2, 32])],
    ids=str,
)
def test_after_a_smooth_switch_nothing_is_evicted_while_everything_fits(
    role: HeadRole, full: list[int], store: str
) -> None:
    held = told(role, store)
    for start in range(0, 24, 3):
        held.write(chunk_of(start))
        held.view_compressed(role, lambda x, *_: x)
    held.scenes.ask(Switch("smooth"))
    found = {}
    for start in range(24, 36, 3):
        held.write(chunk_of(start))
        found[start] = held.frames(role)[0], held.view_compressed(role, lambda x, *_: x) is not None
    fits = [0, 1, 2, *range(24, 30)]
    assert found == {24: (fits[:3], False), 27: (fits[:6], False), 30: (fits, False), 33: (full, True)}


@pytest.mark.parametrize("store", sorted(STORES))
def test_first_frames_that_a_cut_keeps_are_merged_into_the_first_block(store: str) -> None:
    role = Veil(3, 1, 9, WINDOW, blocks=2, patch=1)
    held = told(role, store)
    for start in (0, 3, 6, 9, 12, 15):
        if start == 9:
            held.scenes.ask(Switch("cut", ("sink",)))
        held.write(chunk_of(start))
    tokens = held.view_compressed(role, lambda x, *_: x, 15)
    assert tokens is not None
    blocks = [chunk_of(0).v, chunk_of(9, 5).v]
    expected = torch.cat(blocks, 1).unflatten(1, (2, 4)).mean(2).flatten(1, 2)
    torch.testing.assert_close(tokens[1], expected)


@pytest.mark.parametrize("store", sorted(STORES))
def test_frames_of_the_scene_before_cannot_come_again(store: str) -> None:
    held = told(Full(), store)
    for start in (0, 3, 6):
        held.write(chunk_of(start))
    held.scenes.ask(Switch("cut"))
    held.write(chunk_of(9))
    with pytest.raises(StreamError, match=r"restarted at frame 9.*frames=3 or fewer"):
        held.check_switch(Switch("recache", frames=6))
    held.check_switch(Switch("recache", frames=3))


@pytest.mark.parametrize("store", sorted(STORES))
def test_a_commit_between_asking_and_running_again_brings_no_frame_back(store: str) -> None:
    role = Memory(0, 4, 1)
    held = told(role, store)
    for start in range(0, 15, 3):
        held.write(chunk_of(start))
    switch = Switch("recache", frames=3)
    held.check_switch(switch)
    held.scenes.ask(switch)
    held.commit()  # frames 12 and 13 may now be among those chosen by content
    held.write(chunk_of(12, take=1))
    assert all(frame < 12 for frame in held.frames(role)[0])


@pytest.mark.parametrize("mode", ["smooth", "recall"])
def test_a_commit_by_hand_does_not_change_what_a_switch_keeps(mode: Any) -> None:
    role, found = Memory(1, 2, 1), []
    for by_hand in (False, True):
        held = told(role)
        for start in range(0, 15, 3):
            held.write(chunk_of(start))
        held.scenes.mark("a")
        if by_hand:
            held.commit()
        held.scenes.ask(Switch(mode, mark="a" if mode == "recall" else None))
        held.write(chunk_of(15))
        found.append((held.frames(role), sum(t.numel() for t in held.scenes.tensors())))
    assert found[0] == found[1]


def test_memory_stays_the_same_from_switch_to_switch() -> None:
    modes = (
        Switch("smooth"),
        Switch("cut", ("sink",)),
        Switch("recall", mark="a"),
        Switch("recache", frames=3),
    )
    held = RingStore(
        grouped([Local(3, 1), Memory(1, 2, 2), Veil(1, 1, 9, WINDOW, blocks=2)]), window=WINDOW, layer=0
    )
    start, sizes = 0, []
    for number in range(36):
        if number:
            held.scenes.mark("a")
            held.check_switch(modes[number % 4])
            held.scenes.ask(modes[number % 4])
            start -= modes[number % 4].frames
        for _ in range(6):
            held.write(chunk_of(start, heads=3))
            start += 3
        sizes.append(held.nbytes())
    assert sizes[4:20] == sizes[20:]


# Models ---------------------------------------------------------------------------------------------

TABLES: dict[str, list[HeadRole]] = {
    "bounded": [Local(1), Anchor(), Memory(), SlidingWindow(6, 1)],
    "absolute": [
        Full(),
        SlidingWindow(6, 1, positions="absolute"),
        Local(2, 1, positions="absolute"),
        Memory(1, 2, 2, Uniform(), positions="absolute"),
    ],
    "digests": [Veil(far=9, near=6, block=1), Averaging(9, 2), Dynamic(1, 4), Wave(far=9, near=6)],
}


def applied(row: list[HeadRole], window: int = 9, **kind: Any) -> tuple[Rig, hf.HeadForcing]:
    rig = Rig(window, **kind)
    return rig, hf.apply_head_forcing(rig.model, [row, row[::-1]])


def say(
    rig: Rig, caches: Caches, start: int, *, prompt: int = 0, draw: int = 0, noise: int | None = None
) -> Tensor:
    """One pass over three frames; the noise is that of a chunk at `noise`."""
    x = rig.noise(start if noise is None else noise, 3, draw=draw)
    words = (torch.arange(PROMPT_WORDS)[None] + 3 * prompt) % len(WORDS)
    with torch.no_grad():
        out: Tensor = rig.model(
            x,
            t=torch.full((1,), 0.1 * draw),
            context=words,
            kv_cache=caches.kv,
            crossattn_cache=caches.cross,
            current_start=start * rig.config.tokens_per_frame,
        )
    return out


def tell(
    rig: Rig, caches: Caches, starts: range, *, prompt: int = 0, shift: int = 0, steps: int = 2
) -> list[Tensor]:
    """Chunks of three frames, noisy passes and a clean one each."""
    return [
        say(rig, caches, start, prompt=prompt, draw=draw, noise=start + shift)
        for start in starts
        for draw in reversed(range(steps))
    ]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def new_prompt_by_host(caches: Caches) -> None:
    for cross in caches.cross:
        cross["is_init"] = False


FAST_CUTS = [("digests", torch.float32), ("bounded", torch.bfloat16)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if (name, dtype) in FAST_CUTS else pytest.mark.slow)
        for name in TABLES
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_a_cut_is_a_new_video_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    row = TABLES[name]
    fresh, _ = applied(row, dtype=dtype)
    expected = tell(fresh, fresh.caches(), range(0, 18, 3), prompt=1)
    rig, handle = applied(row, dtype=dtype)
    caches = rig.caches()
    tell(rig, caches, range(0, 12, 3))
    say(rig, caches, 12, draw=1)
    handle.switch_prompt("cut")  # in the middle of a chunk
    say(rig, caches, 12)
    assert equal(tell(rig, caches, range(15, 33, 3), prompt=1, shift=-15), expected)


def test_a_cut_that_is_not_asked_for_is_not_a_new_video() -> None:
    fresh, _ = applied(TABLES["bounded"])
    expected = tell(fresh, fresh.caches(), range(0, 6, 3), prompt=1)
    rig, handle = applied(TABLES["bounded"])
    caches = rig.caches()
    tell(rig, caches, range(0, 12, 3))
    handle.switch_prompt("smooth")
    assert not equal(tell(rig, caches, range(12, 18, 3), prompt=1, shift=-12), expected)


@pytest.mark.parametrize(
    "name", ["bounded", *(pytest.param(name, marks=pytest.mark.slow) for name in ("absolute", "digests"))]
)
def test_continue_is_no_call_at_all_where_the_host_projects_the_prompt_anew(name: str) -> None:
    found = []
    for asks in (False, True):
        rig, handle = applied(TABLES[name])
        caches = rig.caches()
        outputs = tell(rig, caches, range(0, 12, 3))
        if asks:
            handle.switch_prompt("continue")
        new_prompt_by_host(caches)
        found.append(outputs + tell(rig, caches, range(12, 24, 3), prompt=1))
    assert equal(*found)


@pytest.mark.parametrize("mode", ["continue", "smooth", "cut", "recall", "recache"])
def test_the_chunk_that_runs_is_rewritten_bit_for_bit(mode: Any) -> None:
    extra = {"recall": {"mark": "a"}, "recache": {"frames": 6}}.get(mode, {})
    rig, handle = applied(TABLES["bounded"], window=12)
    caches = rig.caches()
    tell(rig, caches, range(0, 12, 3))
    handle.mark("a")
    before = [say(rig, caches, 9, draw=draw) for draw in (3, 2, 0)]
    handle.switch_prompt(mode, **extra)
    assert equal([say(rig, caches, 9, draw=draw) for draw in (3, 2, 0)], before)


def test_smooth_keeps_first_and_episodic_frames_and_recall_brings_a_scene_back() -> None:
    row = [Memory(1, 2, 2, Uniform()), Local(3, 1), Anchor(), Full()]
    rig, handle = applied(row, window=9)
    caches = rig.caches()
    tell(rig, caches, range(0, 9, 3))
    handle.mark("street")
    assert handle.marks == ("street",)
    handle.switch_prompt("smooth")
    say(rig, caches, 9, prompt=1)
    assert handle.frames(0, 1) == [[[0]]]
    assert handle.frames(0, 2) == [[[0]]]
    assert handle.frames(0, 3) == [[[]]]
    assert all(frame < 7 for frame in handle.frames(0, 0)[0][0]), "7 and 8 were recent"
    tell(rig, caches, range(12, 18, 3), prompt=1)
    handle.switch_prompt("cut")
    say(rig, caches, 18, prompt=2)
    assert [handle.frames(0, head) for head in range(4)] == [[[[]]]] * 4
    handle.switch_prompt("recall", mark="street")
    say(rig, caches, 21)
    assert set(handle.frames(0, 0)[0][0]) <= set(range(9))
    assert {0, 7, 8} <= set(handle.frames(0, 0)[0][0]), "what was recent comes back as well"
    assert [handle.frames(0, head) for head in (1, 2, 3)] == [[[[0]]], [[[0]]], [[[]]]]
    caches.new_video()
    tell(rig, caches, range(0, 3, 3))
    assert handle.marks == ()


# Running frames again -------------------------------------------------------------------------------

ALL: list[HeadRole] = [Full(), Anchor(), SlidingWindow(21, positions="absolute"), Memory(1, 8, 8)]
"""Roles that hold everything for twenty-one frames, or never attend to what they evict."""


def test_running_frames_again_is_a_run_in_which_the_first_version_never_happened() -> None:
    rig, _ = applied(ALL, window=21)
    caches = rig.caches()
    tell(rig, caches, range(0, 9, 3))
    new_prompt_by_host(caches)
    expected = tell(rig, caches, range(9, 21, 3), prompt=1)
    rig, handle = applied(ALL, window=21)
    caches = rig.caches()
    tell(rig, caches, range(0, 15, 3))
    handle.switch_prompt("recache", frames=6)
    assert equal(tell(rig, caches, range(9, 21, 3), prompt=1), expected)


def test_of_the_frames_before_those_that_run_again_every_head_holds_what_it_held() -> None:
    row = [Local(4), Memory(1, 2, 5, Uniform()), SlidingWindow(8, 1), Anchor(1, 5)]
    rig, handle = applied(row, window=12)
    caches = rig.caches()
    tell(rig, caches, range(0, 15, 3))
    held = [handle.frames(layer, head)[0][0] for layer in (0, 1) for head in range(4)]
    handle.switch_prompt("recache", frames=4)
    say(rig, caches, 11, prompt=1)
    assert [handle.frames(layer, head)[0][0] for layer in (0, 1) for head in range(4)] == [
        [frame for frame in frames if frame < 11] for frames in held
    ]


def test_frames_that_run_again_from_the_wrong_one_are_refused_and_the_right_one_still_works() -> None:
    found = []
    for wrong in ((), (15, 12, 6)):
        rig, handle = applied(ALL, window=21)
        caches = rig.caches()
        tell(rig, caches, range(0, 15, 3))
        handle.switch_prompt("recache", frames=6)
        for start in wrong:
            if start == 12:
                say(rig, caches, 12)  # the chunk that runs may still be rewritten
                continue
            with pytest.raises(ChunkOrderError, match=rf"starts at frame {start}, expected 9.*'recache'"):
                say(rig, caches, start, prompt=1)
        found.append(tell(rig, caches, range(9, 15, 3), prompt=1))
    assert equal(*found)


def test_the_whole_video_can_run_again() -> None:
    fresh, _ = applied(ALL, window=21)
    expected = tell(fresh, fresh.caches(), range(0, 9, 3), prompt=1)
    rig, handle = applied(ALL, window=21)
    caches = rig.caches()
    tell(rig, caches, range(0, 6, 3))
    handle.switch_prompt("recache", frames=6)
    assert equal(tell(rig, caches, range(0, 9, 3), prompt=1), expected)


def test_frames_chosen_by_content_that_cannot_be_told_apart_are_refused_before_anything_changes() -> None:
    found = []
    for asks in (False, True):
        rig = Rig(9)
        rows = [[Local()] * 4, [Memory(1, 2, 1)] * 4]
        handle = hf.apply_head_forcing(rig.model, rows)
        caches, before = rig.caches(), snapshot(rig.model)
        tell(rig, caches, range(0, 18, 3))
        if asks:
            with pytest.raises(StreamError, match=r"layer 1: Memory.*among the last 6: recompute fewer"):
                handle.switch_prompt("recache", frames=6)
            assert before.diff(snapshot(rig.model)) == []
        found.append(tell(rig, caches, range(18, 24, 3)))
        handle.switch_prompt("recache", frames=3)  # those were never chosen
        found[-1] += tell(rig, caches, range(21, 24, 3), prompt=1)
    assert equal(*found)


# The prompt is heard --------------------------------------------------------------------------------


class Projections:
    """Counts how often every layer projects a prompt."""

    def __init__(self, rig: Rig) -> None:
        self.counts = [0] * len(rig.model.blocks)
        for layer, block in enumerate(rig.model.blocks):
            block.cross_attn.k.register_forward_hook(lambda *_, layer=layer: self._count(layer))

    def _count(self, layer: int) -> None:
        self.counts[layer] += 1

    def take(self) -> list[int]:
        counts, self.counts = self.counts, [0] * len(self.counts)
        return counts


@pytest.mark.parametrize(
    "mode",
    ["continue", "recache", *(pytest.param(m, marks=pytest.mark.slow) for m in ("smooth", "cut", "recall"))],
)
def test_a_host_that_keeps_the_old_prompt_hears_the_new_one(mode: Any) -> None:
    extra = {"recall": {"mark": "a"}, "recache": {"frames": 3}}.get(mode, {})
    found = []
    for by_host, by_us in ((True, True), (False, True), (False, False)):
        rig, handle = applied(TABLES["bounded"])
        caches = rig.caches()
        tell(rig, caches, range(0, 9, 3))
        handle.mark("a")
        handle.switch_prompt(mode, **extra)
        if by_host:
            new_prompt_by_host(caches)
        if not by_us:
            for block in rig.model.blocks:
                block.cross_attn._forward_pre_hooks.clear()
        begin = 9 - extra.get("frames", 0)
        found.append(tell(rig, caches, range(begin, begin + 6, 3), prompt=1))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2]), "the control: without us it does not"


def test_every_layer_of_both_branches_projects_once_per_switch_and_the_branches_keep_their_own() -> None:
    rig, handle = applied(TABLES["bounded"])
    with_prompt, without = rig.caches(), rig.caches()

    def passes(start: int, draw: int, prompt: int) -> tuple[list[int], list[int]]:
        say(rig, with_prompt, start, prompt=prompt, draw=draw)
        once = projections.take()
        say(rig, without, start, prompt=7, draw=draw)
        return once, projections.take()

    projections = Projections(rig)
    assert passes(0, 1, 0) == ([1, 1], [1, 1])
    for prompt in (1, 2):
        start = 6 * prompt
        for first in (start - 6, start - 3):
            assert [passes(first, draw, prompt - 1) for draw in (2, 1)][-1] == ([0, 0], [0, 0])
        handle.switch_prompt("smooth")
        handle.switch_prompt("continue")
        assert passes(start - 3, 0, prompt - 1) == ([0, 0], [0, 0]), "not in this chunk"
        assert passes(start, 1, prompt) == ([1, 1], [1, 1])
        assert passes(start, 0, prompt) == ([0, 0], [0, 0])
    keys = [cross["k"] for cross in with_prompt.cross]
    assert not equal(keys, [cross["k"] for cross in without.cross])


def test_after_many_switches_there_is_one_hook_per_layer_and_none_after_remove() -> None:
    rig = Rig(9)
    before = snapshot(rig.model)
    handle = hf.apply_head_forcing(rig.model, Local())
    caches = rig.caches()
    for start in range(0, 15, 3):
        say(rig, caches, start)
        handle.switch_prompt("smooth")
    assert [len(block.cross_attn._forward_pre_hooks) for block in rig.model.blocks] == [1, 1]
    handle.remove()
    assert before.diff(snapshot(rig.model)) == []


def test_the_hooks_of_somebody_else_stay() -> None:
    rig, handle = applied(TABLES["bounded"])
    heard: list[int] = []
    rig.model.blocks[0].cross_attn.register_forward_pre_hook(lambda *_: heard.append(0))
    caches = rig.caches()
    say(rig, caches, 0)
    handle.switch_prompt("cut")
    handle.remove()
    tell(rig, rig.caches(), range(0, 3, 3))
    assert len(heard) == 3


def test_a_deep_copy_hears_its_own_prompts_and_is_cleaned_on_its_own() -> None:
    rig, handle = applied(TABLES["bounded"])
    caches = rig.caches()
    tell(rig, caches, range(0, 6, 3))
    handle.switch_prompt("continue")
    twin = Rig(9)
    twin.model = copy.deepcopy(rig.model)
    own = hf.apply_head_forcing(twin.model, [TABLES["bounded"], TABLES["bounded"][::-1]])
    assert own is not handle
    theirs, projections = twin.caches(), Projections(twin)
    tell(twin, theirs, range(0, 6, 3))
    assert projections.take() == [1, 1]
    own.switch_prompt("smooth")
    tell(twin, theirs, range(6, 9, 3), prompt=1)
    assert projections.take() == [1, 1]
    assert [len(block.cross_attn._forward_pre_hooks) for block in twin.model.blocks] == [1, 1]
    del own
    hf.remove_head_forcing(twin.model)
    assert [len(block.cross_attn._forward_pre_hooks) for block in twin.model.blocks] == [0, 0]
    assert [len(block.cross_attn._forward_pre_hooks) for block in rig.model.blocks] == [1, 1]


def test_a_handle_made_anew_switches_and_takes_the_hooks_out() -> None:
    rig = Rig(9)
    before = snapshot(rig.model)
    caches = rig.caches()
    row = [TABLES["bounded"]] * 2
    handle = hf.apply_head_forcing(rig.model, row)
    say(rig, caches, 0)
    handle.switch_prompt("continue")
    del handle
    handle = hf.apply_head_forcing(rig.model, row)
    handle.switch_prompt("smooth")
    projections = Projections(rig)
    say(rig, caches, 3, prompt=1)
    assert projections.take() == [1, 1]
    for block in rig.model.blocks:
        block.cross_attn.k._forward_hooks.clear()
    handle.remove()
    assert before.diff(snapshot(rig.model)) == []


class Mute(type(Rig().model.blocks[0])):  # type: ignore[misc]
    """A block that hears no prompt."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__["cross_attn"] = lambda x, *_: torch.zeros_like(x)
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["cross_attn"]


def test_a_model_without_cross_attention_is_refused_and_nothing_changes() -> None:
    rig = Rig(9)
    rig.model.blocks[1].__class__ = Mute
    del rig.model.blocks[1].cross_attn
    handle = hf.apply_head_forcing(rig.model, Local())
    caches = rig.caches()
    tell(rig, caches, range(0, 6, 3))
    before = snapshot(rig.model)
    with pytest.raises(UnsupportedModelError, match="no cross_attn"):
        handle.switch_prompt("cut")
    assert before.diff(snapshot(rig.model)) == []
    assert _asked(handle) == set()


def test_an_adapter_that_names_too_few_cross_attentions_is_refused_and_nothing_changes() -> None:
    from headforcing.integrations.self_forcing import SelfForcing

    class Short(SelfForcing):
        def cross_attentions(self, model: Any) -> Any:
            return super().cross_attentions(model)[:1]

    rig = Rig(9)
    handle = hf.apply_head_forcing(rig.model, Local(), adapter=Short())
    say(rig, rig_caches := rig.caches(), 0)
    before = snapshot(rig.model)
    with pytest.raises(StreamError, match="1 cross-attentions for 2 layers"):
        handle.switch_prompt("smooth")
    assert before.diff(snapshot(rig.model)) == []
    assert _asked(handle) == set()
    del rig_caches


# Refusals -------------------------------------------------------------------------------------------


def _asked(handle: hf.HeadForcing) -> set[Any]:
    """Switches that are asked for, over all timelines and layers."""
    streams = [stream for layer in handle._layers for stream in layer.streams.values()]
    return {one for stream in streams for one in (stream.requests.switch, stream.store.scenes._switch)} - {
        None
    }


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mode": "fade"}, OptionError, "expected one of continue, smooth, cut, recall, recache"),
    ({"mode": None}, OptionError, "mode is None"),
    ({"mode": ["cut"]}, OptionError, "expected one of"),
    ({"mode": "smooth", "keep": ("sink",)}, OptionError, "keep goes with mode 'cut': got mode 'smooth'"),
    ({"mode": "cut", "frames": 3}, OptionError, "frames goes with mode 'recache': got mode 'cut'"),
    ({"mode": "cut", "mark": "a"}, OptionError, "mark goes with mode 'recall': got mode 'cut'"),
    ({"mode": "continue", "mark": ""}, OptionError, "mark goes with mode 'recall'"),
    ({"mode": "cut", "keep": ("recent",)}, OptionError, "expected some of sink, episodic"),
    ({"mode": "cut", "keep": "sink"}, OptionError, "expected some of sink, episodic"),
    ({"mode": "cut", "keep": [1, "x", ["sink"]]}, OptionError, "expected some of sink, episodic"),
    ({"mode": "recall"}, OptionError, "requires mark"),
    ({"mode": "recall", "mark": "b"}, StreamError, "nothing is marked 'b', marks are: a"),
    ({"mode": "recall", "mark": 5}, StreamError, "nothing is marked 5"),
    ({"mode": "recache"}, OptionError, "requires frames"),
    ({"mode": "recache", "frames": -3}, OptionError, "expected a number of frames"),
    ({"mode": "recache", "frames": 3.0}, OptionError, "expected a number of frames"),
    ({"mode": "recache", "frames": True}, OptionError, "expected a number of frames"),
    ({"mode": "recache", "frames": 7}, StreamError, "7 of 6 frames cannot be recomputed"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_and_nothing_changes(
    wrong: dict[str, Any], kind: type[Exception], message: str
) -> None:
    rig, handle = applied(TABLES["bounded"])
    caches = rig.caches()
    tell(rig, caches, range(0, 6, 3))
    handle.mark("a")
    before, bytes_before = snapshot(rig.model), handle.status().stored_bytes
    with pytest.raises(kind, match=message):
        handle.switch_prompt(**wrong)
    assert before.diff(snapshot(rig.model)) == []
    assert _asked(handle) == set()
    assert (handle.marks, handle.status().stored_bytes) == (("a",), bytes_before)


def test_a_refused_switch_leaves_the_one_asked_for_before() -> None:
    rig, handle = applied(TABLES["bounded"])
    caches = rig.caches()
    tell(rig, caches, range(0, 6, 3))
    handle.switch_prompt("smooth")
    with pytest.raises(StreamError):
        handle.switch_prompt("recall", mark="never")
    assert _asked(handle) == {Switch("smooth")}


@pytest.mark.parametrize("name", [None, 5, ["a"]])
def test_a_mark_needs_a_name(name: Any) -> None:
    rig, handle = applied(TABLES["bounded"])
    caches = rig.caches()
    say(rig, caches, 0)
    with pytest.raises(OptionError, match="expected a text"):
        handle.mark(name)
    say(rig, caches, 3)
    assert handle.marks == ()


def test_without_a_running_video_there_is_nothing_to_switch_or_mark() -> None:
    rig, handle = applied(TABLES["bounded"])
    caches = rig.caches()
    before = snapshot(rig.model)
    for ask in (lambda: handle.switch_prompt("cut"), lambda: handle.mark("a")):
        with pytest.raises(StreamError, match="no video is running"):
            ask()
        say(rig, caches, 0)
        handle.reset()
    assert before.diff(snapshot(rig.model)) == []
    say(rig, caches, 0)
    handle.remove()
    with pytest.raises(StreamError, match="no video is running"):
        handle.switch_prompt("cut")


def test_a_new_video_drops_what_was_asked_for() -> None:
    fresh, _ = applied(TABLES["bounded"])
    expected = tell(fresh, fresh.caches(), range(0, 9, 3))
    rig, handle = applied(TABLES["bounded"])
    caches = rig.caches()
    tell(rig, caches, range(0, 9, 3))
    handle.mark("a")
    handle.switch_prompt("recall", mark="a")
    caches.new_video()
    assert equal(tell(rig, caches, range(0, 9, 3)), expected)
    assert (handle.marks, _asked(handle)) == ((), set())


@pytest.mark.parametrize("what", ["switch", "mark"])
def test_inside_an_attention_call_nothing_can_be_asked_for(what: str) -> None:
    rig, handle = applied(TABLES["bounded"])
    caches = rig.caches()
    say(rig, caches, 0)
    attention = rig.model.blocks[0].self_attn
    removable = attention.o.register_forward_hook(
        lambda *_: handle.mark("a") if what == "mark" else handle.switch_prompt("cut")
    )
    with pytest.raises(StreamActiveError, match="inside an attention call"):
        say(rig, caches, 3)
    removable.remove()
    assert (_asked(handle), handle.marks) == (set(), ())


# Known to be wrong ----------------------------------------------------------------------------------


def test_between_two_layers_of_a_pass_nothing_can_be_asked_for() -> None:
    rig, handle = applied(TABLES["bounded"])
    caches = rig.caches()
    tell(rig, caches, range(0, 6, 3))
    seen: dict[int, Any] = {}
    removable = rig.model.blocks[0].register_forward_hook(lambda *_: handle.switch_prompt("cut"))
    with handle.observe(lambda o: seen.update({o.layer: sorted(o.frames)})):
        try:
            say(rig, caches, 6)
        except StreamActiveError:
            return
    removable.remove()
    assert seen[0] == seen[1], "every layer switches in the same chunk"


@pytest.mark.parametrize("layer", [0, 1])
def test_the_new_prompt_is_heard_also_where_the_first_pass_failed(layer: int) -> None:
    rig, handle = applied(TABLES["bounded"])
    caches = rig.caches()
    tell(rig, caches, range(0, 6, 3))
    handle.switch_prompt("continue")

    def fail(*_: Any) -> None:
        raise MemoryError

    removable = rig.model.blocks[layer].self_attn.o.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        say(rig, caches, 6, prompt=1, draw=1)
    removable.remove()
    found = tell(rig, caches, range(6, 9, 3), prompt=1)
    rig, _ = applied(TABLES["bounded"])
    caches = rig.caches()
    tell(rig, caches, range(0, 6, 3))
    new_prompt_by_host(caches)
    assert equal(found, tell(rig, caches, range(6, 9, 3), prompt=1))


def test_a_broken_chunk_can_run_again() -> None:
    rig, handle = applied(ALL, window=21)
    caches = rig.caches()
    tell(rig, caches, range(0, 6, 3))
    removable = rig.model.blocks[1].self_attn.k.register_forward_hook(lambda _, __, out: out * torch.nan)
    say(rig, caches, 6)
    removable.remove()
    handle.switch_prompt("recache", frames=3)
    say(rig, caches, 6, prompt=1)


def test_a_broken_chunk_that_should_run_again_leaves_the_layers_alike() -> None:
    rig, handle = applied(ALL, window=21)
    caches = rig.caches()
    tell(rig, caches, range(0, 9, 3))
    removable = rig.model.blocks[1].self_attn.k.register_forward_hook(lambda _, __, out: out * torch.nan)
    say(rig, caches, 9)
    removable.remove()
    handle.switch_prompt("recache", frames=6)
    try:
        say(rig, caches, 6, prompt=1)
    except NonFiniteKVError:
        stores = [stream.store for layer in handle._layers for stream in layer.streams.values()]
        assert len({(store.pending, store.committed) for store in stores}) == 1
