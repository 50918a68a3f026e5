"""What is made of a table is made once, and never shown when the table is another one by now."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

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
