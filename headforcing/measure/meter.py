"""Observes every pass of a model while it generates, and records the metrics."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headforcing.attention.observation import Observation
from headforcing.errors import ProfileError
from headforcing.measure.metrics import Look, Metric
from headforcing.measure.profile import HeadProfile, ProfileFacts

Progress = Callable[[int, int | None, str], None]
"""Called with the amount done, the total (`None`: unknown), and what is counted."""


@dataclass(eq=False)
class _Pass:
    """One pass of the model over one chunk of a batch of videos.

    Attributes:
        branch: number of the timeline.
        videos: numbers of the videos of the batch.
        prompt: number of their prompt; `None`: every video has its own.
        found: metrics per layer.
    """

    branch: int
    videos: range
    prompt: int | None
    start: int
    step: int
    clean: bool
    rows: Tensor | None
    found: list[dict[str, Tensor]] = field(default_factory=list)


class Meter:
    """An observer that records the metrics of every pass.

    Args:
        layers: attention layers of the model.
        metrics: what to measure.
        starts: first frames of the chunks to measure; `None`: all.
        queries: queries to measure per frame; `None`: all.
        seed: of their random choice.
        window: frames the model was trained on.
        progress: called when a chunk begins.
    """

    def __init__(
        self,
        layers: int,
        metrics: Sequence[Metric],
        *,
        starts: Collection[int] | None,
        queries: int | None,
        seed: int,
        window: int,
        progress: Progress | None,
    ) -> None:
        self.layers, self.metrics, self.window = layers, metrics, window
        self.starts, self.queries, self.progress = starts, queries, progress
        self.generator = torch.Generator().manual_seed(seed)
        self.done: list[_Pass] = []
        self.met: set[int] = set()  # first frames of all chunks with a history
        self._here = threading.local()  # the current pass of this thread
        self._last: MutableMapping[object, _Pass] = weakref.WeakKeyDictionary()  # by timeline
        self._branches = itertools.count()
        self._videos = range(0)
        self._prompt: int | None = None
        self._moved = True  # whether one of these videos went past its first chunk

    def begin_run(self, prompt: int | None) -> None:
        """Later passes belong to another prompt; `None`: to unknown prompts."""
        self._last.clear()
        self._here.now, self._prompt, self._moved = None, prompt, True

    def __call__(self, seen: Observation) -> None:
        """Records one attention call; a pass begins with a call of layer 0."""
        if seen.layer == 0:
            self._here.now = self._last[seen.timeline] = self._begin(seen)
        for metric in self.metrics:
            metric.watch(seen)
        now: _Pass | None = getattr(self._here, "now", None)
        if now is None or now.start != seen.call.start or len(now.found) != seen.layer:
            return  # a layer that is called alone does not belong to a pass of the model
        if not self._wanted(seen):
            return
        look, found = Look(seen, self.window, now.rows), {}
        for metric in self.metrics:
            for name, value in _checked(metric, look).items():
                found[f"{metric.name}.{name}"] = value
        self._check_alike(found, seen.layer)
        now.found.append(found)
        if len(now.found) == self.layers:
            self.done.append(now)

    def profile(self, facts: ProfileFacts, *, calls: int, bypassed: int) -> HeadProfile:
        """All records, as a table.

        Args:
            facts: what was measured, and how.
            calls: number of attention calls that were served.
            bypassed: number of attention calls that ran the original forward.

        Raises:
            ProfileError: nothing was recorded.
        """
        done = self.done
        if not done:
            raise ProfileError(self._why_nothing(calls, bypassed))
        final = {(made.branch, made.videos, made.start): made for made in done}  # the last one stays
        clean = [made.clean or final[made.branch, made.videos, made.start] is made for made in done]
        rows = [
            (video, video if made.prompt is None else made.prompt, made.start, made.step)
            for made in done
            for video in made.videos
        ]
        video, prompt, start, step = (torch.tensor(column) for column in zip(*rows, strict=True))
        counts = torch.tensor([len(made.videos) for made in done])
        values = {
            name: torch.cat([torch.stack([layer[name] for layer in made.found], 1) for made in done])
            for name in done[0].found[0]
        }
        return HeadProfile(
            facts,
            video=video,
            prompt=prompt,
            start=start,
            step=step,
            clean=torch.tensor(clean).repeat_interleave(counts),
            values={name: value.to("cpu", torch.float32) for name, value in values.items()},
        )

    def _begin(self, seen: Observation) -> _Pass:
        """A new pass: over the same chunk, over the next one, or over the first one of another video."""
        start, before = seen.call.start, self._last.get(seen.timeline)
        again = before is not None and before.start == start
        if start == 0 and not again and self._moved:
            self._videos = range(self._videos.stop, self._videos.stop + seen.q.shape[0])
            self._moved = False
        self._moved = self._moved or start > 0
        if self.progress and not again:
            self.progress(start + seen.call.grid[0], None, "frames")
        return _Pass(
            next(self._branches) if before is None else before.branch,
            self._videos if before is None or (start == 0 and not again) else before.videos,
            self._prompt,
            start,
            before.step + 1 if before is not None and again else 0,
            seen.call.phase == "clean",
            self._rows(seen),
        )

    def _wanted(self, seen: Observation) -> bool:
        if len(seen.frames[0]) == seen.call.grid[0]:
            return False
        self.met.add(seen.call.start)
        return self.starts is None or seen.call.start in self.starts

    def _rows(self, seen: Observation) -> Tensor | None:
        """A sample of queries of every frame, the same for all layers and metrics."""
        tokens = seen.q.shape[2]
        if self.queries is None or self.queries >= tokens:
            return None
        drawn = [
            frame * tokens + torch.randperm(tokens, generator=self.generator)[: self.queries].sort().values
            for frame in range(seen.call.grid[0])
        ]
        return torch.cat(drawn).to(seen.q.device)

    def _check_alike(self, found: Mapping[str, Tensor], layer: int) -> None:
        """Checks that metrics return the same names and shapes in every pass."""
        if not self.done:
            return
        first = self.done[0].found[0]
        expected = {name: list(value.shape[1:]) for name, value in first.items()}
        got = {name: list(value.shape[1:]) for name, value in found.items()}
        if got != expected:
            raise ProfileError(f"layer {layer}: metrics returned {got}, in the first pass {expected}")

    def _why_nothing(self, calls: int, bypassed: int) -> str:
        if bypassed and not calls:
            return (
                f"all {bypassed} attention calls of run() ran the original forward: call model.eval() "
                "and generate under torch.no_grad()"
            )
        if not calls:
            return "run() made no attention call with a cache: does it generate with this model?"
        if self.met and self.starts is not None:
            return (
                f"no chunk of run() starts at one of the frames {sorted(self.starts)}; those with a history "
                f"start at {sorted(self.met)}"
            )
        return (
            "run() made no pass over a chunk with a history: generate at least two chunks, with a history "
            "that stores a frame"
        )


def _checked(metric: Metric, look: Look) -> Mapping[str, Tensor]:
    """The result of a metric, checked to be one number or series for every sample and head."""
    found = metric.measure(look)
    shape = (look.seen.q.shape[0], look.seen.q.shape[3])
    fine = isinstance(found, Mapping) and all(
        isinstance(value, Tensor) and value.shape[:2] == shape for value in found.values()
    )
    if not fine or not found:
        given: object = type(found).__name__
        if isinstance(found, Mapping):
            given = {name: list(getattr(value, "shape", ())) for name, value in found.items()}
        raise ProfileError(
            f"metric {metric.name} returned {given}: expected tensors [B, H, ...] = {[*shape, '...']} by name"
        )
    return found
