"""Videos of several shots, and hosts that edit their caches: between calls that fail, in every mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing.adapters import rope
from headforcing.adapters.base import find_adapter
from headforcing.errors import (
    ExternalEditError,
    OptionError,
    ProfileError,
    StreamError,
    UnsupportedModelError,
    WindowError,
)
from headforcing.integrations.rolling_forcing import RollingForcing
from headforcing.measure.metrics.output_regret import OutputRegret
from headforcing.measure.profiler import Protocol, profile_heads
from headforcing.roles import Anchor, HeadRole, Local, Memory, Rolling, SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided
from headforcing.roles.windows import check_pin
from headforcing.stores import STORES, KVStore, store_class
from headforcing.stores.shifts import Shifts
from headforcing.stores.switch import Switch
from headforcing.types import Chunk, Heads, Pin, Truncation
from tests.hosts.longlive import LongLiveHost
from tests.hosts.longlive2 import LongLive2Host, LongLive2Model
from tests.hosts.rolling_forcing import RollingForcingHost
from tests.hosts.standin import TOKENS

HOST = LongLive2Host()
CHUNK, FRAMES, CUT, OFFSET = 3, 42, 12, 8.0
STORES = sorted(STORES)
OWN = SlidingWindow(9, 1, positions="absolute")
MODES = (torch.no_grad, torch.inference_mode)
FEW_HOSTS = ((False, False, 2.5), (True, True, 0.0))
"""Relative positions, an emptied cache, an offset: a fast run has each once."""


def model_of(sink: int = 3, relative: bool = False, shared: bool = True) -> LongLive2Model:
    """A model whose sink may be shared by the video and a later shot."""
    model = HOST.model()
    model.use_relative_rope = relative
    for block in model.blocks:
        block.self_attn.sink_size = sink
        block.self_attn.global_sink_size = sink if shared else 0
    return model


def applied(model: LongLive2Model, role: HeadRole | None = None) -> hf.HeadForcing:
    positions = "compact" if model.use_relative_rope else "absolute"
    return hf.apply_head_forcing(model, role or SlidingWindow(9, sink_of(model), positions=positions))


def sink_of(model: LongLive2Model) -> int:
    return int(model.blocks[0].self_attn.sink_size)


def run(model: LongLive2Model, caches: Any, start: int, draw: int) -> Tensor:
    with torch.no_grad():
        return HOST.call(model, caches, start, CHUNK, draw)


def pin(model: LongLive2Model, caches: Any) -> None:
    """As the pipeline does behind the first chunk of a shot."""
    for cache in caches["kv"]:
        cache["pinned_start"].fill_(int(cache["local_end_index"]) - CHUNK * TOKENS)
        cache["pinned_len"].fill_(min(sink_of(model), CHUNK) * TOKENS)


def empty(model: LongLive2Model, caches: Any, start: int) -> None:
    """As the pipeline does before the clean pass of such a chunk."""
    for cache in caches["kv"]:
        cache["local_end_index"].fill_(int(model.blocks[0].self_attn.global_sink_size) * TOKENS)
        cache["global_end_index"].fill_(start * TOKENS)
        cache["pinned_start"].fill_(-1)
        cache["pinned_len"].zero_()


def video(
    model: LongLive2Model, caches: Any, cuts: Sequence[int] = (CUT,), offset: float = 0, emptied: bool = False
) -> list[Tensor]:
    """Two noisy passes and a clean one per chunk; another shot begins at every cut."""
    outs = []
    model.rope_temporal_offset = 0.0
    for start in range(0, FRAMES, CHUNK):
        if start in cuts:
            model.rope_temporal_offset += offset
        outs += [run(model, caches, start, draw) for draw in (2, 1)]
        if start in cuts and emptied:
            empty(model, caches, start)
        outs.append(run(model, caches, start, 0))
        if start in cuts:
            pin(model, caches)
    return outs


def counted(caches: Any) -> list[list[int]]:
    names = ("global_end_index", "local_end_index", "pinned_start", "pinned_len")
    return [[int(cache[name]) for name in names] for cache in caches["kv"]]


def chunk_of(start: int, frames: int = CHUNK, shift: float = 0) -> Chunk:
    k = torch.arange(start, start + frames, dtype=torch.float32).view(1, frames, 1, 1, 1)
    return Chunk(start, k.expand(1, frames, 2, 1, 4), k.expand(1, frames, 2, 1, 4), (1, 2), shift=shift)


def store_of(name: str, role: HeadRole, window: int = 9) -> KVStore:
    return store_class(name)({role: Heads((0,), 1)}, window=window, layer=0)


def seen(store: KVStore, role: HeadRole) -> tuple[list[int | None], list[float], list[float]]:
    view = store.view(role, "denoise", lambda x, positions: x)
    assert torch.equal(view.k, view.v)  # as in `chunk_of`
    return list(view.frames), list(view.positions), view.v[0, :, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("relative", "emptied", "offset"),
    [
        pytest.param(*case, marks=() if case in FEW_HOSTS else pytest.mark.slow)
        for case in product((False, True), (False, True), (0.0, 2.5))
    ],
)
@pytest.mark.parametrize("cuts", [(6, 24)], ids=str)
def test_the_hosts_own_memory_changes_nothing(
    relative: bool, emptied: bool, offset: float, cuts: Sequence[int]
) -> None:
    plain, model = model_of(relative=relative), model_of(relative=relative)
    theirs, mine = HOST.caches(plain), HOST.caches(model)
    applied(model)
    for _ in range(2):  # and a second video on the same caches
        expected, found = (
            video(one, caches, cuts, offset, emptied) for one, caches in ((plain, theirs), (model, mine))
        )
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert counted(mine) == counted(theirs)
        for one, caches in ((plain, theirs), (model, mine)):
            HOST.new_video(one, caches)


def test_removal_gives_the_caches_back_without_pins() -> None:
    model = model_of()
    caches, fresh = HOST.caches(model), HOST.caches(model)
    handle = applied(model)
    video(model, caches)
    assert counted(caches) != counted(fresh)
    handle.remove()
    assert counted(caches) == counted(fresh)
    expected = video(model_of(), fresh)
    assert all(torch.equal(a, b) for a, b in zip(expected, video(model, caches), strict=True))


def test_first_frames_of_a_shot_need_room_beside_those_of_the_video() -> None:
    role, few = SlidingWindow(7, sink=3), Pin(9, frames=1, always=5)  # keeps 1 and 3 beside a chunk of 3
    check_pin(role, few, 3)
    for crowded, pin in ((role, Pin(9, frames=2, always=5)), (SlidingWindow(6, sink=3), few)):
        with pytest.raises(WindowError, match="no room for a chunk of 3 frames beside"):
            check_pin(crowded, pin, 3)
    check_pin(Local(1), few, 3)


def test_pins_and_offsets_show() -> None:
    """Controls: each of them changes the video of the untouched model."""
    outs = {
        name: torch.stack(video(model := model_of(), HOST.caches(model), **how))
        for name, how in {
            "one shot": {"cuts": ()},
            "pinned": {},
            "moved": {"offset": OFFSET},
            "emptied": {"emptied": True},
        }.items()
    }
    names = list(outs)
    for first in range(len(names)):
        for second in range(first):
            difference = (outs[names[first]] - outs[names[second]]).abs().max()
            assert difference > 1e-3, (names[first], names[second])


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize(
    ("role", "kept"),
    [
        (SlidingWindow(9, 1, positions="absolute"), [0, 12, 29]),
        (SlidingWindow(9, 2), [0, 1, 12, 13]),
        (Anchor(2), [12, 13]),
        (Anchor(1, 2), [12, 28, 29]),
        (Local(1, 1), [12, 29]),
        (Memory(1, 2, 1), None),
    ],
    ids=str,
)
def test_first_frames_are_those_of_the_pinned_shot(name: str, role: HeadRole, kept: list[int] | None) -> None:
    """Of the video as well, where the host keeps them and the role has a window of the host's kind."""
    store = store_of(name, role)
    for start in range(0, 33, CHUNK):
        if start == 15:
            store.edit(Pin(12, 3, always=3), start)
        store.write(chunk_of(start))
    held = store.frames(role)[0]
    if kept is None:
        assert held[0] == 0
        return
    recent = [frame for frame in range(15, 30) if frame in held]
    assert [frame for frame in held if frame < 15] == [frame for frame in kept if frame < 15]
    assert recent == list(range(30 - len(recent), 30))
    assert len(held) <= role.capacity(CHUNK)
    frames, _, values = seen(store, role)
    assert frames == values == [*held, 30, 31, 32]


