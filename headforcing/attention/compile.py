"""A call as one operator, so that a compiled model stays one graph around it.

`torch.compile` cannot look into a memory whose choices are made in Python, and need not. To the graph, a call
of attention is `headforcing::attend`: it knows the shape of the output, and which tensors are written. When
the graph runs, the operator puts the call together again and serves it as without a compiler.

What is written is declared, with two exceptions: the tensor that stands for the timeline, and the memory that
the first call takes from the base model's own keys and values (`Adapter.release`). No graph reads them, and
what is declared may be copied.

A call travels as its tensors, its numbers, and a template that says where they were. One that cannot be taken
apart so, because it carries an object of the base model, is served between two graphs.
"""

from __future__ import annotations

import functools
import itertools
import json
import weakref
from collections.abc import Mapping, MutableMapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from headforcing.errors import StreamError, StreamShapeError
from headforcing.types import TracedCall


class Served(Protocol):
    """What serves calls."""

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serves one, without a compiler."""


def serve_between_graphs(served: Served, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Serves one, and breaks the graph that is being made."""
    from headforcing.attention import uncompiled

    return uncompiled.serve(served, args, kwargs)


POSSIBLE = hasattr(torch.Tag, "cudagraph_unsafe")
"""Whether an operator can forbid that CUDA graphs are captured around it; else calls stay between graphs."""
_served: MutableMapping[int, Served] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number(served: Served) -> Tensor:
    """A new number, by which an operator finds what serves its calls; a tensor, so that layers are alike."""
    key = next(_numbers)
    _served[key] = served
    with torch.inference_mode(False):
        return torch.tensor(key, device="cpu")


def counter() -> Tensor:
    """What every operator of a model writes, so that a graph leaves none out and keeps their order."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=torch.long, device="cpu")


# Under the compiler -----------------------------------------------------------------------------------


def fits(value: Any) -> bool:
    """Whether a call can be taken apart."""
    if value is None or isinstance(value, Tensor | bool | int | float):
        return True
    if isinstance(value, str):
        return value.isprintable() and '"' not in value and "\\" not in value
    if type(value) is dict:
        return all(isinstance(key, str) and fits(key) and fits(item) for key, item in value.items())
    return type(value) in (list, tuple) and all(fits(item) for item in value)


def attend(key: Tensor, order: Tensor, call: TracedCall) -> tuple[Tensor, Tensor]:
    """One call of attention: the output, and the whole numbers that come with it."""
    like, dtype = call.like, call.like.dtype
    casts = torch.is_autocast_enabled(like.device.type)
    if casts:
        dtype = torch.get_autocast_dtype(like.device.type)
    numbers = torch.empty(call.numbers, dtype=torch.long, device="cpu")
    written = [key, order, *call.writes, numbers]
    arguments, *parts = _taken_apart([like, (), call.arguments], written)
    template = f'{{"call":{arguments},"dtype":"{dtype}","casts":{int(casts)}}}'
    return torch.ops.headforcing.attend(written, *parts, template), numbers


def note_phase(key: Tensor, order: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One call of the module whose arguments tell the phase of a pass."""
    written = [key, order]
    call, *parts = _taken_apart([args, kwargs], written)
    torch.ops.headforcing.note_phase(written, *parts, call)


def _taken_apart(value: Any, written: list[Tensor]) -> tuple[str, list[Tensor], list[int], list[float]]:
    """The template of a value; its tensors, but for those that are written; its numbers."""
    tensors: list[Tensor] = []
    numbers: list[int] = []
    floats: list[float] = []
    return _template(value, (written, tensors, numbers, floats)), tensors, numbers, floats


def _template(value: Any, parts: tuple[list[Any], ...]) -> str:
    """A value as JSON, written by hand because a compiler follows; tensors and numbers by their index."""
    if isinstance(value, dict):
        return "{" + ",".join([f'"{key}":{_template(item, parts)}' for key, item in value.items()]) + "}"
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return f'["{kind}",{",".join(["0", *[_template(item, parts) for item in value]])}]'
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    written, tensors, numbers, floats = parts
    if isinstance(value, Tensor):
        return _index_of(value, written, tensors)
    kind, held = ("float", floats) if isinstance(value, float) else ("number", numbers)
    held.append(value)
    return f'["{kind}",{len(held) - 1}]'


