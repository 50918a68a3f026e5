"""The tensors of a base model's own cache: their memory while head forcing is in, and edits from outside.

What is noted about them holds them weakly, for the timeline dies with the base model's cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headforcing.errors import StreamShapeError

TensorVersion = tuple["weakref.ref[Tensor]", int | None]
"""A tensor as it was when last seen: which one, and how often it was edited."""
Counter = Tensor | int
"""A number in a base model's cache: a tensor of one element, which is written in place, or a number."""


def free(tensors: Sequence[Tensor], memo: MutableMapping[str, Any]) -> int:
    """Takes their memory from tensors that the base model holds, once; returns the bytes that are free."""
    if "freed" in memo:
        return 0
    memo["freed"] = [weakref.ref(tensor) for tensor in tensors]  # the anchor may be among them
    freed = sum(_exclusive_bytes(tensor) for tensor in tensors)
    for tensor in tensors:
        _restorage(tensor, torch.zeros(1, dtype=tensor.dtype, device=tensor.device))
    return freed


def allocate_again(memo: MutableMapping[str, Any]) -> None:
    """Gives what was freed and is still there zeros of its shape."""
    for tensor in alive(memo.get("freed", ())):
        _restorage(tensor, torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device))


def alive(tensors: Iterable[weakref.ref[Tensor]]) -> Iterator[Tensor]:
    """Those of some tensors that the base model still holds."""
    return (tensor for tensor in (known() for known in tensors) if tensor is not None)


def version(tensor: Tensor) -> int | None:
    """Counts in-place edits; inference tensors do not count, so theirs must be read."""
    return None if tensor.is_inference() else tensor._version


def version_of(tensor: Tensor) -> TensorVersion:
    """How a tensor is now."""
    return weakref.ref(tensor), version(tensor)


def untouched(counter: Counter, seen: TensorVersion | int) -> bool:
    """Whether a counter is as it was last seen; of inference tensors that is not known."""
    if not isinstance(counter, Tensor) or not isinstance(seen, tuple):
        return isinstance(counter, int) and counter == seen
    known, edits = seen
    return known() is counter and edits is not None and version(counter) == edits


def entry(cache: Any, name: str) -> Any:
    """What a base model's cache, a dict or an object, holds by this name."""
    return cache[name] if isinstance(cache, Mapping) else getattr(cache, name)


def write_count(cache: Any, name: str, value: int) -> TensorVersion | int:
    """Sets a counter of a cache; returns how it is then.

    Raises:
        StreamShapeError: it is neither a tensor nor a number.
    """
    counter = entry(cache, name)
    if isinstance(counter, Tensor):
        counter.fill_(value)
        return version_of(counter)
    if not isinstance(counter, int):
        raise StreamShapeError(
            f"{name} of the cache is {counter!r:.60}: expected a tensor of one element, or a whole number"
        )
    (cache.__setitem__ if isinstance(cache, MutableMapping) else cache.__setattr__)(name, value)
    return value


def _restorage(tensor: Tensor, source: Tensor) -> None:
    """Gives `tensor`, the object the base model holds, the memory of `source`, keeping its shape."""
    stride = source.stride() if source.shape == tensor.shape else (0,) * tensor.dim()
    with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
        tensor.set_(source.untyped_storage(), 0, tensor.shape, stride)


def _exclusive_bytes(tensor: Tensor) -> int:
    """Bytes that are free when the tensor gives up its memory; a slice of a larger allocation frees none."""
    size: int = tensor.untyped_storage().nbytes()
    return size if size == tensor.numel() * tensor.element_size() else 0
