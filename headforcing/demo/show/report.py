"""The numbers of the demo, from one video per policy: as a table, as JSON and in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from headforcing.demo.contest.compare import Rollout, summarise
from headforcing.demo.model.model import DemoModel
from headforcing.roles import HeadRole
from headforcing.roles.maps.role_map import RoleMap

LATE_FRAMES = 30


@dataclass(frozen=True)
class RoleRow:
    """The stored frames of one role.

    Attributes:
        role: its type in small letters.
        heads: number of heads over all layers.
        frames: largest number of stored frames, current chunk excluded; `None` is unbounded.
    """

    role: str
    heads: int
    frames: int | None

    def __str__(self) -> str:
        kept = "all" if self.frames is None else self.frames
        return f"{self.role} {kept} ({self.heads} heads)"


@dataclass(frozen=True)
class PolicyRow:
    """One policy on one video. Early and late are means over `Report.early` and `Report.late`.

    Attributes:
        name: of the policy.
        roles: stored frames, by role.
        stored_bytes: keys and values stored at the end.
        attended_frames: mean over the heads at the end, current chunk included.
        fps: frames generated per second.
        psnr_early, psnr_late: of the background, in dB; `None` if nothing could be measured.
        landmarks_early, landmarks_late: share of the landmarks recognised, of those that are back.
        actors_early, actors_late: share of what flies and drives recognised.
    """

    name: str
    roles: tuple[RoleRow, ...]
    stored_bytes: int
    attended_frames: float
    fps: float
    psnr_early: float | None
    psnr_late: float | None
    landmarks_early: float | None
    landmarks_late: float | None
    actors_early: float | None
    actors_late: float | None


@dataclass(frozen=True)
class Report:
    """The result of the demo.

    Attributes:
        prompt: words of the first chunk.
        camera: `still` or `pan`.
        seed: of scene and noise.
        frames: of each video.
        trained: frames of the training videos.
        given: rendered frames that every policy starts from.
        early, late: first and last frame of the two spans that are averaged.
        policies: one row per policy.
        files: absolute paths of what was written.
    """

    prompt: str
    camera: str
    seed: int
    frames: int
    trained: int
    given: int
    early: tuple[int, int]
    late: tuple[int, int]
    policies: tuple[PolicyRow, ...]
    files: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return asdict(self)

    def reading(self) -> str:
        """The late numbers of the last policy and the first one, in one sentence."""
        base, ours = self.policies[0], self.policies[-1]
        parts = []
        for what, a, b, form in (
            ("background PSNR", ours.psnr_late, base.psnr_late, "{:.1f} dB"),
            ("landmarks recognised", ours.landmarks_late, base.landmarks_late, "{:.0%}"),
        ):
            if a is not None and b is not None:
                pair = f"{ours.name} {form.format(a)}, {base.name} {form.format(b)}"
                parts.append(f"{what} {pair}")
        found = "; ".join(parts) or "nothing could be measured"
        first, last = self.late
        return f"Frames {first}-{last}: {found}. This is one video; see docs/demo-results.md for 16 seeds."

    def table(self) -> Any:
        """The rows as a rich table."""
        from rich.table import Table

        title = f"“{self.prompt}”, camera {self.camera}, seed {self.seed}"
        table = Table(title=title, title_style="bold")
        table.add_column("")
        for row in self.policies:
            table.add_column(row.name, justify="right")
        early, late = ("frames {}-{}".format(*span) for span in (self.early, self.late))
        lines: dict[str, Callable[[PolicyRow], str]] = {
            "stored frames, by role": lambda row: "\n".join(map(str, row.roles)),
            "attended frames, mean": lambda row: f"{row.attended_frames:.1f}",
            "stored": lambda row: f"{row.stored_bytes / 1e6:.2f} MB",
            "speed": lambda row: f"{row.fps:.0f} FPS",
            f"background PSNR, {early}": lambda row: _number(row.psnr_early, 1, " dB"),
            f"background PSNR, {late}": lambda row: _number(row.psnr_late, 1, " dB"),
            f"landmarks recognised, {late}": lambda row: _share(row.landmarks_late),
            f"actors recognised, {late}": lambda row: _share(row.actors_late),
        }
        for name, tell in lines.items():
            table.add_row(name, *map(tell, self.policies))
        return table


def spans(frames: int, given: int, trained: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last frame of the early and the late span of a video.

    Early are the frames generated inside the trained length; late are the last 30, fewer in a short video.
    """
    made = frames - given
    early = (given, min(max(trained, given + 3), frames) - 1)
    return early, (frames - max(min(LATE_FRAMES, made // 3), 1), frames - 1)


def policy_row(
    rollout: Rollout, model: DemoModel, made: int, early: tuple[int, int], late: tuple[int, int]
) -> PolicyRow:
    """The row of a rollout of one video, of which `made` frames were generated."""
    return PolicyRow(
        name=rollout.policy.name,
        roles=_roles(rollout, model),
        stored_bytes=rollout.stored_bytes,
        attended_frames=rollout.attended_frames,
        fps=made / rollout.seconds,
        psnr_early=_mean(rollout.psnr, early),
        psnr_late=_mean(rollout.psnr, late),
        landmarks_early=_mean(rollout.landmarks, early),
        landmarks_late=_mean(rollout.landmarks, late),
        actors_early=_mean(rollout.actors, early),
        actors_late=_mean(rollout.actors, late),
    )


def describe(roles: RoleMap, chunk: int) -> tuple[RoleRow, ...]:
    """One row per role of a map, most heads first."""
    rows = [_row(role, heads, chunk) for role, heads in roles.counts().items()]
    return tuple(sorted(rows, key=lambda row: -row.heads))


def _roles(rollout: Rollout, model: DemoModel) -> tuple[RoleRow, ...]:
    config, policy = model.config, rollout.policy
    size = (config.layers, config.heads)
    if policy.roles is None:
        window = config.window if policy.window is None else policy.window
        kept = None if window == -1 else window - config.chunk
        return (RoleRow("all", config.layers * config.heads, kept),)
    roles = policy.roles if isinstance(policy.roles, RoleMap) else RoleMap.uniform(policy.roles, *size)
    return describe(roles.fit(*size, config.window, config.chunk), config.chunk)


def _row(role: HeadRole, heads: int, chunk: int) -> RoleRow:
    return RoleRow(type(role).__name__.lower(), heads, role.capacity(chunk))


def _mean(values: torch.Tensor, span: Sequence[int]) -> float | None:
    mean = float(summarise(values, span[0], span[1] + 1)[0])
    return None if math.isnan(mean) else mean


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
