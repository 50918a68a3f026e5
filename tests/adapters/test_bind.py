"""`bind` is what `inspect` makes of a call, right or wrong, and the call in the right order."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from headforcing.adapters import signatures


class Plain(nn.Module):
    def forward(self, x, y, z=3, none=None):
        """All can be given by place or by name."""


class Named(nn.Module):
    def forward(self, x, *, y, z=3):
        """Some by name only."""


class Open(nn.Module):
    def forward(self, x, *more, y=2, **rest):
        """Any number."""


def by_inspect(module: nn.Module, args: Any, kwargs: Any) -> Any:
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def answer(how: Any, *call: Any) -> Any:
    """The arguments in their order, or what is wrong with them."""
    try:
        return list(how(*call).items())
    except TypeError as error:
        return str(error)


calls = st.tuples(
    st.sampled_from([Plain(), Named(), Open()]),
    st.lists(st.integers(0, 9), max_size=5).map(tuple),
    st.dictionaries(st.sampled_from(["x", "y", "z", "none", "other", "self"]), st.integers(0, 9), max_size=4),
)


def check(*call: Any) -> None:
    assert answer(signatures.bind, *call) == answer(by_inspect, *call)


@given(calls)
def test_a_call_is_bound_as_inspect_does(call: Any) -> None:
    check(*call)


def check_some() -> None:
    for args, kwargs in (((1,), {}), ((1, 2), {"other": 3}), ((1, 2, 3, 4), {})):
        check(Plain(), args, kwargs)


@pytest.mark.parametrize("wrong", ["required", "defaults", "names"])
def test_what_passes_over_a_part_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names, defaults, required = signatures._simple(Plain)
    broken = {
        "required": (names, defaults, frozenset()),
        "defaults": (names, {**defaults, "other": 0}, required),
        "names": ((names[0], *names[:0:-1]), defaults, required),
    }[wrong]
    check_some()
    monkeypatch.setattr(signatures, "_simple", lambda _: broken)
    with pytest.raises(AssertionError):
        check_some()
