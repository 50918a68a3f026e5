"""Buffers for the frames of several roles, next to each other in one allocation.

A buffer is laid out head by head: the keys of one head of one sample are adjacent rows of `D` numbers. As
all buffers of a layer are parts of one allocation, a kernel that gets the first and last row of every head
reaches the whole layer without a copy. A buffer may have space for compressed tokens in front of its first
frame.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from headforcing.types import numbers_on

MOST_BLOCKS, MOST_BYTES = 2, 1 << 26
"""Copies that rows are slid by before they are gathered instead, and bytes that are gathered at most."""


class Size(NamedTuple):
    """How much fits into a buffer: frames, heads, and tokens in front of the first frame."""

    slots: int
    heads: int
    front: int = 0


def cut(sizes: Sequence[Size], frame: tuple[int, int, int], like: Tensor) -> list[Tensor]:
    """Buffers cut out of one new allocation, the longest one first; their contents are undefined.

    Args:
        sizes: of every buffer.
        frame: batch, tokens per frame and head dim, `(B, P, D)`.
        like: gives dtype and device.

    Returns:
        `[B, slots, P, Hr, D]` each, in the order of `sizes`; in memory `[B, Hr, slots, P, D]`.
    """
    batch, tokens, dim = frame
    shapes = [(batch, size.heads, size.front + size.slots * tokens, dim) for size in sizes]
    longest_first = sorted(range(len(sizes)), key=lambda index: -shapes[index][2])
    buffers, first = [like] * len(sizes), 0
    with torch.inference_mode(False):  # also written to outside of it, later
        flat = torch.empty(sum(map(math.prod, shapes)), dtype=like.dtype, device=like.device)
        for index in longest_first:
            last, size = first + math.prod(shapes[index]), sizes[index]
            whole = flat[first:last].view(shapes[index])
            frames = whole[:, :, size.front :].unflatten(2, (size.slots, tokens))
            buffers[index] = frames.permute(0, 2, 3, 1, 4)
            first = last
    return buffers


def front(buffer: Tensor, count: int) -> Tensor:
    """The last `count` tokens in front of the first frame of a buffer, `[B, count, Hr, D]`."""
    batch, _, _, heads, dim = buffer.shape
    strides = (buffer.stride(0), dim, buffer.stride(3), 1)
    return buffer.as_strided((batch, count, heads, dim), strides, buffer.storage_offset() - count * dim)


def joined(first: Tensor, rest: Tensor) -> Tensor:
    """Concatenates tokens `[B, M, Hr, D]`: a view where they are adjacent in memory, else a copy."""
    if _adjoin(first, rest):
        batch, count, heads, dim = first.shape
        return first.as_strided((batch, count + rest.shape[1], heads, dim), first.stride())
    return torch.cat([first.transpose(1, 2), rest.transpose(1, 2)], 2).transpose(1, 2)


def side_by_side(every: Sequence[Tensor]) -> Tensor | None:
    """Views `[1, ...]` of one memory as one `[n, ...]`; `None`: they do not lie at equal distances."""
    first, offsets = every[0], [x.storage_offset() for x in every]
    memory, shape, strides = first.untyped_storage(), first.shape, first.stride()
    step = offsets[1] - offsets[0] if len(every) > 1 else 0
    if shape[0] > 1 or step <= 0 or any(b - a != step for a, b in itertools.pairwise(offsets)):
        return None
    if any(x.untyped_storage() is not memory or x.shape != shape or x.stride() != strides for x in every):
        return None
    return first.as_strided((len(every), *shape[1:]), (step, *strides[1:]), offsets[0])


def _adjoin(first: Tensor, rest: Tensor) -> bool:
    """Whether the rest begins in memory where the first tokens end, as in one tensor."""
    if first.untyped_storage() != rest.untyped_storage() or first.dtype != rest.dtype:
        return False
    if first.shape[:1] + first.shape[2:] != rest.shape[:1] + rest.shape[2:]:
        return False
    count, step = first.shape[1], first.stride(1)
    if rest.storage_offset() != first.storage_offset() + count * step:
        return False
    strides = zip(rest.shape, first.stride(), rest.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in strides)


def gathered(buffer: Tensor, slots: Sequence[int]) -> Tensor:
    """A copy of some slots, laid out head by head, `[B, n, P, Hr, D]`."""
    by_head = buffer.permute(0, 3, 1, 2, 4)
    if slots and list(slots) == list(range(slots[0], slots[0] + len(slots))):
        some = by_head[:, :, slots[0] : slots[-1] + 1]
        return some.clone(memory_format=torch.contiguous_format).permute(0, 2, 3, 1, 4)
    return by_head.index_select(2, numbers_on(buffer.device, tuple(slots))).permute(0, 2, 3, 1, 4)


def slides(buffer: Tensor, moves: Sequence[tuple[int, int]]) -> list[Callable[[], Tensor]]:
    """Copies of rows to the same or earlier slots, `(slot, row)` ascending; none reads what it writes.

    Rows that would take many copies, whose slots are neighbours and which are not too large, are gathered
    here and put there at once.
    """
    blocks, moved = _blocks(moves), [move for move in moves if move[0] != move[1]]
    if len(blocks) > MOST_BLOCKS and moved[-1][0] - moved[0][0] == len(moved) - 1:
        rows, there = [row for _, row in moved], buffer[:, moved[0][0] : moved[-1][0] + 1]
        if there.nbytes <= MOST_BYTES:
            return [
                partial(there.copy_, gathered(buffer, rows) if buffer.dim() > 2 else of_rows(buffer, rows))
            ]
    return [
        partial(buffer[:, slot : slot + count].copy_, buffer[:, row : row + count])
        for slot, row, count in blocks
    ]


def of_rows(buffer: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of some rows, `[B, slots, ...] -> [B, rows, ...]`."""
    return buffer.index_select(1, numbers_on(buffer.device, tuple(rows)))


def picked(buffer: Tensor, rows: Tensor) -> Tensor:
    """Rows chosen per sample, `[B, slots, ...]` and `[B, m] -> [B, m, ...]`."""
    if len(rows) == 1:
        return buffer.index_select(1, rows[0])
    return torch.stack([sample.index_select(0, own) for sample, own in zip(buffer, rows, strict=True)])


def _blocks(moves: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Joins neighbours into `(slot, row, count)`, never so long that a block overlaps itself."""
    blocks: list[tuple[int, int, int]] = []
    for slot, row in moves:
        if slot == row:
            continue
        to, source, count = blocks[-1] if blocks else (0, 0, 0)
        if (slot, row) == (to + count, source + count) and 0 < count < row - slot:
            blocks[-1] = (to, source, count + 1)
        else:
            blocks.append((slot, row, 1))
    return blocks
