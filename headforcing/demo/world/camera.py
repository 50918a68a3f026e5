"""The camera of the demo world, and the random draws for scenes.

The texture is a strip twice as wide as the view. The camera moves a whole patch per chunk (two pixels per
frame), so returning content is at the same phase of the patch grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

VIEW = 24
STRIP = 48
PATCH = 6
CHUNK = 3
PAN = PATCH // CHUNK
MAX_POSE = (STRIP - VIEW) // PATCH


@dataclass(frozen=True)
class CameraSchedule:
    """The path of the camera: one pose and one motion per chunk; it stands still after the last.

    Attributes:
        pose: `[B, N]` long, patches from the left end of the strip at the start of each chunk.
        motion: `[B, N]` long, -1 left, 0 still, +1 right: patches moved during the chunk.
    """

    pose: Tensor
    motion: Tensor

    @classmethod
    def of(cls, start: Tensor, motion: Tensor) -> CameraSchedule:
        """Schedule from start poses `[B]` and motions `[B, N]` that stay on the strip."""
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
        dwell_high: int = 14,
    ) -> CameraSchedule:
        """Wait at `low`, pan to `high`, wait there, pan back, and so on; dwells are in chunks.

        With `dwell_high=14` the content at `low` is out of view for at least 42 frames, twice the trained
        range, and then returns.
        """
        way = high - low
        period = [0] * dwell_low + [1] * way + [0] * dwell_high + [-1] * way
        motion = torch.tensor(period).repeat(math.ceil(num_chunks / len(period)))[:num_chunks]
        return cls.of(torch.full((batch,), low), motion.expand(batch, -1))

    @classmethod
    def sample(
        cls, batch: int, num_chunks: int, generator: torch.Generator, *, pan_share: float = 0.6
    ) -> CameraSchedule:
        """Training cameras: a share of them pans back and forth with random range, offset and dwells."""
        draw = Draw(batch, generator)
        span = draw.choice((0.4, 0.35, 0.17, 0.08)) + 1
        span = span * (draw.uniform() < pan_share)
        low = (draw.uniform() * (MAX_POSE - span + 1)).long()
        inside = (draw.uniform() * (span + 1)).long()
        place = torch.where(draw.uniform() < 0.3, inside, draw.integer(2) * span)
        heading = torch.where(place == 0, 1, torch.where(place == span, -1, draw.sign()))
        dwell, start, motions = draw.choice((0.6, 0.3, 0.1)), low + place, []
        for _ in range(num_chunks):
            step = torch.where((dwell == 0) & (span > 0), heading, 0)
            place = place + step
            arrived = (step != 0) & ((place == 0) | (place == span))
            heading = torch.where(arrived, -heading, heading)
            again = draw.choice((0.55, 0.3, 0.15))
            dwell = torch.where(arrived, again, (dwell - 1).clamp(min=0))
            motions.append(step)
        return cls.of(start, torch.stack(motions, 1))

    def at(self, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """Pose and motion, each `[B, T]`, of the chunks `[T]`."""
        known = chunks.clamp(max=self.pose.shape[1] - 1)
        pose, motion = self.pose[:, known], self.motion[:, known]
        past = chunks >= self.pose.shape[1]
        return pose + torch.where(past, motion, 0), torch.where(past, 0, motion)

    def offset(self, frames: Tensor) -> Tensor:
        """Left edge of the view on the strip in pixels, `[B, T]` long, at the frames `[T]`."""
        pose, motion = self.at(frames // CHUNK)
        return PATCH * pose + PAN * motion * (frames % CHUNK)

    def seen(self, num_chunks: int) -> Tensor:
        """Which columns of the view an earlier chunk showed, `[B, num_chunks · CHUNK, VIEW]` bool.

        Only these columns can be evaluated: for new columns there is no ground truth.
        """
        frames = torch.arange(num_chunks * CHUNK, device=self.pose.device)
        offset = self.offset(frames)
        by_chunk = offset.view(-1, num_chunks, CHUNK)
        left = by_chunk.amin(2).cummin(1).values[:, :-1].repeat_interleave(CHUNK, 1)
        right = by_chunk.amax(2).cummax(1).values[:, :-1].repeat_interleave(CHUNK, 1) + VIEW
        columns = offset[..., None] + torch.arange(VIEW, device=frames.device)
        later = columns[:, CHUNK:]
        known = (later >= left[..., None]) & (later < right[..., None])
        return torch.cat([torch.zeros_like(columns[:, :CHUNK], dtype=torch.bool), known], 1)

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

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(self.batch, *shape, generator=self.generator)

    def integer(self, high: int, *shape: int) -> Tensor:
        """Long, 0 to `high - 1`."""
        return torch.randint(high, (self.batch, *shape), generator=self.generator)

    def sign(self) -> Tensor:
        """Long, -1 or 1."""
        return self.integer(2) * 2 - 1

    def choice(self, shares: tuple[float, ...]) -> Tensor:
        """Long, an index into `shares`, which add up to one."""
        edges = torch.tensor(shares).cumsum(0)[:-1]
        return torch.bucketize(self.uniform(), edges, right=True)