@pytest.mark.parametrize("name", STORES)
def test_no_more_first_frames_than_the_host_holds(name: str) -> None:
    role = Anchor(3)
    store = store_of(name, role)
    for start in range(0, 30, CHUNK):
        if start == 15:
            store.edit(Pin(12, 1), start)
        store.write(chunk_of(start))
    assert store.frames(role)[0] == [12]


@pytest.mark.parametrize("name", STORES)
def test_frames_sit_where_their_shot_was_moved(name: str) -> None:
    role = SlidingWindow(9, 1, positions="absolute")
    store = store_of(name, role)
    for start in range(0, 18, CHUNK):
        store.write(chunk_of(start, shift=8.5 * (start >= 12) + 2 * (start >= 15)))
    frames, positions, _ = seen(store, role)
    assert frames == [0, 10, 11, 12, 13, 14, 15, 16, 17]
    assert positions == [0, 10, 11, 20.5, 21.5, 22.5, 25.5, 26.5, 27.5]
    compact = store_of(name, other := SlidingWindow(9, 1))
    for start in range(0, 18, CHUNK):
        compact.write(chunk_of(start, shift=8.5 * (start >= 12)))
    assert seen(compact, other)[1] == list(range(9)), "the range the model was trained on"


@pytest.mark.parametrize("name", STORES)
def test_a_frame_that_moves_with_its_shot_is_rotated_once(name: str) -> None:
    """What was rotated for its place stays, however the shot was moved."""
    role = SlidingWindow(9, positions="absolute")
    store = store_of(name, role)
    turned: list[int] = []

    def encode(x: Tensor, positions: Sequence[float]) -> Tensor:
        turned.append(len(positions))
        return x

    for start in range(0, 30, CHUNK):
        store.write(chunk_of(start, shift=8.0 * (start >= 6)))
        turned.clear()
        store.view(role, "denoise", encode)
        if name == "ring":
            assert sum(turned) == CHUNK


