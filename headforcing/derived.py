"""What is made of a host's RoPE table, made once: it is the same in every layer, every pass and every chunk.

It is kept as long as the table, beside which it is little, and made anew when the table was written to,
moved or given other memory. In inference mode PyTorch does not count what is written, so there a table must
be left as it is, as upstream leaves it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

KEPT = 32
"""Of one table: positions of a chunk and of what moves in its first pass, per role, and patches of space."""


@dataclass
class _Shelf:
    state: tuple[Any, ...]
    made: OrderedDict[Any, Tensor] = field(default_factory=OrderedDict)


_shelves: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def derived(table: Tensor, make: Callable[..., Tensor], *asked: float) -> Tensor:
    """`make(table, *asked)`, made once; nobody may write to it.

    Not kept while a CUDA graph is captured, which would read it after it was let go; nor of a table that was
    made in inference mode.

    Args:
        table: what it is made of.
        make: a function of a module.
        asked: numbers; whole ones and others are told apart.
    """
    if table.is_inference() or (table.is_cuda and torch.cuda.is_current_stream_capturing()):
        return make(table, *asked)
    state = (table._version, table.data_ptr(), table.device, table.dtype, table.shape, table.stride())
    shelf: _Shelf | None = _shelves.get(table)
    if shelf is None or shelf.state != state:
        shelf = _shelves[table] = _Shelf(state)
    key = (make, asked, tuple(map(type, asked)))
    if key in shelf.made:
        shelf.made.move_to_end(key)
        return shelf.made[key]
    with torch.inference_mode(False), torch.no_grad():  # also used outside of it, later
        found: Tensor = make(table, *asked)
    shelf.made[key] = found
    if len(shelf.made) > KEPT:
        shelf.made.popitem(last=False)
    return found
