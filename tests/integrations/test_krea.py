"""Krea Realtime 14B: frames that are computed again in one call are chunks of a video from frame 0 on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.errors import StreamShapeError, UnsupportedModelError
from headforcing.integrations import krea
from headforcing.integrations.krea import Krea
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.types import AttentionCall
from tests.examples import examples
from tests.hosts.krea import KreaAttention, KreaHost, mask_of
from tests.hosts.standin import HEADS, LAYERS, TOKENS

CHUNKS = 5
FAST = ((6, True), (4, False))
CONTEXTS = [
    one if one in FAST else pytest.param(*one, marks=pytest.mark.slow)
    for one in itertools.product((6, 3, 4, 7, 2), (True, False))
]
"""Frames that are computed again, and whether projections are fused; no whole chunks attend to zeros."""


def video(host: KreaHost, model: nn.Module, caches: Any, seed: int = 0) -> list[Tensor]:
    """Two noisy passes over each of some chunks; the context is full after the second or the third."""
    with torch.no_grad():
        starts = range(0, CHUNKS * host.chunk, host.chunk)
        return [
            host.call(model, caches, start, host.chunk, seed + draw) for start in starts for draw in (2, 1)
        ]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("context", "fused"), CONTEXTS)
def test_own_memory_changes_nothing_in_two_videos(context: int, fused: bool) -> None:
    host = KreaHost(context, fused)
    outs = []
    for applied in (False, True):
        model = host.model()
        if applied:
            hf.apply_head_forcing(model, "own")
        caches = host.caches(model)
        outs.append(video(host, model, caches))
        host.new_video(model, caches)
        outs[-1] += video(host, model, caches, 20)
    assert same(*outs)


def judged(host: KreaHost, adapter: Any = None) -> Any:
    model = host.model()
    return hf.verify(model, lambda: video(host, model, host.caches(model)), adapter=adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify_says_so(dtype: torch.dtype) -> None:
    host = KreaHost(4)
    model = host.model(dtype)
    found = hf.verify(model, lambda: video(host, model, host.caches(model)))
    assert (found.result, found.frames, found.memory) == ("equal", 4 + host.chunk, (Full(),) * LAYERS)


class NotFused(Krea):
    def project(self, module: nn.Module, call: AttentionCall) -> Any:
        return super(Krea, self).project(module, call)


class CausalInside(Krea):
    """Every frame is a chunk."""

    def split(self, module: nn.Module, call: AttentionCall) -> Sequence[AttentionCall]:
        mask = create_block_mask(
            lambda b, h, q, k: k // TOKENS <= q // TOKENS, None, None, 128, 128, device="cpu"
        )
        given = call.arguments["block_mask"]
        masked = {**call.arguments, "block_mask": given and mask}
        return super().split(module, dataclasses.replace(call, arguments=masked))


class AtOnce(Krea):
    """All frames attend to each other."""

    def split(self, module: nn.Module, call: AttentionCall) -> Sequence[AttentionCall]:
        return (call,)


class NoZeros(Krea):
    def tokens(self, x: Tensor, frames: Sequence[int | None], call: AttentionCall) -> Tensor:
        return super(Krea, self).tokens(x, frames, call)


class Backwards(Krea):
    def join(self, module: nn.Module, outs: Sequence[Any], call: AttentionCall) -> Any:
        return super().join(module, outs[::-1], call)


class OnePositionOn(Krea):
    """The chunk behind the frames that are computed again leaves a gap."""

    def rotate(self, x: Tensor, call: AttentionCall, positions: Sequence[float], patch: int = 1) -> Tensor:
        last = call.arguments["block_mask"] is None and call.start
        return super().rotate(
            x, call, [at + 1 if last and at >= call.start else at for at in positions], patch
        )


@pytest.mark.parametrize("wrong", [NotFused, CausalInside, AtOnce, NoZeros, Backwards, OnePositionOn])
def test_an_adapter_with_a_bug_is_found(wrong: type[Krea]) -> None:
    assert judged(KreaHost(7), wrong()).result == "different"


class GoesOn(Krea):
    """Frames that are computed again are taken for those where the call says it is."""

    def read(self, module: nn.Module, args: Any, kwargs: Any) -> AttentionCall | None:
        return super(Krea, self).read(module, args, kwargs)


@pytest.mark.parametrize("context", [3, 7])
def test_one_that_goes_on_where_the_last_chunk_ended_is_found(context: int) -> None:
    with pytest.raises(hf.HeadForcingError):
        judged(KreaHost(context), GoesOn())


ROLES: list[HeadRole] = [
    Full(), Local(), Local(2, sink=1), Anchor(), Memory(sink=1, episodic=2, recent=1),
    SlidingWindow(5, 1, positions="absolute"), SlidingWindow(4),
]  # fmt: skip
ROLE_MAPS = st.lists(
    st.lists(st.sampled_from(ROLES), min_size=HEADS, max_size=HEADS), min_size=LAYERS, max_size=LAYERS
)


class _OneByOne(KreaHost):
    """Frames are computed again chunk by chunk, without a mask."""

    def _pass(self, model: Any, caches: Any, latents: Tensor, start: int, time: int) -> Tensor:
        if model.block_mask is None:
            return super()._pass(model, caches, latents, start, time)
        model.block_mask = None
        chunks = latents.split(self.chunk, dim=1)
        outs = [
            super(_OneByOne, self)._pass(model, caches, part, 3 * at, time) for at, part in enumerate(chunks)
        ]
        return torch.cat(outs, dim=1)


@given(ROLE_MAPS, st.sampled_from([3, 6, 9]))
@settings(max_examples=examples(8, 100))
def test_chunks_in_one_call_are_chunks_one_by_one_for_all_roles(
    roles: list[list[HeadRole]], context: int
) -> None:
    outs = []
    for host in (KreaHost(context), _OneByOne(context)):
        model = host.model()
        hf.apply_head_forcing(model, roles)
        outs.append(video(host, model, host.caches(model)))
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 40))
@settings(max_examples=examples(50, 500))
def test_chunks_are_read_from_their_mask(lengths: list[int], tokens: int, spare: int) -> None:
    stops = list(itertools.accumulate(lengths))
    ends = torch.tensor(
        [stop * tokens for stop, n in zip(stops, lengths, strict=True) for _ in range(n * tokens)]
    )
    total = len(ends)
    ends = torch.cat([ends, torch.zeros(spare, dtype=torch.long)])
    ends[total - lengths[-1] * tokens :] += spare // 2  # zeros that the last chunk attends to
    mask = create_block_mask(
        lambda b, h, q, k: (k < ends[q]) | (q == k), None, None, total + spare, total + spare, device="cpu"
    )
    assert krea._chunks(mask, stops[-1], tokens) == (tuple(stops), spare // 2)
    assert krea._chunks(mask, stops[-1], tokens) == (tuple(stops), spare // 2)


OTHER_MASKS: dict[str, Any] = {
    "a window of three frames": lambda b, h, q, k: (k < (q // 24 + 1) * 24) & (k >= (q // 24) * 24),
    "without the first frame": lambda b, h, q, k: (k < (q // 24 + 1) * 24) & ((k >= 8) | (q < 24)),
    "token by token": lambda b, h, q, k: k <= q,
    "later chunks": lambda b, h, q, k: (k < 24) | (q < 24),
    "zeros in the first chunk": lambda b, h, q, k: (k < (q // 24 + 1) * 24) | ((q < 24) & (k >= 72)),
    "nothing": lambda b, h, q, k: (q < 0) & (k < 0),
}


@pytest.mark.parametrize("what", OTHER_MASKS)
def test_other_masks_are_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = create_block_mask(OTHER_MASKS[what], None, None, 128, 128, device="cpu")
    with pytest.raises(
        StreamShapeError, match=r"9 frames .* frame \d attends to frames \[.*expected whole chunks"
    ):
        krea._chunks(mask, 9, TOKENS)


@pytest.mark.parametrize("mask", [True, mask_of(3)], ids=["no mask", "too short"])
def test_what_is_no_mask_of_the_call_is_refused(mask: Any) -> None:
    with pytest.raises(StreamShapeError, match="expected a BlockMask of at least the 160 tokens"):
        krea._chunks(mask, 20, TOKENS)


def test_layers_that_were_fused_are_not_called() -> None:
    """Neither are their weights read."""
    outs = []
    for spoiled in (False, True):
        host = KreaHost()
        model: Any = host.model()
        hf.apply_head_forcing(model, "own")
        for block in model.blocks if spoiled else ():
            for part in (block.self_attn.q, block.self_attn.k, block.self_attn.v):
                part.weight.fill_(float("nan"))
        outs.append(video(host, model, host.caches(model)))
    assert same(*outs)


def test_projections_may_be_fused_after_apply() -> None:
    host = KreaHost(fused=False)
    model: Any = host.model()
    hf.apply_head_forcing(model, "own")
    for block in model.blocks:
        block.self_attn.fuse_projections()
        block.self_attn.to_qkv.weight.data.mul_(1.5).requires_grad_(False)
        block.self_attn.to_qkv.bias.requires_grad_(False)
    found = video(host, model, host.caches(model))
    hf.remove_head_forcing(model)
    assert same(found, video(host, model, host.caches(model)))
    plain = host.model()
    assert not same(found, video(host, plain, host.caches(plain)))


def test_every_chunk_is_a_video_from_frame_0_on() -> None:
    host = KreaHost(6)
    model = host.model()
    handle = hf.apply_head_forcing(model, Local(2, sink=1))
    seen: list[tuple[int, tuple[int | None, ...]]] = []
    with handle.observe(lambda one: seen.append((one.call.start, one.frames[0]))):
        video(host, model, host.caches(model))
    first_layer = [one for number, one in enumerate(seen) if number % LAYERS == 0]
    whole = [(3, (0, 1, 2, 3, 4, 5)), *[(6, (0, 4, 5, 6, 7, 8))] * 2]
    assert first_layer[-6:] == whole * 2


def test_counters_stay_numbers_and_removal_leaves_them() -> None:
    """As in the base model, whose pipeline sets them to 0 before every chunk."""
    host = KreaHost()
    model = host.model()
    handle = hf.apply_head_forcing(model, Local())
    caches = host.caches(model)
    video(host, model, caches)
    counts = [[cache[name] for name in ("global_end_index", "local_end_index")] for cache in caches["kv"]]
    assert counts == [[(9 + 3) * TOKENS] * 2] * LAYERS
    with torch.no_grad():
        host._begin(model, caches, CHUNKS * host.chunk)
    counts = [[cache[name] for name in ("global_end_index", "local_end_index")] for cache in caches["kv"]]
    assert counts == [[9 * TOKENS] * 2] * LAYERS
    handle.remove()
    assert [
        [cache[name] for name in ("global_end_index", "local_end_index")] for cache in caches["kv"]
    ] == counts
    assert not any(bool(cache[name].any()) for cache in caches["kv"] for name in ("k", "v"))


@pytest.mark.slow
def test_compiled_it_is_served_between_two_graphs() -> None:
    host = KreaHost(4)
    outs = []
    torch._dynamo.reset()
    for compiled in (False, True):
        model: Any = host.model()
        handle = hf.apply_head_forcing(model, "own")
        for block in model.blocks if compiled else ():
            block.self_attn.compile(backend="eager")
        outs.append(video(host, model, host.caches(model)))
        assert not handle.status().bypassed
    torch._dynamo.reset()
    assert same(*outs)


def test_a_prompt_switch_is_refused_with_the_reason() -> None:
    host = KreaHost()
    model = host.model()
    handle = hf.apply_head_forcing(model, Local())
    video(host, model, caches := host.caches(model))
    with pytest.raises(UnsupportedModelError, match="computes its past again"):
        handle.switch_prompt("cut")
    del caches  # a timeline lives as long as they do


def test_it_is_told_from_self_forcing_by_its_markers() -> None:
    model = KreaHost().model()
    assert "but no incremental_update or fuse_projections" in str(SelfForcing().why_not(model))
    assert (find_adapter(model).name, hf.explain(model).adapter) == ("krea", "krea")


class _Scope(KreaAttention):
    def forward(  # type: ignore[override]
        self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        current_start: int = 0, cache_start: int | None = None, kv_cache_attention_bias: float = 1.0,
    ) -> Any: ...  # fmt: skip


def test_the_attention_of_scope_is_refused_with_the_reason() -> None:
    model = nn.ModuleDict({"self_attn": _Scope()})
    with pytest.raises(UnsupportedModelError, match="kv_cache_attention_bias, which no role can say"):
        hf.apply_head_forcing(model, Local())
