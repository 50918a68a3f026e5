"""Streams and their memory: who owns what, who may meet whom, and when it is gone."""

from __future__ import annotations

import functools
import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import headforcing as hf
from headforcing.adapters import rope
from headforcing.adapters.base import Adapter, Memo, bind, parameter_names
from headforcing.demo.model.attention import DemoConfig, rope_table
from headforcing.demo.world.words import PROMPT_WORDS
from headforcing.errors import ChunkOrderError, PatchedModuleError, StreamActiveError, StreamError
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.testing import bits, snapshot
from headforcing.types import AttentionCall
from tests.examples import examples
from tests.hosts.rig import Caches, Rig

MIXED: tuple[HeadRole, ...] = (Local(), Anchor(), Memory(), SlidingWindow(6, positions="absolute"))


def applied(window: int = 9) -> tuple[Rig, hf.HeadForcing]:
    rig = Rig(window)
    return rig, hf.apply_head_forcing(rig.model, [MIXED, MIXED[::-1]])


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@functools.cache
def alone(chunks: int, draw: int = 0, batch: int = 1) -> list[Tensor]:
    """A video that has a model for itself."""
    rig, _ = applied()
    return rig.video(rig.caches(batch), chunks, draw=draw)


# Streams that live in the host's caches -----------------------------------------------------------


@pytest.mark.parametrize("chunks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_caches_in_every_order_are_two_videos_alone(chunks: int) -> None:
    alone_a, alone_b = alone(chunks), alone(chunks, draw=40)
    rig, handle = applied()
    turns = 2 * chunks
    for chosen in itertools.combinations(range(1, turns), chunks):  # the other half: names swapped
        streams = {True: (rig.caches(), 0, []), False: (rig.caches(), 40, [])}
        for turn in range(turns):
            caches, draw, outputs = streams[turn in chosen]
            outputs += rig.video(caches, 1, first=len(outputs) // 2, draw=draw)
        assert equal(streams[True][2], alone_a)
        assert equal(streams[False][2], alone_b)
        assert len(handle.status().streams) == 2
        del streams, caches, outputs


def test_two_caches_interleaved_pass_by_pass_are_two_videos_alone() -> None:
    rig, _ = applied()
    pair = [(rig.caches(), 0), (rig.caches(), 40)]
    outputs: list[list[Tensor]] = [[], []]
    for start, step in itertools.product(range(0, 15, 3), (1, 0)):
        for (caches, draw), found in zip(pair, outputs, strict=True):
            found.append(rig.call(caches, start, 3, draw=draw + step))
    assert equal(outputs[0], alone(5))
    assert equal(outputs[1], alone(5, draw=40))


def test_caches_of_different_batch_live_side_by_side() -> None:
    rig, handle = applied()
    one, two = rig.caches(1), rig.caches(2)
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for chunk in range(4):
        outputs[0].extend(rig.video(one, 1, first=chunk))
        outputs[1].extend(rig.video(two, 1, first=chunk))
    assert equal(outputs[0], alone(4))
    assert equal(outputs[1], alone(4, batch=2))
    assert [s.committed for s in handle.status().streams] == [9, 9]


@settings(max_examples=examples(4))
@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=3))
def test_a_second_video_on_the_same_caches_is_that_video_alone(lengths: list[int]) -> None:
    rig, _ = applied()
    caches = rig.caches()
    for video, chunks in enumerate(lengths):
        caches.new_video()
        assert equal(rig.video(caches, chunks, draw=10 * video), alone(chunks, draw=10 * video))


def test_a_reset_stream_starts_again_as_if_new() -> None:
    rig, handle = applied()
    caches = rig.caches()
    rig.video(caches, 4, draw=10)
    handle.reset()
    assert [(s.committed, s.pending) for s in handle.status().streams] == [(0, None)]
    assert equal(rig.video(caches, 4), alone(4))


def test_the_number_of_passes_over_a_chunk_does_not_change_the_next_ones() -> None:
    rig, handle = applied()
    last = []
    for passes in (1, 2, 5):
        caches = rig.caches()
        for start, step in itertools.product(range(0, 15, 3), reversed(range(passes))):
            output = rig.call(caches, start, 3, draw=step)
        last.append((bits(output), handle.status().stored_bytes))
        del caches
    assert len(set(last)) == 1


