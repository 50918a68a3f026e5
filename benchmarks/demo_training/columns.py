"""Columns of the view that come back."""

from __future__ import annotations

import torch
from torch import Tensor

from headforcing.demo.world.camera import CHUNK, VIEW, CameraSchedule


def returning_columns(camera: CameraSchedule, num_chunks: int, away: int) -> Tensor:
    """The columns of the view that were shown before, but not in the `away` frames before their chunk.

    They are not in a cache of the last `away` frames.

    Returns:
        `[B, T, 24]` bool.
    """
    frames = torch.arange(num_chunks * CHUNK, device=camera.pose.device)
    offset = camera.offset(frames)
    columns = offset[..., None] + torch.arange(VIEW, device=offset.device)  # [B, T, 24]
    shown = torch.zeros(*offset.shape, int(columns.max()) + 1, dtype=torch.bool, device=offset.device)
    shown.scatter_(2, columns, True)  # [B, T, strip]
    ever = torch.zeros_like(columns, dtype=torch.bool)
    lately = torch.zeros_like(ever)
    for start in range(0, num_chunks * CHUNK, CHUNK):
        own = slice(start, start + CHUNK)
        for seen, since in ((ever, 0), (lately, max(0, start - away))):
            strip = shown[:, since:start].any(1)[:, None].expand(-1, CHUNK, -1)
            seen[:, own] = strip.gather(2, columns[:, own])
    return ever & ~lately
