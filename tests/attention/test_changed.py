"""What an adapter read of a model at apply and has changed since is an error that says to apply again."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.attention.read_facts import ReadFacts
from headforcing.errors import AlreadyAppliedError, ModelChangedError
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.testing import Host
from tests.examples import examples
from tests.hosts.rig import Rig

ROLES: list[list[HeadRole]] = [[Local(), Anchor(), Memory(), Local()]] * 2
HOSTS = {
    "anyflow_far": "AnyFlowFARHost",
    "causvid": "CausVidHost",
    "fastvideo": "FastVideoHost",
    "infinity_rope": "InfinityRopeHost",
    "krea": "KreaHost",
    "longlive": "LongLiveHost",
    "longlive2": "LongLive2Host",
    "rolling_forcing": "RollingForcingHost",
    "sana_wm": "SanaWMHost",
    "self_forcing": "SelfForcingHost",
}


def set_window(model: Any, by: int) -> None:
    model.local_attn_size += by


def of_one_layer(model: Any, by: int) -> None:
    model.blocks[1].self_attn.local_attn_size += by


def set_chunk(model: Any, by: int) -> None:
    model.num_frame_per_block += by


def regroup(model: Any, by: int) -> None:
    """The same channels as other heads: no shape would tell."""
    for block in model.blocks:
        block.self_attn.num_heads *= 2 if by > 0 else 1 / 2
        block.self_attn.num_heads = int(block.self_attn.num_heads)
        block.self_attn.head_dim = 64 // block.self_attn.num_heads


CHANGES: dict[str, Callable[[Any, int], None]] = {
    "window": set_window,
    "chunk": set_chunk,
    "heads": regroup,
}


def run(rig: Rig, caches: Any, chunk: int) -> list[Tensor]:
    return [rig.call(caches, 3 * chunk, 3, draw=draw) for draw in (1, 0)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


PRESET = "streaming_llm"
"""Takes its numbers from the chunk as well; those of `FIXED` do not depend on it."""
FIXED = SlidingWindow(9, sink=1)


@functools.cache
def whole(window: int = 9, preset: bool = False) -> list[Tensor]:
    rig = Rig(window)
    hf.apply_head_forcing(rig.model, PRESET if preset else ROLES)
    return rig.video(rig.caches(), 4)


@given(st.sampled_from(list(CHANGES)), st.integers(0, 3), st.booleans())
@settings(max_examples=examples(12, 200))
def test_the_next_chunk_after_a_change_says_so_and_nothing_is_lost(what: str, at: int, grows: bool) -> None:
    rig, by = Rig(9), 3 if grows else -3
    if what == "chunk":
        by //= 3
    hf.apply_head_forcing(rig.model, PRESET if what == "chunk" else ROLES)
    caches, outs = rig.caches(), []
    for chunk in range(4):
        if chunk == at:
            CHANGES[what](rig.model, by)
            for _ in range(2):
                with pytest.raises(ModelChangedError, match=rf"{what} of DemoModel was .* is .* apply again"):
                    rig.call(caches, 3 * chunk, 3, draw=1)
            CHANGES[what](rig.model, -by)
        outs += run(rig, caches, chunk)
    assert equal(outs, whole(preset=what == "chunk"))


def test_pipelines_that_set_the_chunk_may_come_after_apply() -> None:
    """Upstream pipelines do, when they are made; roles whose numbers stay as they are follow."""
    outs = []
    for chunk in (3, 1):
        rig = Rig(9)
        set_chunk(rig.model, chunk - 3)
        hf.apply_head_forcing(rig.model, FIXED)
        set_chunk(rig.model, 3 - chunk)
        outs.append(rig.video(rig.caches(), 4))
    assert equal(*outs)


def test_a_change_between_two_videos_asks_to_apply_again() -> None:
    rig = Rig(9)
    hf.apply_head_forcing(rig.model, ROLES)
    caches = rig.caches()
    rig.video(caches, 4)
    set_window(rig.model, 3)
    caches.new_video()
    with pytest.raises(ModelChangedError, match=r"window of DemoModel was 9 at apply and is 12 now.*replace"):
        rig.video(caches, 4)
    with pytest.raises(AlreadyAppliedError, match="replace=True"):
        hf.apply_head_forcing(rig.model, ROLES)
    hf.apply_head_forcing(rig.model, ROLES, replace=True)
    caches = rig.caches(frames=12)
    assert equal(rig.video(caches, 4), whole(12))


def test_applying_again_takes_what_is_true_now() -> None:
    """Also where the roles stay as they are, so that nothing is replaced."""
    rig = Rig(9)
    handle = hf.apply_head_forcing(rig.model, ROLES, window=9)
    assert hf.apply_head_forcing(rig.model, ROLES) is handle
    rig.video(rig.caches(), 1)
    set_window(rig.model, 3)
    with pytest.raises(ModelChangedError, match="window of DemoModel was 9 at apply and is 12 now"):
        rig.video(rig.caches(), 1)


def test_layers_that_part_are_said() -> None:
    rig = Rig(9)
    hf.apply_head_forcing(rig.model, ROLES)
    of_one_layer(rig.model, 3)
    with pytest.raises(hf.errors.HeadForcingError, match="different local_attn_size"):
        rig.video(rig.caches(), 1)


def test_what_the_user_said_is_not_asked_of_the_model() -> None:
    rig = Rig(9)
    hf.apply_head_forcing(rig.model, ROLES, window=9, chunk=3)
    outs = rig.video(rig.caches(), 4)
    set_window(rig.model, 3)
    set_chunk(rig.model, 1)
    assert equal(rig.video(rig.caches(), 4), outs)


def test_a_model_that_is_gone_and_a_copy_are_not_asked() -> None:
    rig = Rig(9)
    hf.apply_head_forcing(nn.Sequential(rig.model), ROLES)
    assert equal(rig.video(rig.caches(), 4), whole())
    rig.model = copy.deepcopy(rig.model)
    assert equal(rig.video(rig.caches(), 4), whole())


def test_it_is_asked_once_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, asked = Rig(9), []
    handle = hf.apply_head_forcing(rig.model, ROLES)
    check = ReadFacts.check
    monkeypatch.setattr(ReadFacts, "check", lambda facts: (asked.append(facts), check(facts))[1])
    rig.video(rig.caches(), 4)
    assert len(asked) == 5  # in both passes of the first chunk, which may begin a video
    assert handle.applied


@pytest.mark.parametrize("name", HOSTS)
def test_it_is_asked_of_every_adapter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host: Host = getattr(importlib.import_module(f"tests.hosts.{name}"), HOSTS[name])()
    if (reason := host.missing()) is not None:
        pytest.skip(reason)
    model = host.model()
    adapter = host.adapter or find_adapter(model)
    hf.apply_head_forcing(model, Full(), adapter=adapter)
    caches = host.caches(model)
    host.call(model, caches, 0, host.chunk, 1)
    expected = host.call(model, caches, 0, host.chunk, 0)
    before = adapter.window(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(adapter), "window", lambda self, model: before + 1)
        host.new_video(model, caches)
        with pytest.raises(ModelChangedError, match=rf"window of .* was {before} .* is {before + 1} now"):
            host.call(model, caches, 0, host.chunk, 1)
    caches = host.caches(model)
    host.call(model, caches, 0, host.chunk, 1)
    assert torch.equal(host.call(model, caches, 0, host.chunk, 0), expected)


def test_a_change_that_is_not_asked_for_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done before: nobody looks again."""
    monkeypatch.setattr(ReadFacts, "check", lambda self: None)
    for holds in (
        test_a_change_between_two_videos_asks_to_apply_again,
        test_applying_again_takes_what_is_true_now,
    ):
        with pytest.raises(pytest.fail.Exception):
            holds()