def _index_of(x: Tensor, written: list[Tensor], tensors: list[Tensor]) -> str:
    for index, known in enumerate(written):
        if known is x:
            return f'["written",{index}]'
    kind = "complex" if x.is_complex() else "tensor"  # inductor passes over operators given complex ones
    tensors.append(torch.view_as_real(x) if x.is_complex() else x)
    return f'["{kind}",{len(tensors) - 1}]'


# When the graph runs ----------------------------------------------------------------------------------


_operator = functools.partial(
    torch.library.custom_op,
    mutates_args=("written",),
    **({"tags": (torch.Tag.cudagraph_unsafe,)} if POSSIBLE else {}),
)


@_operator("headforcing::attend")
def _attend(
    written: list[Tensor], tensors: list[Tensor], numbers: list[int], floats: list[float], template: str
) -> Tensor:
    layout, like, promised = _read(template), tensors[0], written[-1]
    _, args, kwargs = _together(layout["call"], _by_kind(written, tensors, numbers, floats))
    dtype = _dtype(layout)
    with torch.autocast(like.device.type, dtype) if layout["casts"] else nullcontext():
        answer = _serve(written, args, kwargs)
    y: Tensor
    y, *rest = [leaf for leaf in pytree.tree_leaves(answer) if leaf is not None]
    ends = [leaf for leaf in rest if not isinstance(leaf, Tensor)]  # tensors are arguments, given back
    if (y.shape, y.dtype, len(ends)) != (like.shape, dtype, len(promised)):
        raise StreamShapeError(
            f"under torch.compile, attention returned {tuple(y.shape)} in {y.dtype} and {len(ends)} numbers, "
            f"but its adapter's traced_call() promised {tuple(like.shape)} in {dtype} and {len(promised)}: "
            "mend traced_call(), or return None there"
        )
    promised.copy_(torch.tensor(ends, dtype=promised.dtype))
    return y.contiguous()


@_attend.register_fake
def _(
    written: list[Tensor], tensors: list[Tensor], numbers: list[int], floats: list[float], template: str
) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape, dtype=_dtype(_read(template)))


@_operator("headforcing::note_phase")
def _note_phase(
    written: list[Tensor], tensors: list[Tensor], numbers: list[int], floats: list[float], template: str
) -> None:
    _serve(written, *_together(_read(template), _by_kind(written, tensors, numbers, floats)))


@_note_phase.register_fake
def _(
    written: list[Tensor], tensors: list[Tensor], numbers: list[int], floats: list[float], template: str
) -> None:
    return None


def _serve(written: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    key, order = written[:2]
    order.add_(1)
    served = _served.get(int(key))
    if served is None:
        raise StreamError(
            f"a graph calls head forcing number {int(key)}, which is gone or of another process: compile the "
            "model where roles are applied"
        )
    return served.serve(args, kwargs)


def _dtype(layout: Mapping[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, layout["dtype"].removeprefix("torch."))
    return dtype


@functools.lru_cache(maxsize=256)
def _read(template: str) -> Any:
    return json.loads(template)


def _by_kind(*parts: list[Any]) -> Mapping[str, list[Any]]:
    return dict(zip(("written", "tensor", "number", "float"), parts, strict=True))


def _together(node: Any, parts: Mapping[str, list[Any]]) -> Any:
    """The value a template stands for."""
    if isinstance(node, dict):
        return {key: _together(item, parts) for key, item in node.items()}
    if not isinstance(node, list):
        return node
    kind, index, *items = node
    if kind == "complex":
        return torch.view_as_complex(parts["tensor"][index])
    if kind in parts:
        return parts[kind][index]
    values = [_together(item, parts) for item in items]
    return values if kind == "list" else tuple(values)
