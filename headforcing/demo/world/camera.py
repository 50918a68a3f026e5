"""The camera of the demo world: how large things are, and where it looks.

The town is a panorama of slots, three times as wide as the view. The camera moves a whole slot per chunk, so
what returns is at the same phase of the latent grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HEIGHT, WIDTH = 48, 72
"""Pixels of the view."""
CELL = 12
"""Pixels of a slot, and along one side of a latent."""
SLOTS = 18
CHUNK = 3
PAN = CELL // CHUNK
GRID = (HEIGHT // CELL, WIDTH // CELL)
TOWN = SLOTS * CELL
"""Width of the panorama in pixels."""
MAX_POSE = SLOTS - GRID[1]
GROUND, KERB = 38, 41
"""Rows below the landmarks, and below the verge."""


@dataclass(frozen=True)
class CameraSchedule:
    """The path of the camera: one pose and one motion per chunk; it stands still after the last.

    Attributes:
        pose: `[B, N]` long, slots from the left end of the town at the start of each chunk.
        motion: `[B, N]` long, -1 left, 0 still, +1 right: slots moved during the chunk.
    """

    pose: Tensor
    motion: Tensor

    @classmethod
    def of(cls, start: Tensor, motion: Tensor) -> CameraSchedule:
        """Schedule from start poses `[B]` and motions `[B, N]` that stay in the town."""
        ends = start[:, None] + motion.cumsum(1)
        pose = torch.cat([start[:, None], ends[:, :-1]], 1)
        if motion.abs().max() > 1 or min(pose.min(), ends.min()) < 0 or ends.max() > MAX_POSE:
            raise ValueError(
                f"camera motions must be -1, 0 or 1 and poses 0..{MAX_POSE}, "
                f"got poses {int(ends.min())}..{int(ends.max())}"
            )
        return cls(pose, motion)

    @classmethod
    def still(cls, batch: int, pose: int = MAX_POSE // 2) -> CameraSchedule:
        """A camera that never moves."""
        return cls.of(torch.full((batch,), pose), torch.zeros(batch, 1, dtype=torch.long))

    @classmethod
    def periodic(
        cls,
        batch: int,
        num_chunks: int,
        *,
        low: int = 0,
        high: int = MAX_POSE,
        dwell_low: int = 2,
        dwell_high: int = 2,
    ) -> CameraSchedule:
        """Pan from `low` to `high`, stop there, pan back, stop, and so on; stops are in chunks.

        With the defaults the ends of the town are out of view for some 70 frames, more than three times the
        trained range, and then return.
        """
        way = high - low
        period = [1] * way + [0] * dwell_high + [-1] * way + [0] * dwell_low
        motion = torch.tensor(period).repeat(math.ceil(num_chunks / len(period)))[:num_chunks]
        return cls.of(torch.full((batch,), low), motion.expand(batch, -1))

    @classmethod
    def sample(
        cls, batch: int, num_chunks: int, generator: torch.Generator, *, pan_share: float = 0.9
    ) -> CameraSchedule:
        """Training cameras: runs of one to four slots with short stops; most runs turn back.

        A share of the cameras moves, the others stand still.
        """
        draw = Draw(batch, generator)
        moves = draw.uniform() < pan_share
        place = start = draw.integer(MAX_POSE + 1)
        heading, run, stop, motions = draw.sign(), 1 + draw.integer(4), draw.integer(2), []
        for _ in range(num_chunks):
            blocked = (place + heading < 0) | (place + heading > MAX_POSE)
            heading = torch.where(blocked, -heading, heading)
            run = torch.where(blocked, run.clamp(min=2), run)
            step = torch.where(moves & (stop == 0), heading, 0)
            place, run, stop = place + step, run - step.abs(), (stop - 1).clamp(min=0)
            over = run == 0
            heading = torch.where(over & (draw.uniform() < 0.75), -heading, heading)
            run = torch.where(over, 1 + draw.integer(4), run)
            stop = torch.where(over, draw.choice((0.6, 0.4)), stop)
            motions.append(step)
        return cls.of(start, torch.stack(motions, 1))

    def at(self, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """Pose and motion, each `[B, T]`, of the chunks `[T]`."""
        known = chunks.clamp(max=self.pose.shape[1] - 1)
        pose, motion = self.pose[:, known], self.motion[:, known]
        past = chunks >= self.pose.shape[1]
        return pose + torch.where(past, motion, 0), torch.where(past, 0, motion)

    def offset(self, frames: Tensor) -> Tensor:
        """Left edge of the view in the town in pixels, `[B, T]` long, at the frames `[T]`."""
        pose, motion = self.at(frames // CHUNK)
        return CELL * pose + PAN * motion * (frames % CHUNK)

    def columns(self, num_chunks: int) -> Tensor:
        """The column of the town that every column of the view shows, `[B, T, WIDTH]` long."""
        frames = torch.arange(num_chunks * CHUNK, device=self.pose.device)
        return self.offset(frames)[..., None] + torch.arange(WIDTH, device=frames.device)

    def returning(self, num_chunks: int, away: int = 0) -> Tensor:
        """Which columns of the view were shown before, but not in the `away` frames before their chunk.

        With 0: which an earlier chunk showed. Only these can be evaluated: for new columns there is no ground
        truth. With more: those that are not in a cache of the last `away` frames.

        Returns:
            `[B, T, WIDTH]` bool.
        """
        columns = self.columns(num_chunks)
        shown = torch.zeros(*columns.shape[:2], TOWN, dtype=torch.bool, device=columns.device)
        shown.scatter_(2, columns, True)
        ever = torch.zeros_like(columns, dtype=torch.bool)
        lately = torch.zeros_like(ever)
        for start in range(0, num_chunks * CHUNK, CHUNK):
            own = slice(start, start + CHUNK)
            for seen, since in ((ever, 0), (lately, max(0, start - away))):
                town = shown[:, since:start].any(1)[:, None].expand(-1, CHUNK, -1)
                seen[:, own] = town.gather(2, columns[:, own])
        return ever & ~lately

    def absence(self, num_chunks: int) -> Tensor:
        """For how many frames each column of the view had been out of view before it came back.

        It keeps this number until it leaves again.

        Returns:
            `[B, T, WIDTH]` long; 0 in its first visit.
        """
        columns = self.columns(num_chunks)
        last = columns.new_full((len(columns), TOWN), -1)
        gone, found = torch.zeros_like(last), []
        for frame in range(columns.shape[1]):
            shown = torch.zeros_like(last, dtype=torch.bool).scatter(1, columns[:, frame], True)
            back = shown & (last >= 0) & (last < frame - 1)
            gone = torch.where(back, frame - 1 - last, gone)
            last = torch.where(shown, frame, last)
            found.append(gone.gather(1, columns[:, frame]))
        return torch.stack(found, 1)

    def to(self, device: torch.device | str) -> CameraSchedule:
        """The same schedule on another device."""
        return CameraSchedule(self.pose.to(device), self.motion.to(device))


class Draw:
    """Random numbers `[batch, *shape]` from one explicit generator."""

    def __init__(self, batch: int, generator: torch.Generator) -> None:
        self.batch, self.generator = batch, generator

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(self.batch, *shape, generator=self.generator)

    def integer(self, high: int, *shape: int) -> Tensor:
        """Long, 0 to `high - 1`."""
        return torch.randint(high, (self.batch, *shape), generator=self.generator)

    def sign(self) -> Tensor:
        """Long, -1 or 1."""
        return self.integer(2) * 2 - 1

    def choice(self, shares: tuple[float, ...], *shape: int) -> Tensor:
        """Long, an index into `shares`, which add up to one."""
        edges = torch.tensor(shares).cumsum(0)[:-1]
        return torch.bucketize(self.uniform(*shape), edges, right=True)