def test_commit_by_hand_changes_nothing_but_the_moment() -> None:
    rig, handle = applied()
    caches = rig.caches()
    outputs = []
    for chunk in range(5):
        outputs += rig.video(caches, 1, first=chunk)
        handle.commit()
        assert [(s.committed, s.pending) for s in handle.status().streams] == [(3 * chunk + 3, None)]
    assert equal(outputs, alone(5))


def test_inference_mode_and_no_grad_give_the_same_video_also_when_they_change_midway() -> None:
    rig, _ = applied()
    caches = rig.caches()
    outputs = []
    for chunk in range(5):
        with torch.inference_mode(chunk % 2 == 0):
            outputs += rig.video(caches, 1, first=chunk)
    assert equal([o.clone() for o in outputs], alone(5))


def test_caches_made_in_inference_mode_serve_one_video_after_another() -> None:
    rig, _ = applied()
    with torch.inference_mode():
        caches = rig.caches()
        outputs = rig.video(caches, 4)
        caches.new_video()
        again = rig.video(caches, 4)
    assert equal([o.clone() for o in outputs], alone(4))
    assert equal([o.clone() for o in again], alone(4))


def test_caches_made_in_inference_mode_are_given_back() -> None:
    rig, handle = applied()
    with torch.inference_mode():
        caches = rig.caches()
        rig.video(caches, 4)
    handle.remove()
    assert _as_new(caches)


# What status says ---------------------------------------------------------------------------------


def test_status_counts_calls_streams_frames_and_bytes_from_what_is_there() -> None:
    rig, handle = applied()
    status = handle.status()
    assert (status.active, status.streams, status.stored_bytes, status.released_bytes) == (False, (), 0, 0)
    caches = rig.caches()
    per_layer = sum(cache[name].nbytes for cache in caches.kv[:1] for name in "kv")
    rig.video(caches, 3)
    status = handle.status()
    assert (status.active, status.calls, status.bypassed) == (True, 12, 0)
    assert [(s.committed, s.pending) for s in status.streams] == [(6, (6, 9))]
    assert status.released_bytes == 2 * per_layer
    assert status.stored_bytes > 0
    assert "2 layers x 4 heads" in str(status)
    assert "1 streams" in str(status)


def test_stored_bytes_stay_the_same_from_the_moment_the_window_is_full() -> None:
    rig, handle = applied()
    caches = rig.caches()
    sizes = []
    for chunk in range(12):
        rig.video(caches, 1, first=chunk)
        sizes.append(handle.status().stored_bytes)
    assert len(set(sizes[4:])) == 1


def test_a_role_that_keeps_less_never_stores_more() -> None:
    sizes = []
    for recent in (0, 1, 3, 6):
        rig = Rig(9)
        handle = hf.apply_head_forcing(rig.model, Local(recent=recent))
        caches = rig.caches()
        rig.video(caches, 5)
        sizes.append(handle.status().stored_bytes)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


# Memory -------------------------------------------------------------------------------------------