def test_shifts_forget_a_chunk_that_is_written_again() -> None:
    shifts = Shifts()
    shifts.note(0, 0)
    shifts.note(3, 8)
    shifts.note(3, 0)
    assert shifts.moved([3, 4], [3, 4], "absolute") == (3, 4)
    shifts.note(6, 4)
    assert shifts.moved([5, 6], [5, 6], "absolute") == (5, 10)
    assert shifts.moved([5, 6], [2, 6], "adjoining") == (9, 10), "all with the current chunk"
    assert shifts.moved([0, 1], [2, 6], "compact") == (0, 1), "in range"
    shifts.clear()
    assert shifts.moved([6], [6], "absolute") == (6,)


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("keep", [0, 2])
def test_an_emptied_cache_leaves_the_first_frames(name: str, keep: int) -> None:
    role = SlidingWindow(9, 2, positions="absolute")
    store = store_of(name, role)
    for start in range(0, 15, CHUNK):
        store.write(chunk_of(start))
    store.edit(Truncation(keep), 12)
    for _ in range(2):  # the chunk is there before it is written again, too
        assert seen(store, role) == ([*range(keep), 12, 13, 14],) * 3
        store.write(chunk_of(12))
    store.write(chunk_of(15))
    assert store.frames(role)[0] == [*range(keep), 12, 13, 14]


@pytest.mark.parametrize("name", STORES)
def test_a_cache_emptied_before_another_chunk_is_refused(name: str) -> None:
    store = store_of(name, Local())
    store.write(chunk_of(0))
    store.write(chunk_of(3))
    with pytest.raises(StreamError, match="before frame 6, but frames from 3 on are not recomputed"):
        store.edit(Truncation(), 6)


def test_a_window_without_room_for_both_is_refused_before_anything_changes() -> None:
    role = SlidingWindow(7, 3)
    store = store_of("ring", role)
    store.write(chunk_of(0))
    store.edit(Pin(0, 3, always=3), 3)
    for _ in range(2):
        with pytest.raises(WindowError, match="no room for a chunk of 3 frames beside 6 first ones"):
            store.write(chunk_of(3))
        assert store.pending == range(3)
        assert store.frames(role)[0] == []


