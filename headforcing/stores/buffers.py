"""Rooms for the frames of several roles, one behind the other in one piece of memory.

A room lies head by head: the keys of one head of one sample are neighbouring rows of `D` numbers. As all
rooms of a layer are parts of one allocation, a kernel that is told where rows begin and end reaches every
head of the layer without a copy. In front of its first slot, a room may have place for tokens that belong to
no frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Size(NamedTuple):
    """What a room has place for: frames, heads, and tokens in front of the first frame."""

    slots: int
    heads: int
    front: int = 0


def cut(sizes: Sequence[Size], frame: tuple[int, int, int], like: Tensor) -> list[Tensor]:
    """Rooms cut out of one new allocation, the longest one first; nothing is written to them.

    Args:
        sizes: of every room.
        frame: batch, tokens per frame and head dim, `(B, P, D)`.
        like: tells dtype and device.

    Returns:
        `[B, slots, P, Hr, D]` each, in the order of `sizes`; in memory `[B, Hr, slots, P, D]`.
    """
    batch, tokens, dim = frame
    shapes = [(batch, size.heads, size.front + size.slots * tokens, dim) for size in sizes]
    longest_first = sorted(range(len(sizes)), key=lambda index: -shapes[index][2])
    rooms, first = [like] * len(sizes), 0
    with torch.inference_mode(False):  # also written to outside of it, later
        flat = torch.empty(sum(map(math.prod, shapes)), dtype=like.dtype, device=like.device)
        for index in longest_first:
            last, size = first + math.prod(shapes[index]), sizes[index]
            whole = flat[first:last].view(shapes[index])
            frames = whole[:, :, size.front :].unflatten(2, (size.slots, tokens))
            rooms[index] = frames.permute(0, 2, 3, 1, 4)
            first = last
    return rooms


def front(room: Tensor, count: int) -> Tensor:
    """The last `count` tokens in front of a room that was cut with at least so many, `[B, count, Hr, D]`."""
    batch, _, _, heads, dim = room.shape
    strides = (room.stride(0), dim, room.stride(3), 1)
    return room.as_strided((batch, count, heads, dim), strides, room.storage_offset() - count * dim)


def joined(first: Tensor, rest: Tensor) -> Tensor:
    """Tokens `[B, M, Hr, D]` one behind the other: as they lie where they do so, else copied head by head."""
    if _adjoin(first, rest):
        batch, count, heads, dim = first.shape
        return first.as_strided((batch, count + rest.shape[1], heads, dim), first.stride())
    return torch.cat([first.transpose(1, 2), rest.transpose(1, 2)], 2).transpose(1, 2)


def _adjoin(first: Tensor, rest: Tensor) -> bool:
    """Whether the rest begins in memory where tokens end, as one tensor would."""
    if first.untyped_storage() != rest.untyped_storage() or first.dtype != rest.dtype:
        return False
    if first.shape[:1] + first.shape[2:] != rest.shape[:1] + rest.shape[2:]:
        return False
    count, step = first.shape[1], first.stride(1)
    if rest.storage_offset() != first.storage_offset() + count * step:
        return False
    strides = zip(rest.shape, first.stride(), rest.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in strides)