def _storages() -> int:
    """Bytes of all tensors alive, each memory counted once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_released_bytes_are_really_gone() -> None:
    rig = Rig(21)
    handle = hf.apply_head_forcing(rig.model, Local())
    caches = rig.caches()
    before = _storages()
    outputs = rig.video(caches, 1)
    outputs.clear()
    status = handle.status()
    cross = sum(c[name].nbytes for c in caches.cross for name in "kv")
    slack = 200_000  # rotation tables and the like
    assert status.released_bytes > status.stored_bytes + slack
    assert _storages() - before < status.stored_bytes - status.released_bytes + cross + slack


def test_dropping_a_cache_frees_its_stream_at_once_without_the_garbage_collector() -> None:
    rig, handle = applied()
    kept, dropped = rig.caches(), rig.caches()
    for caches in (kept, dropped):
        rig.video(caches, 3)
    stores = [weakref.ref(stream.store) for layer in handle._layers for stream in layer.streams.values()]
    both = handle.status().stored_bytes
    gc.collect()
    gc.disable()
    try:
        del caches, dropped
        assert [ref() is None for ref in stores] == [False, True] * 2
        assert handle.status().stored_bytes * 2 == both
        assert len(handle.status().streams) == 1
    finally:
        gc.enable()
    assert equal(rig.video(kept, 1, first=3), alone(4)[6:])


def new_tensors() -> int:
    """Tensors made since `gc.freeze()`; rotation factors belong to no video."""
    rope._kept.__init__()
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_many_caches_one_after_the_other_leave_nothing() -> None:
    rig, handle = applied()
    counts = []
    gc.freeze()
    for number in range(30):
        rig.call(rig.caches(), 0, 3)
        if number in (5, 29):
            counts.append(new_tensors())
    assert counts[0] == counts[1]
    assert handle.status().streams == ()
    assert handle.status().stored_bytes == 0


def test_a_long_video_leaves_no_tensor_behind_from_chunk_to_chunk() -> None:
    rig, _ = applied()
    caches = rig.caches()
    counts = []
    gc.freeze()
    for chunk in range(20):
        rig.video(caches, 1, first=chunk)
        if chunk in (8, 19):
            counts.append(new_tensors())
    assert counts[0] == counts[1]


def test_no_stored_tensor_carries_a_gradient_graph() -> None:
    rig, handle = applied()
    caches = rig.caches()
    words = torch.zeros(1, PROMPT_WORDS, dtype=torch.long)
    for start in (0, 3, 6):  # gradients are on, but nothing requires them
        out = rig.model(rig.noise(start, 3), torch.zeros(1), words, caches.kv, caches.cross, start * 16)
    assert out.grad_fn is None
    stores = [stream.store for layer in handle._layers for stream in layer.streams.values()]
    banks = [bank for store in stores for bank in store._banks.values()]  # type: ignore[attr-defined]
    assert not any(t.requires_grad for bank in banks for t in bank.tensors())


# Caches given back --------------------------------------------------------------------------------


def _facts(caches: Caches) -> list[Any]:
    return [
        (name, tuple(t.shape), t.dtype, t.stride(), t.is_contiguous(), t.untyped_storage().nbytes())
        for cache in caches.kv
        for name, t in cache.items()
    ]


def _as_new(caches: Caches) -> bool:
    batch, tokens = caches.kv[0]["k"].shape[:2]
    fresh = Rig(dtype=caches.kv[0]["k"].dtype).caches(batch, tokens // 16)
    zeros = all(not t.any() for cache in caches.kv for t in cache.values())
    return _facts(caches) == _facts(fresh) and zeros


@pytest.mark.parametrize(
    ("dtype", "batch"),
    [
        (torch.float32, 2),
        (torch.bfloat16, 1),
        pytest.param(torch.float32, 1, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 2, marks=pytest.mark.slow),
    ],
)
def test_caches_come_back_as_freshly_allocated_in_the_same_tensors(dtype: torch.dtype, batch: int) -> None:
    rig = Rig(9, dtype=dtype)
    handle = hf.apply_head_forcing(rig.model, Local())
    caches = rig.caches(batch)
    tensors = [t for cache in caches.kv for t in cache.values()]
    rig.video(caches, 4)
    assert not _as_new(caches)
    handle.remove()
    assert _as_new(caches)
    assert all(a is b for a, b in zip(tensors, (t for c in caches.kv for t in c.values()), strict=True))
    assert equal(rig.video(caches, 4), Rig(9, dtype=dtype).video(Rig(9, dtype=dtype).caches(batch), 4))


def test_while_released_the_caches_keep_shape_and_dtype() -> None:
    rig, _ = applied()
    caches = rig.caches()
    rig.video(caches, 2)
    for cache in caches.kv:
        for name in "kv":
            assert tuple(cache[name].shape) == (1, 9 * 16, 4, 16)
            assert cache[name].dtype == torch.float32
            assert cache[name].untyped_storage().nbytes() == 4


def test_caches_that_were_never_used_are_not_touched() -> None:
    rig, handle = applied()
    caches = rig.caches()
    caches.kv[0]["k"].fill_(3.0)
    address = caches.kv[0]["k"].data_ptr()
    handle.remove()
    assert caches.kv[0]["k"].data_ptr() == address
    assert (caches.kv[0]["k"] == 3).all()


@pytest.mark.parametrize("layer", [0, 1])
def test_caches_come_back_whole_after_an_exception_in_the_first_pass(layer: int) -> None:
    rig, handle = applied()
    caches = rig.caches()
    attention: Any = rig.model.blocks[layer].self_attn
    hook = attention.o.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rig.call(caches, 0, 3)
    hook.remove()
    handle.remove()
    assert _as_new(caches)


def test_caches_that_are_slices_of_one_allocation_are_counted_once_and_come_back() -> None:
    rig, handle = applied()
    caches = rig.caches()
    whole = torch.zeros(2, 2, *caches.kv[0]["k"].shape)
    for layer, cache in enumerate(caches.kv):
        cache.update(k=whole[layer, 0], v=whole[layer, 1])
    assert equal(rig.video(caches, 4), alone(4))
    handle.remove()
    assert _as_new(caches)


def test_released_bytes_of_slices_are_not_counted_several_times() -> None:
    rig, handle = applied()
    caches = rig.caches()
    whole = torch.zeros(2, 2, *caches.kv[0]["k"].shape)
    for layer, cache in enumerate(caches.kv):
        cache.update(k=whole[layer, 0], v=whole[layer, 1])
    rig.video(caches, 1)
    assert handle.status().released_bytes <= whole.nbytes


# Exceptions in the middle -------------------------------------------------------------------------


FAILS = [*itertools.product((0, 1), ("q", "v", "o", "norm_k"), (0, 3, 6, 9), (1, 0))]
FAST_FAILS = [(0, "q", 0, 1), (1, "v", 0, 0), (1, "o", 3, 1), (0, "norm_k", 6, 0), (1, "norm_k", 9, 1)]


@pytest.mark.parametrize(
    ("layer", "place", "start", "step"),
    [pytest.param(*fail, marks=() if fail in FAST_FAILS else pytest.mark.slow) for fail in FAILS],
)
def test_a_call_that_failed_can_be_made_again(layer: int, place: str, start: int, step: int) -> None:
    rig, _ = applied()
    caches = rig.caches()
    caches.new_video()
    part = getattr(rig.model.blocks[layer].self_attn, place)
    outputs = []
    for now, draw in itertools.product(range(0, 12, 3), (1, 0)):
        if (now, draw) == (start, step):
            hook = part.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                rig.call(caches, now, 3, draw=draw)
            hook.remove()
        outputs.append(rig.call(caches, now, 3, draw=draw))
    assert equal(outputs, alone(4))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_new_video_whose_first_call_failed_can_be_started_again(layer: int) -> None:
    rig, _ = applied()
    caches = rig.caches()
    rig.video(caches, 4, draw=10)
    caches.new_video()
    attention: Any = rig.model.blocks[layer].self_attn
    hook = attention.k.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rig.call(caches, 0, 3, draw=1)
    hook.remove()
    assert equal(rig.video(caches, 4), alone(4))


def test_a_replacement_that_is_refused_leaves_the_roles_before() -> None:
    rig, handle = applied()
    rig.model.__dict__["_cache_config"] = object()  # as diffusers' enable_cache leaves it
    with pytest.raises(PatchedModuleError):
        hf.apply_head_forcing(rig.model, Local(), replace=True)
    del rig.model.__dict__["_cache_config"]
    assert handle.applied
    assert equal(rig.video(rig.caches(), 4), alone(4))


# Threads ------------------------------------------------------------------------------------------


def test_two_threads_with_their_own_caches_get_what_they_would_get_alone() -> None:
    rig, handle = applied()
    expected = [alone(4, draw=10 * number) for number in range(2)]
    results: list[list[Tensor] | BaseException | None] = [None, None]
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        try:
            barrier.wait()
            for _ in range(2):
                results[number] = rig.video(rig.caches(), 4, draw=10 * number)
        except BaseException as error:
            results[number] = error

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for got, want in zip(results, expected, strict=True):
        assert isinstance(got, list), got
        assert equal(got, want)
    assert handle.status().calls == 2 * 2 * 4 * 2 * 2


# A host of another style: fused qkv, other names, heads first, no cache object --------------------


class FusedAttention(nn.Module):
    """Self-attention of a model that leaves the cache to somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.to_qkv, self.to_out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, hidden: Tensor, *, frame_index: int, table: Tensor) -> tuple[Tensor, None]:
        """Attends within `hidden [B, F, 4, 32]` alone; returns a pair."""
        q, k, v = self.to_qkv(hidden.flatten(1, 2)).view(len(hidden), -1, 3, 2, 16).unbind(2)
        own = range(frame_index, frame_index + hidden.shape[1])
        grid = (len(hidden), hidden.shape[1], 4, 2, 16)
        q, k = (rope.rotate(x.reshape(grid), table, own, 2, 2).flatten(1, 2) for x in (q, k))
        out = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return self.to_out(out.transpose(1, 2).flatten(2)).view_as(hidden), None


class ForeignModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stack = nn.ModuleDict({"one": FusedAttention(), "two": FusedAttention()})
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.register_buffer("table", rope_table(DemoConfig(dim=32, heads=2)))
        self.eval().requires_grad_(False)

    def forward(self, hidden: Tensor, frame_index: int) -> Tensor:
        for attention in self.stack.values():
            out, nothing = attention(hidden, frame_index=frame_index, table=self.table)
            assert nothing is None
            hidden = hidden + out
        return hidden


class Foreign(Adapter):
    name = "foreign"

    def why_not(self, model: nn.Module) -> str | None:
        return None if any(True for _ in self.attentions(model)) else "no fused attention"

    def attentions(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, module in model.named_modules():
            if hasattr(module, "to_qkv") and parameter_names(module) == ("hidden", "frame_index", "table"):
                yield name, module

    def heads(self, module: nn.Module) -> tuple[int, int]:
        return int(module.groups), 16  # type: ignore[arg-type]

    def window(self, model: nn.Module) -> int:
        return 6

    def chunk(self, model: nn.Module) -> int:
        return 2

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AttentionCall:
        arguments = bind(module, args, kwargs)
        x = arguments["hidden"]
        return AttentionCall(x.flatten(1, 2), arguments["frame_index"], (x.shape[1], 2, 2), None, arguments)

    def begins_video(self, call: AttentionCall, memo: Memo) -> bool:
        return False

    def project(self, module: nn.Module, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        fused = module.to_qkv(call.x)  # type: ignore[operator]
        q, k, v = fused.view(len(call.x), call.grid[0], 4, 3, 2, 16).unbind(3)
        return q, k, v

    def rotate(self, x: Tensor, call: AttentionCall, positions: Sequence[int]) -> Tensor:
        return rope.rotate(x, call.arguments["table"], positions, 2, 2)

    def output(self, module: nn.Module, out: Tensor, call: AttentionCall, memo: Memo) -> Any:
        flat = module.to_out(out.flatten(2))  # type: ignore[operator]
        return flat.view_as(call.arguments["hidden"]), None


def foreign(roles: Any = None) -> tuple[ForeignModel, hf.HeadForcing]:
    model = ForeignModel()
    return model, hf.apply_head_forcing(model, roles or [[Local(), Memory()]] * 2, adapter=Foreign())


def frames(start: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 2, 4, 32, generator=torch.Generator().manual_seed(100 * seed + start))


@pytest.mark.filterwarnings("ignore:layer 1. never called")  # that is what it does
def test_one_layer_of_a_foreign_host_with_full_roles_sees_the_whole_past() -> None:
    model = ForeignModel()
    layer, table = model.stack["one"], model.table
    starts = range(0, 12, 2)
    # One call over everything sees the future as well: only its last chunk has the same past.
    whole, _ = layer(torch.cat([frames(start) for start in starts], 1), frame_index=0, table=table)
    handle = hf.apply_head_forcing(model, Full(), adapter=Foreign())
    with handle.stream("video"):
        for start in starts:
            last, _ = model.stack["one"](frames(start), frame_index=start, table=table)
    torch.testing.assert_close(last, whole[:, -2:])  # another length of queries, another rounding


def test_named_streams_of_a_foreign_host_never_mix() -> None:
    def alone(seed: int) -> list[Tensor]:
        model, handle = foreign()
        with handle.stream("any"):
            return [model(frames(start, seed), start) for start in range(0, 12, 2)]

    model, handle = foreign()
    outputs: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    for start in range(0, 12, 2):
        for seed, name in enumerate(outputs):
            with handle.stream(name):
                outputs[name].append(model(frames(start, seed), start))
    assert equal(outputs["cond"], alone(0))
    assert equal(outputs["uncond"], alone(1))
    assert [(s.committed, s.pending) for s in handle.status().streams] == [(12, None)] * 2


def test_a_foreign_call_outside_a_stream_is_refused_and_can_be_made_inside() -> None:
    model, handle = foreign()
    with pytest.raises(StreamError, match=r"no cache object.*with handle\.stream\(name\)"):
        model(frames(0), 0)
    assert handle.status().streams == ()
    with handle.stream("video"):
        model(frames(0), 0)
    with pytest.raises(StreamError, match="no cache object"):
        model(frames(2), 2)


def test_streams_open_inside_each_other_are_told_apart() -> None:
    model, handle = foreign()
    with handle.stream("a"):
        a = model(frames(0), 0)
        with handle.stream("b"):
            b = model(frames(0, 1), 0)
        a2 = model(frames(2), 2)
    fresh, other = foreign()
    with other.stream("only"):
        assert equal([fresh(frames(0), 0), fresh(frames(2), 2)], [a, a2])
    with other.stream("second"):
        assert torch.equal(fresh(frames(0, 1), 0), b)


def test_a_chunk_whose_stream_block_failed_stays_pending_and_can_be_made_again() -> None:
    expected_model, undisturbed = foreign()
    with undisturbed.stream("a"):
        expected = [expected_model(frames(start), start) for start in (0, 2, 4)]
    model, handle = foreign()
    with handle.stream("a"):
        outputs = [model(frames(0), 0)]

    def disturbed() -> None:
        with handle.stream("a"):
            model(frames(2, seed=5), 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disturbed()
    assert [(s.committed, s.pending) for s in handle.status().streams] == [(2, (2, 4))]
    with handle.stream("a"):
        outputs += [model(frames(start), start) for start in (2, 4)]
    assert equal(outputs, expected)


def test_a_stream_of_a_thread_is_not_seen_by_another_thread() -> None:
    model, handle = foreign()
    seen: list[BaseException] = []

    def work() -> None:
        try:
            model(frames(0), 0)
        except StreamError as error:
            seen.append(error)

    with handle.stream("mine"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(seen) == 1


@pytest.mark.parametrize("what", ["remove", "reset", "commit"])
def test_a_stream_must_be_left_before_the_handle_is_used(what: str) -> None:
    model, handle = foreign()
    with handle.stream("video"):
        model(frames(0), 0)
        with pytest.raises(StreamActiveError, match="leave the block first"):
            getattr(handle, what)()
        model(frames(2), 2)
    getattr(handle, what)()


def test_a_foreign_host_is_given_back_as_it_was() -> None:
    model = ForeignModel()
    before, expected = snapshot(model), model(frames(0), 0)
    handle = hf.apply_head_forcing(model, Local(), adapter=Foreign())
    with handle.stream("video"):
        model(frames(0), 0)
        forced = model(frames(2), 2)
    assert not torch.equal(forced, model_alone(2))
    handle.remove()
    assert before.diff(snapshot(model)) == []
    assert torch.equal(model(frames(0), 0), expected)


def model_alone(start: int) -> Tensor:
    out: Tensor = ForeignModel()(frames(start), start)
    return out


def test_the_memory_of_a_named_stream_goes_with_the_handle() -> None:
    model, handle = foreign()
    with handle.stream("video"):
        model(frames(0), 0)
    stores = [weakref.ref(stream.store) for layer in handle._layers for stream in layer.streams.values()]
    handle.remove()
    gc.collect()
    assert [ref() for ref in stores] == [None, None]


def test_a_chunk_that_its_stream_finished_cannot_be_rewritten() -> None:
    model, handle = foreign()
    with handle.stream("video"):
        model(frames(0), 0)
        model(frames(2), 2)
    with handle.stream("video"), pytest.raises(ChunkOrderError, match="starts at frame 2, expected 4"):
        model(frames(2), 2)
