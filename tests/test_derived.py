"""What is made of a table is made once, and never shown when the table is another one by now."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from headforcing import derived as module
from headforcing.derived import KEPT, derived
from headforcing.rope import rotate

calls: list[tuple[float, ...]] = []


def scaled(table: Tensor, *asked: float) -> Tensor:
    calls.append(asked)
    return table * sum(asked)


def negated(table: Tensor, *asked: float) -> Tensor:
    return -scaled(table, *asked)


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def test_it_is_made_once_for_all_layers_and_passes() -> None:
    table = torch.ones(3)
    found = [derived(table, scaled, 1, 2) for _ in range(5)]
    assert calls == [(1, 2)]
    assert len({id(each) for each in found}) == 1


def test_every_function_number_and_table_has_its_own() -> None:
    one, other = torch.ones(3), torch.ones(3)
    found = [
        derived(table, make, *asked)
        for table in (one, other)
        for make in (scaled, negated)
        for asked in ((1, 2), (2, 1), (1, 2.0), (3,))
    ]
    assert len({id(each) for each in found}) == len(found) == len(calls)


def write(table: Tensor) -> None:
    table.mul_(2)


def move(table: Tensor) -> None:
    table.data = table.data * 2


def cast(table: Tensor) -> None:
    table.data = table.data.double() * 2


def turn(table: Tensor) -> None:
    table.t_()


CHANGES = {"written to": write, "other memory": move, "another type": cast, "turned round": turn}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_table_that_changed_is_read_anew(change: Any) -> None:
    table = torch.arange(6.0).view(2, 3)
    before = derived(table, scaled, 2).clone()
    change(table)
    after = derived(table, scaled, 2)
    assert torch.equal(after, 2 * table)
    assert after.shape != before.shape or not torch.equal(after, before)


@given(st.lists(st.sampled_from(["write", "look", "look"]), max_size=12))
def test_it_is_what_it_would_be_if_nothing_were_kept(steps: list[str]) -> None:
    table = torch.ones(2)
    for number, step in enumerate(steps):
        if step == "write":
            table.fill_(number)
        else:
            assert torch.equal(derived(table, scaled, 3), 3 * table)


def test_no_more_is_kept_than_is_said_and_what_was_asked_for_last() -> None:
    table = torch.ones(1)
    for number in range(3 * KEPT):
        derived(table, scaled, 0)
        derived(table, scaled, 1 + number)
    assert calls.count((0,)) == 1
    assert len(module._shelves[table].made) == KEPT


def test_nothing_outlives_its_table() -> None:
    table = torch.ones(3)
    kept = weakref.ref(derived(table, scaled, 1))
    before = len(module._shelves)
    del table
    gc.collect()
    assert kept() is None
    assert len(module._shelves) == before - 1


def first_rows(table: Tensor, *asked: float) -> Tensor:
    return table[: int(sum(asked))]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_part_of_a_table_does_not_keep_the_table(mode: Any) -> None:
    """A view holds what it is a view of, so neither would ever go."""
    table, before = torch.ones(3), len(module._shelves)
    with mode():
        assert torch.equal(derived(table, first_rows, 2), table[:2])
    gone = weakref.ref(table)
    del table
    gc.collect()
    assert gone() is None
    assert len(module._shelves) == before


@pytest.mark.parametrize("positions", [[0, 1, 2], [0, 2, 3], [0.5, 1.5, 2.5], [7, 8, 9]])
def test_tables_of_hosts_that_make_them_anew_go(positions: Any) -> None:
    x, before = torch.randn(1, 3, 4, 1, 12), len(module._shelves)
    for _ in range(3):
        rotate(x, torch.polar(torch.ones(8, 6), torch.rand(8, 6)), positions, 2, 2)
    gc.collect()
    assert len(module._shelves) == before


def test_other_memory_at_the_same_address_is_read_anew() -> None:
    """The allocator gives memory that was let go to the next one who asks."""
    table = torch.ones(64)
    for number in range(1, 50):
        table.data = torch.zeros(1)
        table.data = torch.full((64,), float(number))
        assert torch.equal(derived(table, scaled, 1), table)


def test_threads_share_a_table() -> None:
    """More numbers than are kept, so that one thread lets go what another one looks for."""
    table, wrong = torch.ones(2), []

    def look(seed: int) -> None:
        for step in range(2000):
            number = (seed * 7 + step * (seed + 1)) % (KEPT + 2)
            if not torch.equal(derived(table, scaled, number), table * number):
                wrong.append(number)  # pragma: no cover

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(look, range(4)))
    assert wrong == []
    assert len(module._shelves[table].made) <= KEPT


def test_what_a_tracer_makes_is_not_kept() -> None:
    table = torch.ones(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(derived(table, scaled, 1), FakeTensor)
    assert torch.equal(derived(table, scaled, 1), table)


def test_a_table_without_data_is_served(recwarn: pytest.WarningsRecorder) -> None:
    with FakeTensorMode():
        assert derived(torch.ones(3), scaled, 1).shape == (3,)
    assert derived(torch.ones(3, device="meta"), scaled, 1).shape == (3,)
    assert not recwarn.list


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
def test_every_queue_of_a_gpu_has_its_own() -> None:
    table = torch.ones(3, device="cuda")
    one = derived(table, scaled, 1)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = derived(table, scaled, 1)
        assert other is derived(table, scaled, 1)
    assert one is not other
    assert one is derived(table, scaled, 1)


def test_of_a_table_made_in_inference_mode_nothing_is_kept() -> None:
    """PyTorch does not count what is written to it."""
    with torch.inference_mode():
        table = torch.ones(3)
        derived(table, scaled, 1)
        table.fill_(5)
        assert torch.equal(derived(table, scaled, 1), table)


def test_what_was_made_in_inference_mode_is_used_outside_of_it() -> None:
    table = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        found = derived(table, scaled, 1)
    assert derived(table, scaled, 1) is found
    assert not found.is_inference()
    assert not found.requires_grad


def test_a_host_that_writes_to_its_table_is_followed() -> None:
    angle = torch.rand(8, 6, dtype=torch.float64)
    table, x = torch.polar(torch.ones_like(angle), angle), torch.randn(1, 2, 4, 1, 12)
    rotate(x, table, [0, 3], 2, 2)
    table.copy_(table.flip(0))
    assert torch.equal(rotate(x, table, [0, 3], 2, 2), rotate(x, table.clone(), [0, 3], 2, 2))


# Planted bugs -------------------------------------------------------------------------------------


def test_forgetting_what_changed_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same(tuple[Any, ...]):
        __eq__ = lambda self, other: True  # noqa: E731
        __ne__ = lambda self, other: False  # noqa: E731
        __hash__ = tuple.__hash__

    shelf = module._Shelf
    monkeypatch.setattr(module, "_Shelf", lambda state: shelf(Same(state)))
    with pytest.raises(AssertionError):
        test_a_host_that_writes_to_its_table_is_followed()
    with pytest.raises(AssertionError):
        test_a_table_that_changed_is_read_anew(write)