def test_parts_of_frames_do_not_move() -> None:
    role = Dynamic(pieces=1)
    store = store_of("ring", role)
    store.write(chunk_of(0))
    with pytest.raises(StreamError, match="positions='compact', or set its offset to 0"):
        store.write(chunk_of(3, shift=8))
    store.write(chunk_of(3))


def test_a_cut_of_ours_ends_a_pin_of_the_hosts() -> None:
    role = Anchor(2)
    store = store_of("ring", role)
    for start in range(0, 24, CHUNK):
        if start == 9:
            store.edit(Pin(6, 3), start)
        if start == 15:
            assert store.frames(role)[0] == [6, 7]
            store.scenes.ask(Switch("cut"))
        store.write(chunk_of(start))
    assert store.frames(role)[0] == [15, 16]


@pytest.mark.parametrize("role", [Local(2, 1), Local(2, 1, clean_window=9)], ids=str)
@pytest.mark.parametrize("name", STORES)
def test_pinned_first_frames_are_what_a_mark_recalls(name: str, role: HeadRole) -> None:
    store = store_of(name, role)
    for start in range(0, 24, CHUNK):
        if start == 9:
            store.edit(Pin(6, 3), start)
        if start == 15:
            store.scenes.mark("shot")
        if start == 18:
            store.scenes.ask(Switch("recall", mark="shot"))
        store.write(chunk_of(start))
    assert seen(store, role)[2][0] == 6


def other_pins(caches: Any) -> None:
    for cache in caches["kv"]:
        cache["pinned_start"].fill_(-1)
        cache["pinned_len"].zero_()


def other_keys(caches: Any) -> None:
    for cache in caches["kv"]:
        cache["k"].zero_()


def other_end(caches: Any) -> None:
    for cache in caches["kv"]:
        cache["local_end_index"].fill_(TOKENS)


@pytest.mark.parametrize("edit", [other_pins, other_keys, other_end])
def test_other_edits_are_not_passed_over(edit: Any) -> None:
    model = model_of()
    caches = HOST.caches(model)
    applied(model)
    for start in (0, 3, 6):
        run(model, caches, start, 0)
    pin(model, caches)
    run(model, caches, 9, 0)
    edit(caches)
    with pytest.raises(ExternalEditError):
        run(model, caches, 12, 0)


@pytest.mark.parametrize(
    ("told", "said"), [({"temporal_offset": torch.zeros(2)}, "one number"), ({"method": "ntk"}, "'linear'")]
)
def test_other_positions_are_refused(told: dict[str, Any], said: str) -> None:
    model = model_of()
    caches = HOST.caches(model)
    applied(model)
    attention = model.blocks[0].self_attn
    x = torch.zeros(1, CHUNK * TOKENS, attention.num_heads * attention.head_dim)
    grid = torch.tensor([[CHUNK, 2, 4]])
    with pytest.raises(UnsupportedModelError, match=said):
        attention(x, None, grid, model.freqs, None, caches["kv"][0], 0, **told)


def test_a_quantised_cache_is_refused() -> None:
    model = model_of()
    caches = HOST.caches(model)
    applied(model)
    caches["kv"][0]["k"] = [caches["kv"][0]["k"]]
    with pytest.raises(UnsupportedModelError, match="quantised"):
        run(model, caches, 0, 0)


def test_scaled_time_scales_all_positions() -> None:
    plain, model = model_of(), model_of()
    applied(model)
    outs = []
    for one in (plain, model):
        adapter = find_adapter(one)
        x = torch.randn(1, 2, 8, 3, 16, generator=torch.Generator().manual_seed(0))
        grid = torch.tensor([[2, 2, 4]])
        call = adapter.read(
            one.blocks[0].self_attn,
            (torch.zeros(1, 16, 48), None, grid, one.freqs, None, HOST.caches(one)["kv"][0], 0),
            {"t_scale": 0.5},
        )
        outs.append((adapter.rotate(x, call, [4, 6]), adapter.rotate(x, call, [2.0, 3.0])))
    half = rope.rotate(x, model.freqs, [2.0, 3.0], 2, 4)
    assert torch.equal(outs[0][0], half)
    assert not torch.equal(outs[0][1], half)


