"""Rotation of all frames at once: plain against frame by frame, and compiled against plain."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from headforcing.adapters import rope
from headforcing.adapters import rope_fused as fused
from headforcing.adapters.rope_fused import at_once, compiled, packed_spaces, packed_times, rotated
from headforcing.stores.buffers import Size, cut

HEIGHT, WIDTH, ROWS = 3, 5, 64
PATCHES = HEIGHT * WIDTH
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def table(pairs: int) -> Tensor:
    """Multipliers `[rows, pairs]`, complex128."""
    angle = torch.rand(ROWS, pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6.28
    return torch.polar(torch.ones_like(angle), angle)


def parts(pairs: int, positions: list[float], patch: int = 1) -> tuple[Tensor, Tensor]:
    turns, time = table(pairs), pairs - 2 * (pairs // 3)
    height, width = (HEIGHT // patch * patch, WIDTH // patch * patch)
    return rope.temporal_rows(turns[:, :time], positions), rope._spatial_rows(
        turns[:, time:], height, width, patch
    )


def drawn(shape: tuple[int, ...], dtype: torch.dtype, bank: bool, heads: int, seed: int = 0) -> Tensor:
    """Frames `[B, n, P, Hr, D]`: some heads of a chunk, token by token, or slots of a bank, head by head."""
    batch, frames, patches, _, dim = shape
    generator = torch.Generator().manual_seed(seed)
    if not bank:
        return torch.randn(shape, generator=generator).to(dtype)[..., :heads, :]
    (room,) = cut([Size(frames + 2, heads)], (batch, patches, dim), torch.empty(0, dtype=dtype))
    room.copy_(torch.randn(room.shape, generator=generator))
    return room[:, 1 : frames + 1]


def fast(x: Tensor, times: Tensor, spaces: Tensor) -> Tensor:
    return at_once(x, packed_times(times.real, times.imag), packed_spaces(spaces.real, spaces.imag))


places = st.lists(st.one_of(st.integers(0, 2 * ROWS), st.floats(0, 100)), min_size=1, max_size=6)


@given(
    positions=places,
    size=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(3, 20)),
    dtype=st.sampled_from(DTYPES),
    bank=st.booleans(),
    patch=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_all_at_once_is_frame_by_frame_bit_for_bit(
    positions: Any, size: Any, dtype: torch.dtype, bank: bool, patch: int, seed: int
) -> None:
    """Of numbers in up to 32 bits: what float64 may add up otherwise in its last bit is rounded away."""
    batch, heads, pairs = size
    times, spaces = parts(pairs, positions, patch)
    x = drawn((batch, len(positions), len(spaces), 4, 2 * pairs), dtype, bank, heads, seed)
    found, expected = fast(x, times, spaces), rope._by_frame(x, times, spaces)
    assert torch.equal(found, expected)
    assert found.dtype == dtype
    if bank:
        assert found.permute(0, 3, 1, 2, 4).is_contiguous()
        assert expected.permute(0, 3, 1, 2, 4).is_contiguous()
    else:
        assert found.is_contiguous()
        assert expected.is_contiguous()


def test_in_float64_the_two_differ_by_no_more_than_rounding() -> None:
    times, spaces = parts(64, list(range(6)))
    x = torch.randn(1, 6, PATCHES, 3, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = fast(x, times, spaces), rope._by_frame(x, times, spaces)
    size = x.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    assert ((found - expected).abs() <= 2 * torch.finfo(torch.float64).eps * size).all()


@given(positions=places, bank=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_real_tables_are_turned_with_the_same_steps(positions: Any, bank: bool, dtype: torch.dtype) -> None:
    pairs = 16
    tables = tuple(x.float() for x in (table(pairs).real, table(pairs).imag))
    x = drawn((1, len(positions), PATCHES, 3, 2 * pairs), dtype, bank, 2)
    time = rope.temporal_columns(tables[0])
    times = rope.temporal_tables(tuple(positions), time, torch.float32, torch.device("cpu"))
    spaces = tuple(each[:PATCHES, time:] for each in tables)
    found = at_once(x, packed_times(*times), packed_spaces(*spaces))
    assert torch.equal(found, rope.rotate_real(x, tables, positions, HEIGHT, WIDTH))


# Compiled -----------------------------------------------------------------------------------------


SAME = 2
"""More, where the first call has sizes that are equal by chance: tokens and patches, with one frame."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Compiles on the CPU, with a backend that only counts."""
    counter, compile_ = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(fused, "COMPILED", ("cpu",))
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_(f, backend=counter, **how))
    compiled.cache_clear()
    yield counter
    compiled.cache_clear()


