"""Bytes of the tensors that are made while code runs, and how many were alive at once at most.

Only what an operator returns is seen, on any device, also on `meta`, where nothing is computed and no memory
is taken. Scratch space inside a kernel is not seen, so softmax attention is replaced by its result alone.
What an operator returns on `meta` is worked out in Python, longer than many a kernel runs, so it can be
remembered.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Census(TorchDispatchMode):
    """Counts while entered; each storage once, as long as it lives.

    Attributes:
        live: bytes made since it was entered and still alive.
        most: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operator and notes the storages that it made."""
        before = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in before | self._known.keys():
                storage = tensor.untyped_storage()
                self._known[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self._forget, key)
        return out

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


class ResultAlone(TorchFunctionMode):
    """Softmax attention that computes nothing while entered: a tensor of the right shape."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Everything else runs as it is."""
        given: Mapping[str, Any] = kwargs or {}
        if func is scaled_dot_product_attention:
            return torch.empty_like(given.get("query", args[0] if args else None))
        return func(*args, **given)


class Outline(NamedTuple):
    """All there is to a tensor on `meta` that shares its memory with no other."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


Known = dict[Hashable, Outline]
"""What operators return, by their names and arguments."""


class Remembering(TorchDispatchMode):
    """Works out once what an operator makes of such tensors on `meta`, while entered.

    There is nothing in them, so what comes out hangs on their outlines and on the other arguments alone. All
    that may hang on more runs as it is: operators that write or return views, and those that are given a
    tensor of another device.

    Args:
        known: what was worked out before; what is worked out now is added.
    """

    def __init__(self, known: Known) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operator, or makes what it made of such arguments before."""
        given = kwargs or {}
        key = _asked(func, args, given) if _makes_one_tensor(func) else None
        if key is None:
            return func(*args, **given)
        if (known := self._known.get(key)) is not None:
            return torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
        out = func(*args, **given)
        if (outline := _outline(out, (args, given))) is not None:
            self._known[key] = outline
        return out


def returns_views(func: Any) -> bool:
    """Whether an operator returns views of what it was given, and has nothing to do."""
    kinds = [one.alias_info for one in func._schema.returns]
    return any(kind is not None and not kind.is_write for kind in kinds)


@functools.cache
def _makes_one_tensor(func: Any) -> bool:
    """Whether an operator writes to nothing and returns one tensor that is no view."""
    schema = func._schema
    kinds = [str(one.type) for one in schema.returns]
    shares = any(one.alias_info is not None for one in (*schema.arguments, *schema.returns))
    return kinds == ["Tensor"] and not schema.is_mutable and not shares


def _asked(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable | None:
    """An operator with its arguments; `None`: one of them is a tensor with numbers in it, or of a kind."""
    try:
        return func, _told(args), tuple((name, _told(value)) for name, value in kwargs.items())
    except _NotTold:
        return None


class _NotTold(Exception):
    """An argument is more than can be told."""


def _told(value: Any) -> Hashable:
    """An argument as part of a key: 1, 1.0 and True are three."""
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        if value.device.type != "meta" or value.layout is not torch.strided:
            raise _NotTold
        return value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg()
    if isinstance(value, Tensor):
        raise _NotTold
    if kind is list or kind is tuple:
        return tuple([_told(one) for one in value])
    return kind, value


def _outline(out: Tensor, given: Any) -> Outline | None:
    """What came out; `None` where a tensor made anew would be another one."""
    if type(out) is not Tensor or out.device.type != "meta" or out.layout is not torch.strided:
        return None
    twin = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
    alike = _key(out) not in {_key(x) for x in tree_leaves(given) if isinstance(x, Tensor)}
    alike = alike and out.untyped_storage().nbytes() == twin.untyped_storage().nbytes()
    alike = alike and not (out.storage_offset() or out.is_conj() or out.is_neg())
    return Outline(tuple(out.shape), out.stride(), out.dtype) if alike else None


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
