"""The result of a stability check, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from headforcing.errors import ProfileError, escaped
from headforcing.roles.maps import strict_json
from headforcing.roles.maps.origin import Facts, Scalar, first_error

MAX_BYTES = 1 << 22
"""Largest report that is read; checked before parsing."""
SURE = 0.9
"""Share of resamples below which a head is on the boundary."""

Kappa = Annotated[float, Field(ge=-1, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Agreement(Facts):
    """How well pairs of maps from disjoint parts of the profile agree.

    Attributes:
        pairs: number of pairs.
        agreement: mean share of heads with the same label.
        kappa: mean of Cohen's kappa; 1 if both maps have one and the same label.
        lowest: smallest kappa of a pair.
        jaccard: mean overlap per role, over the pairs in which it occurs; `None` if it never does.
    """

    pairs: Annotated[int, Field(ge=1)]
    agreement: Share
    kappa: Kappa
    lowest: Kappa
    jaccard: Mapping[str, Share | None]


class BoundaryHead(Facts):
    """A head whose label depends on the prompts drawn.

    Attributes:
        layer: its layer.
        head: its number in the layer.
        label: its label, from all passes.
        votes: share of resamples that give it this label.
        runner_up: the label it has most often otherwise.
    """

    layer: int
    head: int
    label: str
    votes: Share
    runner_up: str


class Column(Facts):
    """Correlation over heads of a measured number between two halves of the prompts.

    Attributes:
        raw: of the numbers; `None` if they are constant.
        within_layer: after subtracting the median of the layer from both, which removes the effect of depth.
    """

    raw: Kappa | None
    within_layer: Kappa | None


class CurvePoint(Facts):
    """Agreement of maps from disjoint sets of `prompts` prompts: the mean kappa."""

    prompts: Annotated[int, Field(ge=1)]
    kappa: Kappa


class StabilityReport(Facts):
    """The result of a stability check.

    Attributes:
        method: the classifier.
        settings: its thresholds.
        labels: the map that is tested, from all noisy passes.
        prompts: number of prompts; splits and resamples draw prompts, not passes.
        draws: number of random splits, and of resamples.
        seed: of both.
        target: smallest kappa of a stable map.
        halves: between random halves of the prompts; with an odd number one is left out of each split.
        chunks: between chunks by first frame, every pair; between the early and the late half of the
            first frames if there are more than six. If prompts were measured at different chunks,
            this includes the difference between prompts.
        steps: between denoising steps, every pair.
        votes: per head, the share of bootstrap samples of the prompts that give its label.
        boundary: heads with less than 0.9 of the votes.
        depth: eta squared per role, the share of the variance of its indicator that the layer explains;
            `None` if all heads or none have it.
        depth_by_chance: expectation of eta squared if roles do not depend on layers.
        columns: reproducibility of the scalar columns that the classifier reads, without series.
        curve: agreement by number of prompts.
        prompts_needed: smallest number of prompts on the curve with a mean kappa of at least `target`.
        stable: whether `reasons` is empty.
        reasons: why there is no stable map.
        unjudged: what could not be tested, because it was measured too rarely.
    """

    format: Literal["headforcing.stability"] = "headforcing.stability"
    version: Annotated[int, Field(ge=1, le=1)] = 1
    method: str
    settings: Mapping[str, Scalar]
    labels: tuple[tuple[str, ...], ...]
    prompts: Annotated[int, Field(ge=1)]
    draws: Annotated[int, Field(ge=1)]
    seed: int
    target: Share
    halves: Agreement | None
    chunks: Agreement | None
    steps: Agreement | None
    votes: tuple[tuple[Share, ...], ...] | None
    boundary: tuple[BoundaryHead, ...]
    depth: Mapping[str, Share | None]
    depth_by_chance: Share | None
    columns: Mapping[str, Column]
    curve: tuple[CurvePoint, ...]
    prompts_needed: int | None
    stable: bool
    reasons: tuple[str, ...]
    unjudged: tuple[str, ...]

    def summary(self) -> dict[str, Scalar]:
        """The key numbers, flat, for `Origin.stability`."""
        lines = {"halves": self.halves, "chunks": self.chunks, "steps": self.steps}
        return {
            "stable": self.stable,
            "target": self.target,
            "prompts": self.prompts,
            "prompts_needed": self.prompts_needed,
            **{f"{name}_kappa": None if line is None else line.kappa for name, line in lines.items()},
            "boundary_heads": None if self.votes is None else len(self.boundary),
            **{f"depth_{role}": value for role, value in self.depth.items()},
            "depth_by_chance": self.depth_by_chance,
            **({"unjudged": "; ".join(self.unjudged)} if self.unjudged else {}),
        }

    def __str__(self) -> str:
        heads = sum(map(len, self.labels))
        verdict = "stable map" if self.stable else "no stable map"
        text = [
            f"{verdict}: {self.method}, {heads} heads, {self.prompts} prompts, target kappa {self.target:g}"
        ]
        for name in ("halves", "chunks", "steps"):
            line: Agreement | None = getattr(self, name)
            if line is not None:
                overlap = ", ".join(f"{k} {v:.2f}" for k, v in line.jaccard.items() if v is not None)
                text.append(
                    f"  {name}: kappa {line.kappa:.2f}, agreement {line.agreement:.0%}; Jaccard {overlap}"
                )
        if self.votes is not None:
            text.append(f"  boundary: {len(self.boundary)} heads with less than {SURE:.0%} of the votes")
        depth = ", ".join(f"{role} {value:.2f}" for role, value in self.depth.items() if value is not None)
        if depth and self.depth_by_chance is not None:
            text.append(f"  depth: eta squared {depth} (by chance {self.depth_by_chance:.2f})")
        for name, column in self.columns.items():
            raw, within = ("?" if v is None else f"{v:.2f}" for v in (column.raw, column.within_layer))
            text.append(f"  {name}: split-half r {raw}, within layers {within}")
        needed = "not reached" if self.prompts_needed is None else f"at least {self.prompts_needed}"
        text.append(f"  prompts needed: {needed}")
        return "\n".join(map(escaped, [*text, *(f"  {said}" for said in (*self.reasons, *self.unjudged))]))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """The report as JSON text."""
        return strict_json.pretty(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "stability report") -> StabilityReport:
        """The report that `to_json` wrote.

        Raises:
            ProfileError: the document is invalid.
        """
        try:
            strict_json.parse(text, MAX_BYTES)  # refuses what pydantic accepts, such as duplicate keys
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ProfileError(f"{source}: {first_error(error)}") from None  # which shows the file as it is
        except ValueError as error:
            raise ProfileError(f"{source}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the report to a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> StabilityReport:
        """Reads a report from a JSON file.

        Raises:
            ProfileError: the file is missing, too large, or not a report.
        """
        try:
            with Path(path).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ProfileError(f"{path}: cannot be read ({error.strerror})") from error
        return cls.from_json(content, str(path))
