"""A set of heads of a layer: taken out of a tensor, and put back."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.meta_layer import returns_views
from headforcing.types import Heads

HEADS = 7
members = st.sets(st.integers(0, HEADS - 1), min_size=1).map(sorted)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.complex64])
shapes = st.lists(st.integers(1, 3), max_size=3)


def drawn(shape: list[int], heads: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, heads, 2, dtype=dtype)


@given(members, shapes, dtypes, st.booleans())
def test_what_is_taken_is_what_indexing_takes(
    indices: list[int], shape: Any, dtype: Any, strided: bool
) -> None:
    heads = Heads(indices, HEADS)
    x = drawn(shape, 2 * HEADS, dtype)[..., ::2, :] if strided else drawn(shape, HEADS, dtype)
    expected = x[..., indices, :]
    assert torch.equal(heads.take(x), expected)
    wide = drawn(shape, 2 * len(indices), dtype)
    before = wide.clone()
    heads.take_into(wide[..., ::2, :], x)
    assert torch.equal(wide[..., ::2, :], expected)
    assert torch.equal(wide[..., 1::2, :], before[..., 1::2, :])


@given(members, shapes, dtypes)
def test_what_is_put_back_is_where_it_was_and_nothing_else_moved(
    indices: Any, shape: Any, dtype: Any
) -> None:
    heads, out, part = Heads(indices, HEADS), drawn(shape, HEADS, dtype), drawn(shape, len(indices), dtype)
    before = out.clone()
    heads.put(out, part)
    assert torch.equal(out[..., indices, :], part)
    others = [head for head in range(HEADS) if head not in indices]
    assert torch.equal(out[..., others, :], before[..., others, :])


class Count(TorchDispatchMode):
    """Operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not returns_views(func):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_scattered_heads_are_taken_by_one_operator_and_neighbours_by_none() -> None:
    x, out = torch.randn(2, HEADS, 2), torch.empty(2, 3, 2)
    for indices, taken in (((0, 2, 5), ["index_select"]), ((2, 3, 4), [])):
        heads = Heads(indices, HEADS)
        heads.take(x)
        with Count() as seen:
            heads.take(x)
        assert seen.names == taken
        with Count() as seen:
            heads.take_into(out, x)
        assert seen.names == (taken or ["copy_"])


def test_numbers_of_heads_that_were_first_needed_in_inference_mode_serve_outside_of_it() -> None:
    heads, x = Heads((0, 3, 6), HEADS), torch.randn(HEADS, 2, requires_grad=True)
    with torch.inference_mode():
        heads.take(x)
    heads.take(x).sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == 2 * len(heads)
