"""Rotation of all frames at once: against frame by frame, and the kernel against the specification."""

from __future__ import annotations

import importlib
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from headforcing.adapters import rope
from headforcing.adapters import rope_fused as fused
from headforcing.adapters.rope_fused import at_once, packed, rotated
from headforcing.errors import RoleError
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
    return at_once(x, packed(times.real, times.imag), packed(spaces.real, spaces.imag))


def drawn_call(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of three frames, and multipliers of frames and patches."""
    times, spaces = parts(10, [0, 1, 2])
    return drawn((1, 3, PATCHES, 4, 20), dtype, False, 4), times, spaces


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
    times = rope.temporal_tables(torch.device("cpu"), tuple(positions), time, torch.float32)
    spaces = tuple(each[:PATCHES, time:] for each in tables)
    found = at_once(x, packed(*times), packed(*spaces))
    assert torch.equal(found, rope.rotate_real(x, tables, positions, HEIGHT, WIDTH))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_asked_for_by_the_host_alone(mode: Any) -> None:
    x, times, spaces = drawn_call(torch.float32)
    x.requires_grad_()
    with mode():
        found = fast(x, times, spaces)
    assert found.requires_grad is (mode is torch.enable_grad)
    if found.requires_grad:
        found.square().sum().backward()
        assert torch.allclose(x.grad, 2 * x.detach(), atol=1e-5), "a rotation keeps lengths"


# The kernel ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """The kernel in Triton's interpreter, on the CPU."""
    pytest.importorskip("triton", reason="requires Triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, "headforcing.adapters.rope_triton", raising=False)
        yield importlib.import_module("headforcing.adapters.rope_triton")
    sys.modules.pop("headforcing.adapters.rope_triton", None)


SIZES = [(1, 3, 2, 10, 5), (2, 1, 3, 8, 16), (1, 2, 1, 64, 17)]
"""Samples, frames, heads, pairs of channels, patches."""


def check_kernel(interpreted: Any, dtype: torch.dtype, tables: torch.dtype, bank: bool, size: Any) -> None:
    """Rounded to half precision by PyTorch: the interpreter cuts the last bits off."""
    samples, frames, heads, pairs, patches = size
    time, generator = pairs - 2 * (pairs // 3), torch.Generator().manual_seed(1)
    x = drawn((samples, frames, patches, heads + 1, 2 * pairs), dtype, bank, heads)
    times, spaces = (
        torch.randn(2, rows, columns, dtype=tables, generator=generator)
        for rows, columns in ((frames, time), (patches, pairs - time))
    )
    out = torch.empty_like(x, dtype=torch.float32)
    interpreted.rotate_into(out, x, times, spaces)
    assert torch.equal(out, rotated(x.float(), times, spaces))
    if dtype == torch.float32:
        found = interpreted.rotate(x, times, spaces)
        assert torch.equal(found, out)
        assert found.stride() == at_once(x, times, spaces).stride()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("tables", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_the_specification_bit_for_bit(
    interpreted: Any, dtype: torch.dtype, tables: torch.dtype, bank: bool, size: Any
) -> None:
    check_kernel(interpreted, dtype, tables, bank, size)


def test_a_kernel_that_reads_past_its_frame_is_found(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = interpreted.triton.cdiv
    monkeypatch.setattr(interpreted.triton, "cdiv", lambda a, b: right(a, b) - (a > b))
    with pytest.raises(AssertionError):
        check_kernel(interpreted, torch.float32, torch.float64, False, SIZES[2])


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nobody asked for the kernel so far."""
    fused.kernel.cache_clear()
    yield
    fused.kernel.cache_clear()


@pytest.mark.parametrize(
    "missing", ["Triton is not installed", "no C compiler", "no headers", "HEADFORCING_TRITON is 0"]
)
def test_without_what_builds_the_kernel_the_specification_runs_and_one_warning_says_so(
    fresh: None, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, times, spaces = drawn_call(torch.bfloat16)
    monkeypatch.setattr(fused, "KERNEL", ("cpu",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None if "Triton" in missing else object())
    monkeypatch.setattr(shutil, "which", lambda _: None if "compiler" in missing else "gcc")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: "nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("HEADFORCING_TRITON", "0" if "is 0" in missing else "1")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [fast(x, times, spaces) for _ in range(3)]
    assert all(torch.equal(one, rope._by_frame(x, times, spaces)) for one in found)
    assert len(said) == 1
    assert missing.removeprefix("no ") in str(said[0].message)


@pytest.mark.parametrize(
    ("frames", "patches", "time"), [(2, PATCHES, 4), (3, PATCHES - 1, 4), (3, PATCHES, 3)]
)
def test_factors_that_do_not_fit_are_refused_before_a_kernel_reads_past_them(frames, patches, time) -> None:
    x, _, _ = drawn_call(torch.float32)
    with pytest.raises(RoleError, match="cannot be rotated by factors"):
        at_once(x, torch.randn(2, frames, time), torch.randn(2, patches, 6))


def test_gradients_and_channels_that_lie_apart_go_through_the_specification(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, times, spaces = drawn_call(torch.float32)
    monkeypatch.setattr(fused, "KERNEL", ("cpu",))
    monkeypatch.setattr(fused, "kernel", lambda: pytest.fail("the kernel was asked for"))
    apart = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(fast(apart, times, spaces), rope._by_frame(x, times, spaces))
    assert fast(x.requires_grad_(), times, spaces).requires_grad


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
    monkeypatch.setattr(Tensor, "_version", 0)
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
    asked = (torch.device("cpu"), (0.5, 3), 4, torch.float32)
    expected = rope.temporal_tables(*asked)
    rope.temporal_tables.cache_clear()
    with torch.device(elsewhere):
        found = rope.temporal_tables(*asked)
    assert all(map(torch.equal, found, expected))


# Planted bugs -------------------------------------------------------------------------------------


def test_a_wrong_turn_is_found() -> None:
    x, times, spaces = drawn_call(torch.bfloat16)
    time, space = (torch.stack([turns.real, turns.imag]) for turns in (times, spaces))
    expected = rope._by_frame(x, times, spaces)
    assert torch.equal(rotated(x, time, space), expected)
    for wrong in (time.roll(1, 1), time.flip(0), time * 1.01):
        assert not torch.equal(rotated(x, wrong, space), expected)
    assert not torch.equal(rotated(x, time, space.roll(1, 1)), expected)
