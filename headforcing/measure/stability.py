"""Whether heads get the same role when other prompts, chunks or denoising steps are measured.

Head Forcing has a supplement on stability whose content is unknown (arXiv:2605.14487); an outside audit
found head roles partly explained by depth (third party). Every statistic and threshold here is our choice.
Only the profile is read, never the model. "No stable map" is a valid result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from headforcing.errors import OptionError, ProfileError
from headforcing.measure.classifiers import Classification
from headforcing.measure.compare import agreement, cross_table, jaccard, kappa
from headforcing.measure.profile import HeadProfile
from headforcing.measure.stability_report import (
    SURE,
    Agreement,
    BoundaryHead,
    Column,
    CurvePoint,
    StabilityReport,
)

LEAST_PROMPTS = 4
"""With fewer, halves are single prompts, and nothing can be concluded about other prompts."""
MOST_STARTS = 6
"""With more first frames, chunks are compared as an early and a late half."""

Classifier = Callable[[HeadProfile], Classification]


def stability(
    profile: HeadProfile, classify: Classifier, *, draws: int = 200, seed: int = 0, target: float = 0.8
) -> StabilityReport:
    """Classifies many parts of a profile and reports whether the labels stay the same.

    There is no stable map if kappa between halves of the prompts, between chunks or between steps is below
    `target`, if a measured part cannot be classified, if all heads have the same label, or if there are fewer
    than four prompts. Only the noisy passes count. The classifier is called about `4 * draws` times, so one
    that reads series is slow: use fewer draws.

    Args:
        profile: of several prompts, chunks and steps; with only one of them, that comparison is skipped.
        classify: a classifier, with `functools.partial` to set thresholds.
        draws: number of random splits of the prompts, and of resamples; the curve uses an eighth as many
            splits per point.
        seed: of both; no other random numbers are drawn.
        target: smallest kappa of a stable map.

    Raises:
        OptionError: `draws` is below 1, `target` outside [0, 1], or `classify` returns other label names.
        ProfileError: the whole profile cannot be classified.
    """
    if type(draws) is not int or draws < 1 or not 0 <= target <= 1:
        raise OptionError(f"draws is {draws!r}, target {target!r}: expected at least 1, and one in [0, 1]")
    profile = profile.noisy  # of the whole profile: a part may have clean passes only
    found = classify(profile)
    parts = _Parts(profile, classify, found)
    generator = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(parts.prompts, generator=generator) for _ in range(draws)]
    lines = {
        "halves": parts.line("halves", parts.halves(halves, parts.prompts // 2)),
        "chunks": parts.line("chunks", parts.every_pair(_chunks(parts.profile))),
        "steps": parts.line("steps", parts.every_pair(_steps(parts.profile))),
    }
    curve = parts.curve(halves[: max(1, draws // 8)], lines["halves"])
    votes, boundary = parts.votes(draws, generator)
    reasons = [*parts.against(lines, target), *parts.failed]
    return StabilityReport(
        method=found.method,
        settings=dict(found.settings),
        labels=found.labels,
        prompts=parts.prompts,
        draws=draws,
        seed=seed,
        target=float(target),
        halves=lines["halves"],
        chunks=lines["chunks"],
        steps=lines["steps"],
        votes=votes,
        boundary=boundary,
        depth=parts.depth(),
        depth_by_chance=_by_chance(*profile.shape),
        columns=parts.columns(halves),
        curve=curve,
        prompts_needed=next((point.prompts for point in curve if point.kappa >= target), None),
        stable=not reasons,
        reasons=tuple(reasons),
        unjudged=tuple(parts.unjudged),
    )


class _Parts:
    """A profile, cut into parts that are classified separately."""

    def __init__(self, profile: HeadProfile, classify: Classifier, found: Classification) -> None:
        self.classify, self.found = classify, found
        self.profile = _only_what_is_read(profile, classify, found)
        self.rows = [(profile.prompt == prompt).nonzero()[:, 0] for prompt in profile.prompt.unique()]
        self.prompts = len(self.rows)
        self.names = list(found.roles)
        self.labels = self._codes(found)
        self.unjudged: list[str] = []
        self.failed: list[str] = []

    def _codes(self, found: Classification) -> Tensor:
        number = {name: code for code, name in enumerate(self.names)}
        if unknown := {label for row in found.labels for label in row} - set(number):
            raise OptionError(
                f"classify returned {sorted(unknown)} for a part, but {self.names} for the whole profile"
            )
        return torch.tensor([number[label] for row in found.labels for label in row])

    def of_prompts(self, prompts: Tensor) -> Tensor:
        """Label numbers from the passes of these prompts, which may repeat, `[layers * heads]`."""
        rows = torch.cat([self.rows[prompt] for prompt in prompts.tolist()])
        return self._codes(self.classify(self.profile.where(rows)))

    def halves(self, orders: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels from `size` prompts, and from `size` other prompts."""
        for order in orders if size else ():
            yield self.of_prompts(order[:size]), self.of_prompts(order[size : 2 * size])

    def every_pair(self, parts: Sequence[HeadProfile]) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels from every pair of parts."""
        if len(parts) > 1:
            yield from combinations([self._codes(self.classify(part)) for part in parts], 2)

    def line(self, name: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> Agreement | None:
        """Agreement of pairs of labels; `None` with a reason in `failed` or `unjudged`."""
        try:
            codes = [torch.stack(pair) for pair in pairs]
        except ProfileError as error:
            self.failed.append(f"{name}: a part cannot be classified: {error}")
            return None
        if not codes:
            self.unjudged.append(f"{name}: not tested, because only one was measured")
            return None
        return self.agreement(codes)

    def agreement(self, codes: Sequence[Tensor]) -> Agreement:
        """Means over pairs of labels, `[2, layers * heads]` each."""
        a, b = torch.stack(list(codes), 1)
        squares = cross_table(a, b, len(self.names))
        kappas = kappa(squares)
        overlap = jaccard(squares).nanmean(0).tolist()
        return Agreement(
            pairs=len(squares),
            agreement=float(agreement(squares).mean()),
            kappa=float(kappas.mean()),
            lowest=float(kappas.min()),
            jaccard={name: _known(value) for name, value in zip(self.names, overlap, strict=True)},
        )

    def against(self, lines: Mapping[str, Agreement | None], target: float) -> Iterator[str]:
        """The reasons against a stable map."""
        for name, line in lines.items():
            if line is not None and line.kappa < target:
                yield f"{name} disagree: kappa {line.kappa:.2f} is below {target:g}"
        if self.prompts < LEAST_PROMPTS:
            yield f"{self.prompts} prompts are too few for a verdict: measure at least {LEAST_PROMPTS}"
        if len(self.labels.unique()) == 1:
            yield "all heads have the same label: there is nothing to compare"

    def curve(self, orders: Sequence[Tensor], halves: Agreement | None) -> tuple[CurvePoint, ...]:
        """Agreement by number of prompts: 1, 2, 4, ... and half of them."""
        if halves is None:
            return ()
        points = []
        size = 1
        while size < self.prompts // 2:
            try:
                line = self.agreement([torch.stack(pair) for pair in self.halves(orders, size)])
                points.append(CurvePoint(prompts=size, kappa=line.kappa))
            except ProfileError as error:  # fewer prompts than the map has: no reason against it
                self.unjudged.append(f"{size} prompts: not tested, too few to classify: {error}")
            size *= 2
        return (*points, CurvePoint(prompts=self.prompts // 2, kappa=halves.kappa))

    def votes(
        self, draws: int, generator: torch.Generator
    ) -> tuple[tuple[tuple[float, ...], ...] | None, tuple[BoundaryHead, ...]]:
        """Share of resamples in which every head gets its label, and the heads on the boundary."""
        if self.prompts < 2:
            self.unjudged.append("votes: not tested, because only one prompt was measured")
            return None, ()
        count = torch.zeros(len(self.labels), len(self.names), dtype=torch.long)
        for _ in range(draws):
            sample = torch.randint(self.prompts, (self.prompts,), generator=generator)
            try:
                count += one_hot(self.of_prompts(sample), len(self.names))
            except ProfileError as error:
                self.failed.append(f"votes: a resample cannot be classified: {error}")
                return None, ()
        won = (count.gather(1, self.labels[:, None])[:, 0].double() / draws).tolist()
        others = count.scatter(1, self.labels[:, None], -1).argmax(1).tolist()
        heads = self.profile.shape[1]
        boundary = tuple(
            BoundaryHead(
                layer=index // heads,
                head=index % heads,
                label=self.names[int(self.labels[index])],
                votes=share,
                runner_up=self.names[others[index]],
            )
            for index, share in enumerate(won)
            if share < SURE
        )
        return tuple(tuple(won[first : first + heads]) for first in range(0, len(won), heads)), boundary

    def depth(self) -> dict[str, float | None]:
        """Share of the variance of every role's indicator that the layer explains (eta squared)."""
        is_role = one_hot(self.labels, len(self.names)).double().view(*self.profile.shape, -1)
        within = (is_role - is_role.mean(1, keepdim=True)).square().sum((0, 1))
        total = (is_role - is_role.mean((0, 1))).square().sum((0, 1))
        explained = torch.where(total > 0, 1 - within / total, torch.nan).clamp(0, 1).tolist()
        return {name: _known(value) for name, value in zip(self.names, explained, strict=True)}

    def columns(self, orders: Sequence[Tensor]) -> dict[str, Column]:
        """Correlation between halves of the prompts, for every scalar column that the classifier reads."""
        half = self.prompts // 2
        scalars = {name: value for name, value in self.profile.values.items() if value.dim() == 3}
        if not half:
            return {name: Column(raw=None, within_layer=None) for name in scalars}
        chosen = torch.stack(list(orders))
        sides = [one_hot(chosen[:, side], self.prompts).sum(1).double() for side in _sides(half)]
        prompts = self.profile.prompt.unique()[:, None]
        member = (prompts == self.profile.prompt).double()  # [prompts, S]
        found = {}
        for name, value in scalars.items():
            seen = value.isfinite().flatten(1).double()
            total = value.double().nan_to_num(0.0).flatten(1)
            a, b = ((side @ (member @ total)) / (side @ (member @ seen)) for side in sides)
            found[name] = Column(raw=_correlation(a, b), within_layer=self.within_layer(a, b))
        return found

    def within_layer(self, a: Tensor, b: Tensor) -> float | None:
        """Correlation after subtracting the median of the layer."""
        a, b = (x.view(-1, *self.profile.shape) for x in (a, b))
        return _correlation(*((x - x.median(2, keepdim=True).values).flatten(1) for x in (a, b)))


