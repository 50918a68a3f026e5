"""FastVideo: what the conformance kit does not ask of every host."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import headforcing as hf
from headforcing.errors import ChunkOrderError, ExternalEditError, StreamShapeError
from headforcing.integrations.fastvideo import ADAPTER
from headforcing.roles import Full, SlidingWindow
from headforcing.testing import check_adapter, check_names
from headforcing.types import AttentionCall
from tests.hosts import fastvideo as host
from tests.hosts.fastvideo import FastVideoHost, RelativisticHost

CHUNKS = (0, 3, 6)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def take(of: FastVideoHost | None = None, roles: Any = None) -> tuple[Any, Any, Any]:
    of = of or FastVideoHost()
    model = of.model()
    handle = hf.apply_head_forcing(model, [[roles] * host.HEADS] * host.LAYERS) if roles else None
    return functools.partial(of.call, model, of.caches(model)), model, handle


def caches_of(call: Any) -> Any:
    return call.args[1]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_keys_kept_before_rope_pass_the_kit(compiled: bool) -> None:
    names = [name for name in check_names() if compiled or name != "compiled_is_one_operator"]
    check_adapter(ADAPTER, RelativisticHost(), only=names).raise_if_failed()


@pytest.mark.parametrize("of", [FastVideoHost, RelativisticHost])
def test_tables_with_one_column_per_pair_turn_alike(of, monkeypatch) -> None:
    """As FastVideo's are where it is told to compute no more."""
    call, _, _ = take(of())
    expected = [call(start, 3, 0) for start in CHUNKS]
    whole = host.tables_of
    monkeypatch.setattr(host, "tables_of", lambda *span: tuple(part[:, ::2] for part in whole(*span)))
    call, _, _ = take(of(), Full())
    found = [call(start, 3, 0) for start in CHUNKS]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("of", [FastVideoHost, RelativisticHost])
@pytest.mark.parametrize("frames", [1, 3])
def test_height_and_width_are_read_off_the_tables(of, frames) -> None:
    """Nothing else tells them; patches lie 2 x 4."""
    call, _, handle = take(of(), Full())
    grids = []
    with handle.observe(lambda observation: grids.append(observation.call.grid)):
        call(0, frames, 0)
        call(frames, frames, 0)
    assert grids == [(frames, *host.GRID)] * 2 * host.LAYERS