@pytest.mark.parametrize("name", STORES)
def test_a_new_video_and_an_emptied_cache_have_no_pin(name: str) -> None:
    role = Anchor(1)
    for ending in ("reset", "emptied"):
        store = store_of(name, role)
        for start in range(0, 15, CHUNK):
            if start == 9:
                store.edit(Pin(6, 3), start)
            store.write(chunk_of(start))
        assert store.frames(role)[0] == [6]
        if ending == "reset":
            store.reset()
        else:
            store.edit(Truncation(), 12)
        begin = 0 if ending == "reset" else 12
        for start in range(begin, begin + 9, CHUNK):
            store.write(chunk_of(start))
        assert store.frames(role)[0] == [begin]


def again(model: Any, caches: Any, start: int, frames: int, draw: int, **told: Any) -> Tensor:
    """A call of LongLive, which may say that the first frames run again as well."""
    host = LongLiveHost()
    host.told = lambda first, end, clean: {"current_start": first, **told}  # type: ignore[method-assign]
    with torch.no_grad():
        return host.call(model, caches, start, frames, draw)


def make_empty(caches: Any) -> None:
    """As LongLive does at a prompt switch with global_sink=False."""
    for cache in caches["kv"]:
        for name in ("k", "v"):
            cache[name].zero_()
    for cache in caches["cross"]:
        cache["is_init"] = False


def longlive(role: Any, frames: int = 30) -> tuple[Any, Any, hf.HeadForcing]:
    """An applied stand-in in mid-video."""
    model = LongLiveHost().model()
    caches = LongLiveHost().caches(model)
    handle = hf.apply_head_forcing(model, role)
    for start in range(0, frames, 3):
        again(model, caches, start, 3, 1)
        again(model, caches, start, 3, 0)
    return model, caches, handle


def fail_once(module: nn.Module) -> None:
    whole, armed = module.forward, [True]

    def forward(x: Tensor) -> Any:
        if armed and armed.pop():
            raise RuntimeError("out of memory")
        return whole(x)

    module.forward = forward  # type: ignore[method-assign]


def with_queries(chunk: Chunk) -> Chunk:
    return dataclasses.replace(chunk, q=chunk.k)


def as_it_is(x: Tensor, *_: object) -> Tensor:
    return x


def test_a_pin_that_was_refused_is_refused_again() -> None:
    model = model_of()
    caches = HOST.caches(model)
    applied(model, SlidingWindow(7, 3, positions="absolute"))
    for start in (0, 3, 6):
        run(model, caches, start, 0)
    pin(model, caches)
    for _ in range(4):
        with pytest.raises(WindowError):
            run(model, caches, 9, 0)


def test_frames_that_run_again_can_run_once_more() -> None:
    outs = []
    for fails in (False, True):
        model, caches, _ = longlive(OWN)
        make_empty(caches)
        if fails:
            fail_once(model.blocks[1].self_attn.q)
            with pytest.raises(RuntimeError, match="out of memory"):
                again(model, caches, 21, 9, 0, sink_recache_after_switch=True)
        outs.append(again(model, caches, 21, 9, 0, sink_recache_after_switch=True))
        outs.append(again(model, caches, 30, 3, 1))
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


def test_first_frames_that_run_again_are_the_hosts_own() -> None:
    """The stand-in writes them where it held the first frames of the video."""
    outs = []
    for role in (None, OWN):
        model = LongLiveHost().model()
        caches = LongLiveHost().caches(model)
        if role is not None:
            hf.apply_head_forcing(model, role)
        for start in range(0, 18, 3):
            again(model, caches, start, 3, 0)
        make_empty(caches)
        told = [again(model, caches, 9, 9, 0, sink_recache_after_switch=True)]
        told += [again(model, caches, start, 3, draw) for start in (18, 21, 24) for draw in (1, 0)]
        outs.append(told)
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize("role", [Memory(1, 2, 1), [[Local(0)] * 3, [OWN] * 3]], ids=["chosen", "per layer"])
def test_all_layers_agree_when_frames_run_again_behind_an_emptied_cache(role: Any) -> None:
    model, caches, handle = longlive(role)
    make_empty(caches)
    again(model, caches, 21, 9, 0, sink_recache_after_switch=True)
    handle.mark("here")
    again(model, caches, 30, 3, 1)


