"""What is made of a host's RoPE table, made once: it is the same in every layer, every pass and every chunk.

It is kept as long as the table, beside which it is little, and made anew when the table was written to,
moved or given other memory. What is written through `.data` or NumPy PyTorch does not count, so nobody sees
it here: such a table must be given other memory, or be another tensor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

KEPT = 32
"""Of one table: positions of a chunk and of what moves in its first pass, per role, and patches of space."""


@dataclass
class _Shelf:
    state: tuple[Any, ...]
    made: OrderedDict[Any, Tensor] = field(default_factory=OrderedDict)


_shelves: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_threads = threading.Lock()


def derived(table: Tensor, make: Callable[..., Tensor], *asked: float) -> Tensor:
    """`make(table, *asked)`, made once; nobody may write to it.

    Not kept while a CUDA graph is captured, which would read it after it was let go; nor of a table that was
    made in inference mode, whose edits PyTorch does not count; nor where a tracer makes something else than
    a tensor of it.

    Args:
        table: what it is made of.
        make: a function of a module.
        asked: numbers; whole ones and others are told apart.
    """
    if table.is_inference() or (table.is_cuda and torch.cuda.is_current_stream_capturing()):
        return make(table, *asked)
    state = _state(table)
    queue = torch.cuda.current_stream(table.device).cuda_stream if table.is_cuda else 0
    key = (make, asked, tuple(map(type, asked)), queue)  # another queue would not wait until it is made
    with _threads:
        shelf: _Shelf | None = _shelves.get(table)
        if shelf is None or shelf.state != state:
            shelf = _shelves[table] = _Shelf(state)
        if key in shelf.made:
            shelf.made.move_to_end(key)
            return shelf.made[key]
    found = _made(table, make, asked)
    if type(found) is Tensor:
        with _threads:
            shelf.made[key] = found
            if len(shelf.made) > KEPT:
                shelf.made.popitem(last=False)
    return found


def _state(table: Tensor) -> tuple[Any, ...]:
    """What changes when a table is written to, moved or given other memory, were it at the same address."""
    memory = StorageWeakRef(table.untyped_storage())
    place = (table.storage_offset(), table.shape, table.stride())
    return (table._version, memory, table.device, table.dtype, *place)


def _made(table: Tensor, make: Callable[..., Tensor], asked: tuple[float, ...]) -> Tensor:
    """Memory of its own: a view would keep the table, and so itself, for ever."""
    with torch.inference_mode(False), torch.no_grad():  # also used outside of it, later
        found = make(table, *asked)
        shared = found.untyped_storage()._cdata == table.untyped_storage()._cdata
        return found.clone() if shared else found