MODES = [
    torch.inference_mode,
    torch.no_grad,
    torch.enable_grad,
    functools.partial(torch.autocast, "cpu", torch.bfloat16),
]
"""What a host may be in."""


ALL, FEW = (3, 1, 18, 2, 7, 21), (3, 1, 7)
"""Numbers of frames."""


def every_call(
    dtype: torch.dtype = torch.bfloat16, batches: Any = (1, 2), frames: Sequence[int] = ALL
) -> Iterator[Any]:
    for batch in batches:
        for count in frames:
            for heads in (4, 2, 1):
                times, spaces = parts(10, list(range(count)))
                part, slots = (
                    drawn((batch, count, PATCHES, 4, 20), dtype, bank, heads) for bank in (False, True)
                )
                for x in (part, slots, torch.empty_like(slots).copy_(slots)):
                    yield x, times, spaces


SEEDS = [(0, FEW), *(pytest.param(seed, ALL, marks=pytest.mark.slow) for seed in (1, 2, 3))]


@pytest.mark.parametrize(("seed", "frames"), SEEDS)
def test_it_is_not_compiled_for_every_number_of_frames(
    counted: CompileCounterWithBackend, seed: int, frames: Sequence[int]
) -> None:
    """Once for every way to lie: whole or a part, token by token or head by head, many heads or one."""
    calls = [*every_call(frames=frames)]
    random.Random(seed).shuffle(calls)
    for x, times, spaces in calls:
        assert torch.equal(fast(x, times, spaces), rope._by_frame(x, times, spaces))
    before = counted.frame_count
    assert 1 <= before <= 6 + SAME
    for mode in MODES:
        with mode():
            for call in calls:
                fast(*call)
    assert counted.frame_count == before, "whatever mode the host is in"


@pytest.mark.slow
def test_every_dtype_has_its_own_number_of_tries(counted: CompileCounterWithBackend) -> None:
    for dtype in DTYPES:
        for call in every_call(dtype):
            fast(*call)
    assert counted.frame_count <= (6 + SAME) * len(DTYPES)


def test_it_is_compiled_inside_of_what_is_not(counted: CompileCounterWithBackend) -> None:
    """Head-forced modules run eagerly inside a compiled model."""
    call = next(every_call())
    torch.compiler.disable(fast)(*call)
    assert counted.frame_count == 1


def test_gradients_go_through_the_plain_function(counted: CompileCounterWithBackend) -> None:
    x, times, spaces = next(every_call(torch.float32))
    x.requires_grad_()
    fast(x, times, spaces).square().sum().backward()
    assert counted.frame_count == 0
    assert torch.allclose(x.grad, 2 * x.detach(), atol=1e-5), "a rotation keeps lengths"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_asked_for_by_the_host_alone(mode: Any) -> None:
    x, times, spaces = next(every_call(torch.float32))
    x.requires_grad_()
    with mode():
        assert fast(x, times, spaces).requires_grad is (mode is torch.enable_grad)


@pytest.mark.slow
def test_every_kind_of_layout_has_its_own_number_of_tries(counted: CompileCounterWithBackend) -> None:
    """Where a host changes what is global to PyTorch, everything is compiled once more."""
    calls = [*every_call(batches=(1,))]
    for call in calls:
        fast(*call)
    before, usual = counted.frame_count, torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        for x, times, spaces in calls:
            assert torch.equal(fast(x, times, spaces), rope._by_frame(x, times, spaces))
    finally:
        torch.set_default_dtype(usual)
    assert before < counted.frame_count <= 2 * (6 + SAME)


