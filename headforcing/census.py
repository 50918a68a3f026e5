"""Bytes of the tensors that are made while code runs, and how many were alive at once at most.

Only what an operator returns is seen, on any device, also on `meta`, where nothing is computed and no memory
is taken. Scratch space inside a kernel is not seen, so softmax attention is replaced by its result alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
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


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
