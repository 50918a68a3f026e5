"""Metrics: what is measured of every head in one attention call. One file each, found by listing the folder.

A metric gets a `Look`: what the heads of one layer attend to in one call, per frame. It is computed in pieces
over the keys: per frame it stores the log-sum-exp and the mean of the logits, never the attention matrix. It
is computed once for all metrics.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from headforcing.attention.observation import Observation
from headforcing.errors import named_module

MAX_LOGITS = 1 << 24
"""Largest number of logits in memory at a time."""


class Look:
    """What the heads of one layer attend to in one call. All heads have the same role while being measured.

    Args:
        seen: the call.
        window: frames the model was trained on.
        rows: the queries to measure, `[Q]` token numbers inside the chunk; `None`: all.

    Attributes:
        frames: absolute numbers of the attended frames, current chunk last; `n` of them.
        start: first frame of the current chunk.
        chunk: frames of the current chunk, `F`.
        sizes: keys of each attended frame, without keys that belong to no frame, such as padding.
        even: whether every frame has one key per patch, and there are no other keys.
    """

    def __init__(self, seen: Observation, window: int, rows: Tensor | None = None) -> None:
        self.seen, self.window, self.rows = seen, window, rows
        self.frames = tuple(-1 if frame is None else frame for frame in seen.frames[0])
        self.start, self.chunk = seen.call.start, seen.call.grid[0]
        self.tokens_per_frame = seen.call.tokens_per_frame
        alike = (self.tokens_per_frame,) * len(self.frames)
        self.sizes = alike if seen.sizes is None else seen.sizes[0]
        self.even = self.sizes == alike and seen.parts[0].k.shape[1] == sum(alike)

    @property
    def history(self) -> int:
        """Attended frames before the current chunk."""
        return len(self.frames) - self.chunk

    def pick(self, x: Tensor) -> Tensor:
        """The measured queries of `x [B, L, ...]`, `[B, Q, ...]`."""
        return x if self.rows is None else x[:, self.rows]

    @functools.cached_property
    def query_frames(self) -> Tensor:
        """Frame of the chunk, from 0, of each measured query, `[Q]`."""
        q = self.seen.parts[0].q
        rows = torch.arange(q.shape[1], device=q.device) if self.rows is None else self.rows
        return rows // (q.shape[1] // self.chunk)

    @functools.cached_property
    def share(self) -> Tensor:
        """Share of the attention on each frame, mean over the measured queries, `[B, H, n]`."""
        return self._by_frame[0].softmax(-1).mean(2)

    @property
    def logits(self) -> Tensor:
        """Logit before the softmax, mean over the tokens of each frame, `[B, H, Q, n]`."""
        return self._by_frame[1]

    def by_age(self, values: Tensor) -> Tensor:
        """`[..., n]` by attended frame -> `[..., window - 1]` by age, NaN for frames not attended to.

        The age of a frame is its distance to the start of the chunk; entry `a - 1` has age `a`.
        """
        out = values.new_full((*values.shape[:-1], self.window - 1), torch.nan)
        for column, frame in enumerate(self.frames[: self.history]):
            age = self.start - frame
            if age <= out.shape[-1] and frame >= 0:
                out[..., age - 1] = values[..., column]
        return out

    @functools.cached_property
    def _by_frame(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and mean of the logits over the tokens of each frame, `[B, H, Q, n]` each."""
        part, tokens = self.seen.parts[0], self.tokens_per_frame
        exact = torch.float64 if part.q.dtype == torch.float64 else torch.float32
        with torch.autocast(part.q.device.type, enabled=False):
            q = self.pick(part.q).transpose(1, 2).to(exact) * part.q.shape[-1] ** -0.5  # [B, H, Q, D]
            keys = part.k.transpose(1, 2)  # [B, H, n P, D]
            rows = max(1, MAX_LOGITS // (q[:, :, 0, 0].numel() * tokens))
            count = max(1, MAX_LOGITS // (q[:, :, :rows, 0].numel() * tokens))
            frames = [self.sizes[first : first + count] for first in range(0, len(self.sizes), count)]
            lengths = [*map(sum, frames), keys.shape[2] - sum(self.sizes)]
            found = []
            for queries in q.split(rows, dim=2):
                some = zip(keys.split(lengths, dim=2), frames, strict=False)
                pieces = [_summed(queries, k.to(exact), sizes) for k, sizes in some]
                found.append([torch.cat(parts, -1) for parts in zip(*pieces, strict=True)])
            sums, means = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        return sums, means


def _summed(q: Tensor, k: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and mean of the logits per frame of `k`, whose frames have `sizes` keys."""
    logits = q @ k.transpose(-1, -2)  # [B, H, Q, keys]
    mean = torch.cat([x.mean(-1) for x in _per_frame(logits, sizes)], -1)
    top = logits.amax(-1, keepdim=True)
    summed = torch.cat([x.sum(-1) for x in _per_frame(logits.sub_(top).exp_(), sizes)], -1)
    return summed.log() + top, mean


def _per_frame(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """`[..., keys]` as `[..., frames, P]`, one part per run of frames with equal sizes."""
    groups = [(size, len(list(alike))) for size, alike in itertools.groupby(sizes)]
    parts = x.split([size * count for size, count in groups], -1)
    return [part.unflatten(-1, group[::-1]) for part, group in zip(parts, groups, strict=True)]


class Metric(ABC):
    """Something to measure of every head. Use an instance for one profile only: it may have state."""

    name: ClassVar[str]

    def settings(self) -> dict[str, Any]:
        """Its parameters, as JSON, stored in the profile; called after `begin`."""
        return {}

    def begin(self, window: int, chunk: int) -> None:  # noqa: B027 - optional on purpose
        """Called once, before anything runs, with the model's window and its longest chunk, in frames."""

    def watch(self, seen: Observation) -> None:  # noqa: B027 - optional on purpose
        """Called for every attention call, measured or not, before `measure`."""

    @abstractmethod
    def measure(self, look: Look) -> Mapping[str, Tensor]:
        """The values of one call for every head: `[B, H, ...]` by name, NaN if undefined."""


def find_metric(name: str) -> Metric:
    """A new instance of the `METRIC` of the module `headforcing.measure.metrics.<name>`.

    Raises:
        OptionError: there is no such module; the message lists the folder.
    """
    return cast(type[Metric], named_module(__name__, name).METRIC)()