def test_a_missing_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    compile_ = torch.compile
    monkeypatch.setattr(fused, "COMPILED", ("cpu",))
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_(f, backend=broken, **how))
    compiled.cache_clear()
    with pytest.raises(Exception, match="no compiler here"):
        fast(*next(every_call()))
    compiled.cache_clear()


def test_nothing_is_compiled_where_pytorch_is_told_not_to(counted: CompileCounterWithBackend) -> None:
    with torch._dynamo.config.patch(disable=True):
        fast(*next(every_call()))
    assert counted.frame_count == 0


@pytest.mark.slow
def test_nothing_is_compiled_where_the_environment_forbids_it() -> None:
    program = (
        "import torch; from headforcing.adapters import rope_fused as fused; fused.COMPILED = ('cpu',); "
        "x = torch.randn(1, 2, 6, 3, 8); times = fused.packed_times(*[torch.rand(2, 2)] * 2); "
        "fused.at_once(x, times, torch.rand(2, 6, 2)); "
        "assert not torch._dynamo.utils.counters['stats'], torch._dynamo.utils.counters"
    )
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_plain_function_bit_for_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [fast(*call) for call in every_call(dtype, batches=(2,))]
    monkeypatch.setattr(fused, "COMPILED", ("cpu",))
    compiled.cache_clear()
    for call, plain in zip(every_call(dtype, batches=(2,)), expected, strict=True):
        assert torch.equal(fast(*call), plain)
        assert fast(*call).stride() == plain.stride()
    compiled.cache_clear()


# Nothing comes from the host ----------------------------------------------------------------------


class FromHost(TorchFunctionMode):
    """Tensors made of Python numbers on a device: on `meta`, no operator tells."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and out.device.type != "cpu":
            self.found.append(func.__name__)
        return out


class Copies(TorchDispatchMode):
    """Operators that take from one device and give to another, and data made on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        devices = {x.device for x in leaves if isinstance(x, Tensor)}
        if devices - {torch.device("meta")}:
            self.found.append(str(func))
        return out


def operators(
    positions: list[float], multipliers: Tensor | None = None, cache: rope.RotaryCache | None = None
) -> Copies:
    x = torch.empty(1, len(positions), PATCHES, 2, 20, device="meta")
    multipliers = table(10).to("meta") if multipliers is None else multipliers
    with FromHost() as made, Copies() as seen:
        out = rope.rotate(x, multipliers, positions, HEIGHT, WIDTH, 1, cache)
    assert out.shape == x.shape
    seen.found += made.found
    return seen


@given(places)
def test_no_position_comes_from_the_host(positions: Any) -> None:
    assert operators(positions).found == []


def test_what_is_made_of_a_table_is_made_once() -> None:
    known = table(10).to("meta")
    first, other_frames, again = (operators(places, known).count for places in ([0, 1], [4, 5], [4, 5]))
    assert first > other_frames > again


def test_what_is_made_of_a_table_that_does_not_tell_its_changes_is_made_once_per_call() -> None:
    with torch.inference_mode():
        known, cache = table(10).to("meta").clone(), rope.RotaryCache()
    counts = [operators(places, known, cache).count for places in ([0, 1], [4, 5], [4, 5])]
    assert counts[0] > counts[1] > counts[2]
    assert operators([4, 5], known).count == operators([4, 5], known, rope.RotaryCache()).count == counts[0]


def turned(x: Tensor, multipliers: Tensor) -> Tensor:
    return rope.rotate(x, multipliers, [3, 4, 5], HEIGHT, WIDTH)