def test_layers_agree_on_the_frames_that_run_again() -> None:
    model, caches, handle = longlive([[Local(0)] * 3, [OWN] * 3])
    again(model, caches, 21, 9, 0)
    handle.mark("here")


def test_first_frames_that_run_again_are_held_where_only_the_last_have_room() -> None:
    model, caches, handle = longlive(Anchor(1))
    make_empty(caches)
    again(model, caches, 12, 18, 0, sink_recache_after_switch=True)
    again(model, caches, 30, 3, 1)
    assert handle.frames(0, 0)[0][0]


def shots_of(model: Any) -> Callable[[], Any]:
    return lambda: video(model, HOST.caches(model))


def prompts_of(model: Any) -> Callable[[], None]:
    def generate() -> None:
        caches = LongLiveHost().caches(model)
        for start in range(0, 18, 3):
            again(model, caches, start, 3, 0)
        again(model, caches, 9, 9, 0)
        again(model, caches, 18, 3, 0)

    return generate


@pytest.mark.parametrize(
    ("model", "drive"),
    [(model_of(), shots_of), (LongLiveHost().model(), prompts_of)],
    ids=["shots", "prompts"],
)
def test_regret_is_not_measured_where_the_host_edits_its_cache(model: Any, drive: Any) -> None:
    role = SlidingWindow(9, 3, positions="absolute")
    with pytest.raises(ProfileError, match="measure videos with one prompt"):
        profile_heads(model, drive(model), [OutputRegret([role])], protocol=Protocol(history=role))


@pytest.mark.parametrize("edit", ["pin", "emptied"])
@pytest.mark.parametrize("name", STORES)
def test_commit_forcing_sees_what_the_role_inside_does(name: str, edit: str) -> None:
    inside, views = Averaging(9, 2), []
    for role in (inside, dataclasses.replace(inside, clean_window=9)):
        store = store_of(name, role)
        for start in range(0, 33, CHUNK):
            if start == 15 and edit == "pin":
                store.edit(Pin(12, 3), start)
            store.write(chunk_of(start))
            if start == 12 and edit == "emptied":
                store.edit(Truncation(), start)
                store.write(chunk_of(start))
            seen(store, role)
        views.append(seen(store, role))
    assert views[0] == views[1]


def test_commit_forcing_has_no_more_room_than_the_role_inside() -> None:
    store = store_of("ring", SlidingWindow(7, 3, positions="absolute", clean_window=7))
    for start in (0, 3, 6):
        store.write(chunk_of(start))
    store.edit(Pin(6, 3, always=3), 9)
    with pytest.raises(WindowError):
        store.write(chunk_of(9))


@pytest.mark.parametrize("role", [Participating(21, 10, 4, 2), Averaging(12, 3)], ids=str)
def test_what_is_kept_beside_frames_sits_right_behind_the_first_ones(role: Any) -> None:
    """They are those of the video, whatever is pinned."""
    store, places = store_of("ring", role, 21), []
    for start in range(0, 57, CHUNK):
        if start == 24:
            store.edit(Pin(21, 1), start)
        store.write(with_queries(chunk_of(start)))
        placed = seen(store, role)[1]
        asked: list[tuple[float, ...]] = []

        def encode(x: Tensor, positions: Any, *_: object, asked: Any = asked) -> Tensor:
            asked.append(tuple(positions))
            return x

        store.view_compressed(role, encode)
        if start > 30 and asked:
            places.append((max(asked[0]), placed))
    assert places
    for last, placed in places:
        assert last == role.sink + len({*range(int(placed[-1]))} - {*placed}) - 1
    assert store.frames(role)[0][: role.sink] == list(range(role.sink))


@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_a_longer_chunk_behind_a_pin_is_refused_whole(positions: Any) -> None:
    role = SlidingWindow(9, 3, positions=positions)
    store = store_of("ring", role)
    for start in (0, 3, 6):
        store.write(chunk_of(start))
    store.edit(Pin(6, 3, always=3), 9)
    store.write(chunk_of(9))
    with pytest.raises(WindowError, match="no room for a chunk of 6 frames"):
        store.write(chunk_of(12, 6))
    store.write(chunk_of(12))
    assert len(seen(store, role)[0]) == 9


