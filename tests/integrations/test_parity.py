"""With roles equal to what the model does anyway, the patched model is the unpatched one, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import headforcing as hf
from headforcing.demo.model.pipeline import DemoPipeline
from headforcing.demo.world.words import PROMPT_WORDS
from headforcing.roles import Anchor, Full, HeadRole, Local, SlidingWindow
from headforcing.stores import STORES
from headforcing.testing import bits
from tests.examples import examples
from tests.hosts.rig import Caches, Rig

DTYPES = [torch.float32, torch.bfloat16]
CHUNK = 3


@dataclass(frozen=True)
class Host:
    """What the model does by itself, and the role that says the same."""

    window: int
    sink: int = 0

    @property
    def role(self) -> HeadRole:
        if self.window == -1:
            return Full()
        return SlidingWindow(self.window, self.sink, positions="absolute")

    def __str__(self) -> str:
        return "dense" if self.window == -1 else f"window{self.window}sink{self.sink}"


ONE = Host(7, 1)
HOSTS = [Host(-1), Host(6), ONE, Host(9, 3)]
every_host = pytest.mark.parametrize("host", HOSTS, ids=str)
one_host = pytest.mark.parametrize(
    "host", [host if host == ONE else pytest.param(host, marks=pytest.mark.slow) for host in HOSTS], ids=str
)
"""The others are in the long run only."""
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@dataclass(frozen=True)
class Pass:
    """One call of the model: on which cache, where, how long, with which noise."""

    start: int
    frames: int
    draw: int = 0
    cache: int = 0


@dataclass(frozen=True)
class NewVideo:
    """The host begins another video on the same dicts, by new index tensors or zeros in place."""

    cache: int = 0
    in_place: bool = False


Script = Sequence[Pass | NewVideo]


def append(lengths: Sequence[int], passes: Sequence[int] = (2,), cache: int = 0) -> list[Pass]:
    """Chunks of the given lengths in order, each denoised `passes[i]` times; the last pass is clean."""
    steps, start = [], 0
    for index, length in enumerate(lengths):
        count = passes[index % len(passes)]
        steps += [Pass(start, length, draw, cache) for draw in reversed(range(count))]
        start += length
    return steps


def at_starts(starts: Sequence[int], frames: int = CHUNK) -> list[Pass]:
    return [Pass(start, frames, draw) for start in starts for draw in (1, 0)]


SCRIPTS: dict[str, Script] = {
    "append, one pass per chunk": append([3] * 6, [1]),
    "rewrite a chunk 5, 1 and 3 times": append([3] * 6, [5, 1, 3]),
    "first frame alone": append([1, 3, 3, 3, 3]),
    "chunks of different lengths": append([2, 3, 1, 1, 3, 2, 3]),
    "overlapping starts": at_starts([0, 2, 5, 8, 11, 14]),
    "new video on the same dicts": [*append([3] * 5), NewVideo(), *append([3] * 4)],
    "new video after one chunk": [*append([3]), NewVideo(), *append([3] * 4)],
    "new video after indices zeroed in place": [*append([3] * 4), NewVideo(in_place=True), *append([3] * 4)],
    "new video that begins with one frame": [*append([3] * 4), NewVideo(), *append([1, 3, 3, 3])],
    "new video without a sign, at frame 0": [*append([3] * 2), *append([3] * 4)],
}


@dataclass
class Trace:
    """Everything a host can see of a run: outputs, end indices, and which index tensors hold them."""

    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    indices: list[list[tuple[int, int]]] = dataclasses.field(default_factory=list)
    kept: list[bool] = dataclasses.field(default_factory=list)

    def same(self, other: Trace) -> bool:
        equal = [torch.equal(a, b) for a, b in zip(self.outputs, other.outputs, strict=True)]
        return all(equal) and self.indices == other.indices and self.kept == other.kept


def play(rig: Rig, script: Script, batch: int = 1) -> Trace:
    names = sorted({step.cache for step in script})
    caches = {name: rig.caches(batch) for name in names}
    trace = Trace()
    for step in script:
        cache = caches[step.cache]
        if isinstance(step, Pass):
            before = _index_tensors(cache)
            trace.outputs.append(rig.call(cache, step.start, step.frames, draw=step.draw))
            trace.indices.append(cache.indices())
            trace.kept.append(all(a is b for a, b in zip(before, _index_tensors(cache), strict=True)))
        elif step.in_place:
            for index in _index_tensors(cache):
                index.zero_()
            for cross in cache.cross:
                cross["is_init"] = False
        else:
            cache.new_video()
    return trace


def _index_tensors(cache: Caches) -> list[Tensor]:
    return [layer[name] for layer in cache.kv for name in ("global_end_index", "local_end_index")]


def pair(
    host: Host, script: Script, roles: Any = None, batch: int = 1, **options: Any
) -> tuple[Trace, Trace]:
    """The script on an unpatched and a patched rig; every call of the patched one is ours."""
    dtype = options.pop("dtype", torch.float32)
    expected = play(Rig(host.window, host.sink, dtype=dtype), script, batch)
    rig = Rig(host.window, host.sink, dtype=dtype)
    handle = hf.apply_head_forcing(rig.model, roles or host.role, **options)
    got = play(rig, script, batch)
    calls = sum(isinstance(step, Pass) for step in script)
    assert handle.status().calls == calls * rig.config.layers
    assert handle.status().bypassed == 0
    return expected, got


# Exact --------------------------------------------------------------------------------------------


SHORT = ("rewrite a chunk 5, 1 and 3 times", "new video on the same dicts")


def cases() -> Iterator[Any]:
    """Every script in one host and type, and two of them in others, are in the fast run."""
    for host, dtype, script in itertools.product(HOSTS, DTYPES, SCRIPTS):
        others = (host != ONE) + (dtype != torch.float32)
        fast = others == 0 or (others == 1 and script in SHORT)
        marks = () if fast else pytest.mark.slow
        name = "fp32" if dtype == torch.float32 else "bf16"
        yield pytest.param(host, dtype, SCRIPTS[script], id=f"{host}-{name}-{script}", marks=marks)


@pytest.mark.parametrize(("host", "dtype", "script"), cases())
def test_the_role_of_the_host_gives_the_output_of_the_host(
    host: Host, dtype: torch.dtype, script: Script
) -> None:
    expected, got = pair(host, script, dtype=dtype)
    assert got.same(expected)


@pytest.mark.parametrize("store", sorted(STORES))
@one_host
def test_every_store_reproduces_the_host(host: Host, store: str) -> None:
    expected, got = pair(host, append([1, 3, 2, 3, 3], [2, 1, 3]), store=store)
    assert got.same(expected)


@every_dtype
@one_host
def test_every_sample_of_a_batch_is_exact(host: Host, dtype: torch.dtype) -> None:
    expected, got = pair(host, append([3] * 5), batch=3, dtype=dtype)
    assert got.same(expected)


@settings(max_examples=examples(20))
@given(
    data=st.data(), window=st.integers(3, 9), sink=st.integers(0, 4), store=st.sampled_from(sorted(STORES))
)
def test_chunks_of_any_length_and_any_number_of_passes_are_exact(
    data: st.DataObject, window: int, sink: int, store: str
) -> None:
    sink = min(sink, window - 1)
    lengths = data.draw(st.lists(st.integers(1, window - sink), min_size=1, max_size=7))
    passes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    host = Host(window, sink)
    expected, got = pair(host, append(lengths, passes), store=store, chunk=1)
    assert got.same(expected)


@settings(max_examples=examples(8))
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5), passes=st.integers(1, 3))
def test_the_dense_cache_is_exact_for_chunks_of_any_length(lengths: list[int], passes: int) -> None:
    expected, got = pair(Host(-1), append(lengths, [passes]))
    assert got.same(expected)


@settings(max_examples=examples(8))
@given(order=st.lists(st.booleans(), min_size=2, max_size=16), host=st.sampled_from(HOSTS))
def test_two_caches_in_any_order_are_exact(order: list[bool], host: Host) -> None:
    branches = [iter(append([3] * 8, [2, 1], cache)) for cache in (0, 1)]
    expected, got = pair(host, [next(branches[second]) for second in order])
    assert got.same(expected)


@every_host
def test_an_overlap_of_two_frames_is_exact(host: Host) -> None:
    # Only while the cache has room: in a full cache upstream evicts one frame too many per overlap.
    expected, got = pair(host, at_starts([0, 1, 4, 7]))
    assert got.same(expected)


def test_the_pipeline_is_exact_over_videos_of_different_length_and_batch() -> None:
    def run(patched: bool) -> list[Tensor]:
        rig = Rig()
        pipeline = DemoPipeline(rig.model, window=7, sink=1)
        if patched:
            hf.apply_head_forcing(rig.model, SlidingWindow(7, 1, positions="absolute"))
        generator = torch.Generator().manual_seed(0)
        words = torch.arange(2 * 3 * PROMPT_WORDS).view(2, 3, PROMPT_WORDS) % 20
        runs = [(1, 3), (1, 2), (2, 3), (1, 2)]
        return [pipeline.generate(words[:b], chunks, generator=generator) for b, chunks in runs]

    for expected, got in zip(run(False), run(True), strict=True):
        assert torch.equal(expected, got)


def test_the_global_random_state_is_not_consumed() -> None:
    rig = Rig()
    state = torch.get_rng_state()
    handle = hf.apply_head_forcing(rig.model, Local())
    rig.video(rig.caches(), 4)
    handle.status()
    handle.remove()
    assert torch.equal(torch.get_rng_state(), state)


# Controls: what the exact tests would not forgive -------------------------------------------------


@pytest.mark.parametrize(
    "role",
    [
        SlidingWindow(7, 0, positions="absolute"),
        SlidingWindow(6, 1, positions="absolute"),
        SlidingWindow(7, 1, positions="compact"),
        Full(),
    ],
    ids=["sink ignored", "window one short", "compact positions", "nothing evicted"],
)
def test_a_role_that_differs_from_the_host_differs_as_soon_as_frames_are_evicted(role: HeadRole) -> None:
    expected, got = pair(Host(7, 1), append([3] * 4, [1]), role)
    equal = [torch.equal(a, b) for a, b in zip(expected.outputs, got.outputs, strict=True)]
    assert equal == [True, True, False, False]


def test_one_wrong_head_of_one_layer_is_enough_to_differ() -> None:
    right, wrong = Host(6).role, SlidingWindow(5, positions="absolute")
    expected, got = pair(Host(6), append([3] * 3, [1]), [[right] * 4, [right, right, wrong, right]])
    assert not got.same(expected)


# The same thing said with other roles -------------------------------------------------------------


def test_full_is_the_windowed_model_inside_its_window() -> None:
    expected, got = pair(Host(9), append([3] * 3), Full())
    assert got.same(expected)


@dataclass(frozen=True)
class OtherWindow(SlidingWindow):
    """Says what its parent says, but is another role."""


TWINS: tuple[HeadRole, ...] = (
    SlidingWindow(6, positions="absolute"),
    OtherWindow(6, positions="absolute"),
    Local(recent=3, positions="absolute"),
    Anchor(sink=0, recent=3, positions="absolute"),
)


@every_dtype
@settings(max_examples=examples(4))
@given(rows=st.lists(st.lists(st.sampled_from(TWINS), min_size=4, max_size=4), min_size=2, max_size=2))
def test_heads_split_over_distinct_roles_that_mean_the_same_are_exact(
    dtype: torch.dtype, rows: list[list[HeadRole]]
) -> None:
    expected, got = pair(Host(6), append([3] * 4, [2, 1]), rows, dtype=dtype)
    assert got.same(expected)


def test_heads_moved_together_with_their_roles_give_the_same_video() -> None:
    roles = [Local(), Anchor(), SlidingWindow(6), Full()]
    order = [2, 0, 3, 1]
    expected, moved, unmoved = Rig(9), Rig(9), Rig(9)
    for rig in (moved, unmoved):
        for block in rig.model.blocks:
            _move_heads(block.self_attn, order)
    hf.apply_head_forcing(expected.model, [roles] * 2)
    hf.apply_head_forcing(moved.model, [[roles[head] for head in order]] * 2)
    hf.apply_head_forcing(unmoved.model, [roles] * 2)
    a, b, c = (torch.cat(rig.video(rig.caches(), 5)) for rig in (expected, moved, unmoved))
    # The norms and the output projection sum over heads in another order: equal up to rounding only.
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert (c - a).abs().max() > 0.05


def _move_heads(attention: Any, order: Sequence[int]) -> None:
    rows = torch.arange(64).view(4, 16)[list(order)].flatten()
    for linear in (attention.q, attention.k, attention.v):
        linear.weight.copy_(linear.weight[rows].clone())
        linear.bias.copy_(linear.bias[rows].clone())
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight.copy_(norm.weight[rows].clone())
    attention.o.weight.copy_(attention.o.weight[:, rows].clone())


# Not ours: training and calls without a cache -----------------------------------------------------


def _gradients(rig: Rig, cached: bool) -> list[Tensor]:
    caches = rig.caches() if cached else None
    out = rig.model(
        rig.noise(0, 6 if not cached else 3).requires_grad_(),
        t=torch.full((1,), 0.5),
        context=torch.arange(PROMPT_WORDS)[None],
        kv_cache=caches.kv if caches else None,
        crossattn_cache=caches.cross if caches else None,
    )
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in rig.model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
@pytest.mark.filterwarnings("ignore:head forcing is inactive")
def test_training_gets_the_output_and_the_gradients_of_the_unpatched_model(
    cached: bool, training: bool
) -> None:
    expected, patched = Rig(), Rig()
    for rig in (expected, patched):
        rig.model.requires_grad_(True).train(training)
    handle = hf.apply_head_forcing(patched.model, Local())
    results = [_gradients(rig, cached) for rig in (expected, patched)]
    assert len(results[0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert handle.status().calls == 0
    assert handle.status().bypassed == (2 if cached else 0)


def test_a_bypassed_call_warns_once() -> None:
    rig = Rig()
    hf.apply_head_forcing(rig.model, Local())
    rig.model.train()
    with pytest.warns(UserWarning, match=r"inactive.*eval\(\).*no_grad") as caught:
        rig.video(rig.caches(), 2)
    assert len([w for w in caught if "head forcing" in str(w.message)]) == 1


def test_calls_without_a_cache_are_the_models_own_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    expected, patched = Rig(), Rig()
    handle = hf.apply_head_forcing(patched.model, Local())
    assert torch.equal(patched.call(None, 0, 6), expected.call(None, 0, 6))
    assert not recwarn.list
    assert not handle.status().active


# Numbers that are the same every time -------------------------------------------------------------


def test_the_same_run_gives_the_same_bits() -> None:
    seen = set()
    for _ in range(3):
        rig = Rig(9)
        hf.apply_head_forcing(rig.model, [[Local(), Anchor(), hf.Memory(), Full()]] * 2)
        seen.add(bits(torch.cat(rig.video(rig.caches(), 6))))
    assert len(seen) == 1


def test_no_memory_that_was_never_written_is_read() -> None:
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        rig = Rig(9)
        hf.apply_head_forcing(rig.model, [[Local(), Anchor(), hf.Memory(), Full()]] * 2)
        outputs = torch.cat(rig.video(rig.caches(), 8))
    finally:
        torch.use_deterministic_algorithms(False)
    assert outputs.isfinite().all()