def check_tables_are_told_apart() -> None:
    """Another table, one that was written to, one in the place of one that is gone, one in another thread."""
    x, mine = torch.randn(1, 3, PATCHES, 2, 20), table(10)
    for _ in range(3):
        assert torch.equal(turned(x, mine), turned(x, mine.clone()))
        other = mine.flip(0)
        found = turned(x, other)
        assert torch.equal(found, turned(x, mine.flip(0)))
        assert not torch.equal(found, turned(x, mine))
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(turned, x, other).result(), found)
        mine.copy_(other)
        assert torch.equal(turned(x, mine), found)
        del other


def test_tables_are_told_apart() -> None:
    check_tables_are_told_apart()


def test_a_table_that_was_written_to_and_is_taken_for_the_old_one_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Never(int):
        def __ne__(self, other: object) -> bool:
            return False

    monkeypatch.setattr(rope._kept, "_version", Never(0), raising=False)
    monkeypatch.setattr(Tensor, "_version", Never(0))
    with pytest.raises(AssertionError):
        check_tables_are_told_apart()


def test_nothing_is_kept_of_a_table_that_is_gone() -> None:
    x, mine = torch.randn(1, 3, PATCHES, 2, 20), table(10)
    turned(x, mine)
    factors = rope._kept._factors
    assert factors
    del mine
    assert not factors


def test_factors_of_a_long_video_at_true_positions_do_not_pile_up() -> None:
    x, mine = torch.randn(1, 1, PATCHES, 2, 20), table(10)
    for place in range(3 * rope.MOST_KEPT):
        rope.rotate(x, mine, [place], HEIGHT, WIDTH)
        assert len(rope._kept._factors) <= rope.MOST_KEPT + 2


def test_the_number_of_operators_does_not_hang_on_the_number_of_frames() -> None:
    assert len({operators(list(range(frames))).count for frames in (2, 3, 21, 40)}) == 1


MADE = {
    "copied": lambda _, place, dtype, device: torch.tensor(place).to(device, dtype),
    "made": lambda _, place, dtype, device: torch.tensor(place, dtype=dtype, device=device),
}


@pytest.mark.parametrize("full", MADE.values(), ids=MADE)
def test_a_position_from_the_host_is_found(full: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "full", full)
    assert operators([0.5]).found


def test_cosines_and_sines_are_copied_once_for_every_set_of_positions() -> None:
    tables = tuple(torch.empty(PATCHES, 10, device="meta") for _ in range(2))
    x = torch.empty(1, 3, PATCHES, 2, 20, device="meta")
    rope.temporal_tables.cache_clear()
    found = []
    for positions in ([0, 1, 2], [0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]):
        with Copies() as seen:
            rope.rotate_real(x, tables, positions, HEIGHT, WIDTH)
        found.append(len([name for name in seen.found if "_to_copy" in name]))
    assert found == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("elsewhere", ["meta", "cpu"])
def test_cosines_and_sines_are_computed_on_the_cpu_whatever_the_default_is(elsewhere: str) -> None:
    asked = ((0.5, 3), 4, torch.float32, torch.device("cpu"))
    expected = rope.temporal_tables(*asked)
    rope.temporal_tables.cache_clear()
    with torch.device(elsewhere):
        found = rope.temporal_tables(*asked)
    assert all(map(torch.equal, found, expected))


# Planted bugs -------------------------------------------------------------------------------------


def test_a_wrong_turn_is_found() -> None:
    x, times, spaces = next(every_call(torch.bfloat16))
    time, space = (torch.stack([turns.real, turns.imag]) for turns in (times, spaces))
    flat, back = fused._tokens(x)
    expected = rope._by_frame(x, times, spaces)
    time = torch.cat([time, time[:, -1:]], 1)
    assert torch.equal(back(rotated(flat, time.flatten(), space)), expected)
    for wrong in (time.roll(1, 1), time.flip(0), time * 1.01):
        assert not torch.equal(back(rotated(flat, wrong.flatten(), space)), expected)
    assert not torch.equal(back(rotated(flat, time.flatten(), space.roll(1, 1))), expected)
