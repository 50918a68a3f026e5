"""Verify says equal only where the model is reproduced, and finds the first call of every planted fault."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import headforcing as hf
from headforcing.adapters.base import bind
from headforcing.apply import OWN
from headforcing.apply.unverified import unverified
from headforcing.errors import AlreadyAppliedError, OptionError, UnverifiedCodeWarning
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.measure.verify import Verdict
from headforcing.roles import Full, HeadRole, SlidingWindow
from tests.hosts import find_host, host_names
from tests.hosts.rig import Rig

WINDOW, SINK, LAYERS = 7, 1, 2


def rig(**more: Any) -> Rig:
    return Rig(WINDOW, SINK, layers=LAYERS, **more)


def judged(rig: Rig, chunks: int = 4, adapter: Any = None) -> Verdict:
    return hf.verify(rig.model, lambda: rig.video(rig.caches(), chunks), adapter=adapter)


class Says(SelfForcing):
    """An adapter that says another own memory."""

    def __init__(self, *roles: HeadRole) -> None:
        super().__init__()
        self.roles = roles

    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        return [*self.roles] if len(self.roles) > 1 else [*self.roles] * LAYERS


RIGHT = SlidingWindow(WINDOW, SINK, positions="absolute")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_is_equal_to_itself(dtype: torch.dtype) -> None:
    one = rig(dtype=dtype)
    before = dict(one.model.named_modules())
    found = judged(one)
    assert (found.result, found.difference, found.first, found.ok) == ("equal", 0, None, True)
    assert (found.frames, found.evicted, found.memory) == (12, True, (RIGHT,) * LAYERS)
    assert dict(one.model.named_modules()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())


@pytest.mark.parametrize("name", host_names())
def test_every_adapter_says_the_own_memory_of_its_base_model(name: str) -> None:
    host = find_host(name)
    if (missing := host.missing()) is not None:
        pytest.skip(missing)
    model = host.model()

    def run() -> None:
        caches = host.caches(model)
        with torch.no_grad():
            for start in range(0, host.frames, host.chunk):
                for draw in (2, 1, 0):
                    host.call(model, caches, start, host.chunk, draw)

    found = hf.verify(model, run, adapter=host.adapter)
    assert (found.result, found.frames) == ("equal", host.frames), str(found)
    assert found.evicted or Full() in found.memory


def test_a_run_that_comes_to_nothing_the_second_time_is_unstable() -> None:
    one, chunks = rig(), iter([2, 0, 2])
    found = hf.verify(one.model, lambda: one.video(one.caches(), next(chunks)))
    assert found.result == "unstable"


@pytest.mark.parametrize(
    ("wrong", "layer", "chunk", "hint"),
    [
        ([replace(RIGHT, window=6)], 0, 2, "evicted before it"),
        ([replace(RIGHT, sink=0)], 0, 2, "evicted before it"),
        ([replace(RIGHT, positions="compact")], 0, 2, "evicted before it"),
        ([RIGHT, replace(RIGHT, window=6)], 1, 2, "layers before 1 are equal"),
        ([Full()], 0, 2, "nothing was evicted"),
    ],
)
def test_another_memory_is_found_where_it_first_differs(
    wrong: list[HeadRole], layer: int, chunk: int, hint: str
) -> None:
    found = judged(rig(), adapter=Says(*wrong))
    assert (found.result, found.ok) == ("different", False)
    assert found.first is not None
    assert (found.first.layer, found.first.chunk, found.first.number) == (layer, chunk, 0)
    assert hint in found.hint
    assert f"layer {layer}, chunk {chunk}" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fault_in_one_channel_of_one_token_is_seen(dtype: torch.dtype, monkeypatch: Any) -> None:
    project_out = SelfForcing.project_out

    def wrong(self: Any, module: Any, out: torch.Tensor) -> torch.Tensor:
        y = project_out(self, module, out)
        y[0, 7, 3] += y.float().square().mean().sqrt().to(y)
        return y

    monkeypatch.setattr(SelfForcing, "project_out", wrong)
    assert judged(rig(dtype=dtype), chunks=1).result == "different"


def test_rounding_is_told_from_a_fault(monkeypatch: Any) -> None:
    project_out = SelfForcing.project_out
    monkeypatch.setattr(SelfForcing, "project_out", lambda *given: project_out(*given) * (1 + 1e-6))
    found = judged(rig())
    assert (found.result, found.ok) == ("rounding", True)
    assert 1e-7 < found.difference < 1e-4
    assert "equal to rounding" in str(found)


def test_too_short_a_video_is_said_to_be_too_short() -> None:
    found = judged(rig(), chunks=2, adapter=Says(replace(RIGHT, window=6)))
    assert (found.result, found.evicted) == ("equal", False)
    assert "nothing was evicted in 6 frames" in str(found)


class Fork:
    """Ways in which a fork of the same signature may compute something else, planted into a rig."""

    @staticmethod
    def projection(module: Any) -> None:
        forward = type(module).forward

        def changed(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, x * 1.01, *args, **kwargs)

        module.__class__ = type("Fork", (type(module),), {"forward": _signed(forward, changed)})

    @staticmethod
    def memory(module: Any) -> None:
        forward = type(module).forward

        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = forward(self, *args, **kwargs)
            bind(self, args, kwargs)["kv_cache"]["v"].mul_(0.99)
            return out

        module.__class__ = type("Fork", (type(module),), {"forward": _signed(forward, changed)})


def _signed(original: Any, changed: Any) -> Any:
    import inspect

    changed.__signature__ = inspect.signature(original)
    changed.__module__ = __name__
    return changed


@pytest.mark.parametrize(("fork", "chunk", "number"), [(Fork.projection, 0, 0), (Fork.memory, 1, 0)])
def test_a_fork_with_the_same_signature_is_found_out(fork: Any, chunk: int, number: int) -> None:
    one = rig()
    fork(one.model.blocks[1].self_attn)
    found = judged(one)
    assert found.result == "different"
    assert found.first is not None
    assert (found.first.layer, found.first.chunk, found.first.number) == (1, chunk, number)


def test_a_generation_that_is_not_deterministic_is_said_to_be_so() -> None:
    one, draws = rig(), iter(range(9))
    found = hf.verify(one.model, lambda: one.video(one.caches(), 2, draw=next(draws)))
    assert (found.result, found.ok) == ("unstable", False)
    assert "torch.Generator" in str(found)


def test_global_random_numbers_are_the_same_in_every_run_and_left_alone() -> None:
    one, state = rig(), torch.random.get_rng_state()
    found = hf.verify(one.model, lambda: one.video(one.caches(), 2, draw=int(torch.randint(99, ()))))
    assert found.ok
    assert torch.equal(torch.random.get_rng_state(), state)


def test_calls_with_gradients_are_said_to_go_past_us() -> None:
    one = rig()
    one.model.train()
    found = judged(one, 2)
    assert (found.result, found.ok) == ("unserved", False)
    assert "went to the original forward: run without gradients" in str(found)


def test_another_entry_than_forward_is_noticed() -> None:
    one = rig()
    attention = one.model.blocks[0].self_attn

    def run() -> None:
        one.video(one.caches(), 2)
        attention.q(torch.zeros(1, 1, attention.q.in_features))

    found = hf.verify(one.model, run)
    assert found.result == "unserved"
    assert "1 call of parts of an attention" in str(found)


def test_a_run_without_the_model_is_an_error_and_so_is_an_applied_model() -> None:
    one = rig()
    with pytest.raises(OptionError, match="called no attention"):
        hf.verify(one.model, lambda: None)
    hf.apply_head_forcing(one.model, OWN)
    with pytest.raises(AlreadyAppliedError, match="remove head forcing first"):
        hf.verify(one.model, lambda: None)


def test_a_run_that_fails_leaves_the_model_as_it_was() -> None:
    one = rig()

    def run() -> None:
        one.video(one.caches(), 1)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        hf.verify(one.model, run)
    assert not any(module._forward_hooks for module in one.model.modules())


def test_code_that_nobody_compared_is_warned_about(monkeypatch: Any, tmp_path: Any) -> None:
    from headforcing.adapters.verified import digest, record

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = rig()
    assert unverified(one.model, SelfForcing()) == {}  # ours
    for block in one.model.blocks:
        Fork.projection(block.self_attn)
    code = digest(one.model.blocks[0].self_attn)
    with pytest.warns(UnverifiedCodeWarning, match=r"signature of self_forcing, but other code"):
        hf.apply_head_forcing(one.model, OWN).remove()
    assert "was never compared" in str(hf.explain(one.model))
    record({code or "no source"})
    assert unverified(one.model, SelfForcing()) == {}
