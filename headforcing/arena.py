"""Rooms for the frames of several roles, one behind the other in one piece of memory.

A room lies head by head: the keys of one head of one sample are neighbouring rows of `D` numbers. As all
rooms of a layer are parts of one allocation, a kernel that is told where rows begin and end reaches every
head of the layer without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cut(sizes: Sequence[tuple[int, int]], frame: tuple[int, int, int], like: Tensor) -> list[Tensor]:
    """Rooms cut out of one new allocation, the longest one first; nothing is written to them.

    Args:
        sizes: slots and heads of every room.
        frame: batch, tokens per frame and head dim, `(B, P, D)`.
        like: tells dtype and device.

    Returns:
        `[B, slots, P, Hr, D]` each, in the order of `sizes`; in memory `[B, Hr, slots, P, D]`.
    """
    batch, tokens, dim = frame
    shapes = [(batch, heads, slots, tokens, dim) for slots, heads in sizes]
    longest_first = sorted(range(len(sizes)), key=lambda index: -sizes[index][0])
    rooms, first = [like] * len(sizes), 0
    with torch.inference_mode(False):  # also written to outside of it, later
        flat = torch.empty(sum(map(math.prod, shapes)), dtype=like.dtype, device=like.device)
        for index in longest_first:
            last = first + math.prod(shapes[index])
            rooms[index] = flat[first:last].view(shapes[index]).permute(0, 2, 3, 1, 4)
            first = last
    return rooms