class WideNorm(torch.nn.Module):
    """A norm in float32 that does not go back, as weights in float32 make it."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.float())


@pytest.mark.parametrize("of", [FastVideoHost, RelativisticHost])
def test_queries_and_keys_may_be_wider_than_values(of, monkeypatch) -> None:
    def model_of(self, dtype=torch.float32):
        model = original(self, dtype)
        for block in model.blocks:
            block.norm_q, block.norm_k = WideNorm(block.norm_q), WideNorm(block.norm_k)
            attend = block.attn1.attn
            attend.forward = lambda q, k, v, attend=attend: type(attend).forward(
                attend, q.to(v.dtype), k.to(v.dtype), v
            )
        return model

    original = of.model
    monkeypatch.setattr(of, "model", model_of)
    checks = ("dense_parity_bf16", "parity_through_eviction_bf16")
    check_adapter(ADAPTER, of(), only=checks).raise_if_failed()


def test_attention_returns_what_the_original_returns() -> None:
    """The block joins the heads."""
    shapes = []
    for roles in (None, Full()):
        call, model, _ = take(roles=roles)
        model.blocks[0].attn1.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
        call(0, 3, 0)
    assert shapes == [(1, 3 * host.TOKENS, host.HEADS, host.HEAD_DIM)] * 2


def test_the_host_lets_go_of_its_tensors_and_the_timeline_stays() -> None:
    """The original replaces `k` in every call; the tensor it counts in stays."""
    call, _, _ = take()
    cache = caches_of(call)["kv"][0]
    keys, count = cache["k"], cache["global_end_index"]
    call(0, 3, 0)
    assert cache["k"] is not keys
    assert cache["global_end_index"] is count


def test_what_needs_gradients_is_passed_on_though_queries_need_none() -> None:
    """As with LoRA on the values alone."""
    grads = []
    for roles in (None, Full()):
        call, model, handle = take(roles=roles)
        weight = model.blocks[0].to_v.weight.requires_grad_(True)
        with torch.enable_grad():
            if handle is not None:
                with pytest.warns(UserWarning, match="inactive"):
                    out = call(0, 3, 1)
                assert handle.status().calls == 0
            else:
                out = call(0, 3, 1)
            out.square().mean().backward()
        grads.append(weight.grad)
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)


@pytest.mark.parametrize("frames", [1, 3])
def test_rope_that_begins_elsewhere_is_refused(frames) -> None:
    call, model, _ = take(roles=Full())
    call(0, 3, 0)
    forward = model.forward
    model.forward = lambda *args, start_frame, **kwargs: forward(*args, start_frame=0, **kwargs)
    with pytest.raises(StreamShapeError, match="start_frame=current_start // 8"):
        call(3, frames, 0)
    model.forward = forward
    assert torch.isfinite(call(3, frames, 0)).all()


def test_another_theta_is_refused(monkeypatch) -> None:
    whole = host.tables_of
    call, _, _ = take(roles=Full())
    monkeypatch.setattr(host, "tables_of", lambda *span: tuple(part.roll(2, 1) for part in whole(*span)))
    with pytest.raises(StreamShapeError, match="theta 10000"):
        call(0, 3, 0)


def test_counters_that_are_no_tensors_are_refused() -> None:
    call, _, _ = take(roles=Full())
    for cache in caches_of(call)["kv"]:
        cache["global_end_index"] = 0
    with pytest.raises(StreamShapeError, match="global_end_index of the cache is 0: expected a tensor"):
        call(0, 3, 0)


def test_calls_of_half_frames_are_refused() -> None:
    call, model, _ = take(roles=Full())
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "current_start": 4})
    with pytest.raises(StreamShapeError, match="not multiples of frame_seqlen 8"):
        call(0, 3, 0)


def test_counters_moved_or_swapped_outside_are_found() -> None:
    for name, swap in (("local_end_index", False), ("local_end_index", True), ("global_end_index", False)):
        call, _, handle = take(roles=Full())
        call(0, 3, 0)
        cache = caches_of(call)["kv"][1]
        if swap:
            cache[name] = torch.tensor([8])
        else:
            cache[name].sub_(8)
        with pytest.raises(ExternalEditError):
            call(3, 3, 0)
        handle.remove()


def test_a_timeline_is_another_where_the_counters_are() -> None:
    """A dict copied with its counters is another video, which cannot begin in the middle."""
    call, model, _ = take(roles=SlidingWindow(9, 1))
    call(0, 3, 0)
    caches = caches_of(call)
    copied = [{**cache, "global_end_index": cache["global_end_index"].clone()} for cache in caches["kv"]]
    with pytest.raises(ChunkOrderError):
        FastVideoHost().call(model, {**caches, "kv": copied}, 3, 3, 0)


def test_positions_past_any_table_turn_as_the_host_would() -> None:
    for first in (1021, 1024, 5000):
        tables = host.tables_of(first, 3)
        x = torch.randn(1, 3 * host.TOKENS, 2, host.HEAD_DIM, generator=torch.Generator().manual_seed(first))
        arguments = {"q": x, "freqs_cis": host.tables_of(0, 3)}
        call = AttentionCall(x.flatten(2), 0, (3, *host.GRID), None, arguments)
        for dtype in (torch.float32, torch.bfloat16):
            found = ADAPTER.rotate(x.to(dtype).unflatten(1, (3, host.TOKENS)), call, range(first, first + 3))
            assert torch.equal(found.flatten(1, 2), host.turned(x.to(dtype), tables))