def _only_what_is_read(profile: HeadProfile, classify: Classifier, found: Classification) -> HeadProfile:
    """The profile without the columns that the classifier does not read."""
    read = {}
    for name, value in profile.values.items():
        others = {other: kept for other, kept in profile.values.items() if other != name}
        try:
            classify(dataclasses.replace(profile, values=others))
        except ProfileError:
            read[name] = value
    slim = dataclasses.replace(profile, values=read)
    try:
        return slim if classify(slim).labels == found.labels else profile
    except ProfileError:  # one of two columns is enough
        return profile


def _chunks(profile: HeadProfile) -> list[HeadProfile]:
    """The passes by first frame; in two halves if there are many."""
    starts = profile.start.unique()
    if len(starts) <= MOST_STARTS:
        return [profile.where(profile.start == start) for start in starts]
    late = profile.start >= starts[len(starts) // 2]
    return [profile.where(~late), profile.where(late)]


def _steps(profile: HeadProfile) -> list[HeadProfile]:
    """The passes by step."""
    return [profile.where(profile.step == step) for step in profile.step.unique()]


def _sides(half: int) -> tuple[slice, slice]:
    return slice(0, half), slice(half, 2 * half)


def _correlation(a: Tensor, b: Tensor) -> float | None:
    """Mean over rows of the correlation of two tables `[draws, n]`; `None` if all are constant."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    r = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    return _known(float(r.nanmean().clamp(-1, 1)))


def _by_chance(layers: int, heads: int) -> float | None:
    """Expectation of eta squared if roles do not depend on layers."""
    return (layers - 1) / (layers * heads - 1) if layers * heads > 1 else None


def _known(value: float) -> float | None:
    return None if value != value else value