def test_a_new_video_is_not_measured_against_the_pin_of_the_last_one() -> None:
    store = store_of("ring", role := SlidingWindow(9, 3))
    for start in (0, 3, 6):
        store.write(chunk_of(start))
    store.edit(Pin(6, 3, always=3), 9)
    store.write(chunk_of(0, 6))
    assert seen(store, role)[0] == [*range(6)]


def test_a_shot_that_is_moved_leaves_roles_with_places_of_their_own_in_range() -> None:
    role = Strided(1, 1, near=6, far=7)
    store = store_of("reference", role)
    for start in range(0, 33, CHUNK):
        store.write(chunk_of(start, shift=8.0 * (start >= 12) + 8.0 * (start >= 24)))
        placed = store.view(role, "denoise", as_it_is, start).positions
        assert placed[-1] < role.far + CHUNK


def test_frames_that_adjoin_do_so_in_a_shot_that_is_moved() -> None:
    role = Rolling(9, 2)
    store = store_of("ring", role)
    for start in range(0, 21, CHUNK):
        store.write(chunk_of(start, shift=8.0 * (start >= 12)))
    assert seen(store, role)[1] == list(range(20, 29))


@pytest.mark.parametrize("role", [Averaging(12, 2), Participating(12, 2, 1, 1)], ids=str)
def test_a_longer_window_shows_what_became_of_frames_that_made_room(role: Any) -> None:
    store = store_of("ring", role, 12)
    for start in range(0, 12, CHUNK):
        store.write(with_queries(dataclasses.replace(chunk_of(start), rolling=True)))
        store.view_compressed(role, as_it_is)
    store.write(with_queries(dataclasses.replace(chunk_of(9, 6), rolling=True)))
    assert store.compressed.get(role).gap
    assert store.view_compressed(role, as_it_is) is not None


@pytest.mark.parametrize("name", STORES)
def test_a_cache_that_was_emptied_leaves_the_pending_chunk(name: str) -> None:
    """Also where the pass that was to follow failed, and the next chunk comes."""
    role = SlidingWindow(9, 2, positions="absolute")
    store = store_of(name, role)
    for start in range(0, 15, CHUNK):
        store.write(chunk_of(start))
    store.edit(Truncation(2), 12)
    store.write(chunk_of(15))
    assert seen(store, role) == ([0, 1, 12, 13, 14, 15, 16, 17],) * 3


@pytest.mark.parametrize("name", STORES)
def test_what_was_kept_beside_frames_goes_with_an_emptied_cache(name: str) -> None:
    role = Averaging(9, 2)
    store = store_of(name, role)
    for start in range(0, 18, CHUNK):
        store.write(chunk_of(start))
    assert store.view_compressed(role, as_it_is) is not None
    store.edit(Truncation(), 15)
    store.write(chunk_of(15))
    assert store.view_compressed(role, as_it_is) is None
    assert seen(store, role)[:2] == ([15, 16, 17], [0, 1, 2])


@pytest.mark.parametrize("chunk", [3, 16])
def test_a_chunk_that_is_no_multiple_is_refused(chunk: int) -> None:
    with pytest.raises(OptionError, match="all 5 chunks denoised at once"):
        hf.apply_head_forcing(
            RollingForcingHost().model(), "streaming_llm", adapter=RollingForcing(5), chunk=chunk, window=21
        )


@pytest.mark.parametrize("mode", MODES)
def test_a_reset_by_hand_forgets_a_pin(mode: Any) -> None:
    with mode():
        model = model_of()
        caches = HOST.caches(model)
        handle = applied(model)
        for start in (0, 3, 6):
            HOST.call(model, caches, start, 3, 0)
        pin(model, caches)
        handle.reset()
        for start in range(0, 15, 3):
            HOST.call(model, caches, start, 3, 0)
        assert handle.frames(0, 0)[0][0][:3] == [0, 1, 2]
    handle.remove()


def test_pinned_frames_are_not_cut_to_pieces_as_well() -> None:
    role = Dynamic(2, 2, 0)
    store = store_of("ring", role)
    for start in range(0, 18, CHUNK):
        if start == 15:
            store.edit(Pin(12, 3), start)
        store.write(chunk_of(start))
    assert store.frames(role)[0] == [0, 1, 14]
