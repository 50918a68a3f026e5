"""Compares presets, role maps and their controls on the demo model, video by video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headforcing.demo.contest.compare import GIVEN_CHUNKS, Policy, Rollout, make_scene, roll
from headforcing.demo.contest.entrants import Entrant, attended_frames, controls, stored_frames
from headforcing.demo.contest.intervals import Interval, bootstrap_interval, paired_difference, summarise
from headforcing.demo.model.attention import DemoConfig
from headforcing.demo.model.model import DemoModel
from headforcing.demo.model.threads import one_thread
from headforcing.demo.show.report import spans
from headforcing.demo.world.camera import CHUNK
from headforcing.errors import OptionError
from headforcing.roles.maps.role_map import RoleMap

FPS = 16
BATCH = 8
ENOUGH = 5
"""A bootstrap over fewer videos is not significant."""


@dataclass(frozen=True)
class Setting:
    """The videos that all entrants continue.

    Attributes:
        seeds: of scene and noise, one per video.
        seconds: length of the videos, rounded to whole chunks.
        camera: `still` or `pan`.

    Raises:
        OptionError: there is no seed, one is given twice, or there is no frame to generate.
    """

    seeds: tuple[int, ...]
    seconds: float = 15.0
    camera: Literal["still", "pan"] = "pan"

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise OptionError(f"seeds are {list(self.seeds)}: expected at least one, each once")
        if self.chunks <= self.given:
            enough = (self.given + 1) * CHUNK / FPS + 0.05
            raise OptionError(
                f"{self.seconds:g} seconds are {self.chunks * CHUNK} frames, but the first "
                f"{self.given * CHUNK} are given to the model: use {enough:.1f} seconds or more"
            )

    @property
    def chunks(self) -> int:
        """Chunks of each video."""
        return round(self.seconds * FPS / CHUNK)

    @property
    def given(self) -> int:
        """Rendered chunks that all entrants start from."""
        return GIVEN_CHUNKS[self.camera]


@dataclass(frozen=True)
class Result:
    """The result of one entrant.

    Attributes:
        entrant: the entrant.
        of: for a control, the name of its entrant; otherwise `None`.
        psnr: of the background in dB, `[videos, frames]`, NaN if not measured; for random controls the mean
            over the draws.
        landmarks: share of the landmarks recognised when they are back, as for `psnr`.
        actors: share of what flies and drives recognised, as for `psnr`.
        stored: stored frames in a long video, mean over heads; `None` is every frame.
        attended: attended frames in a noisy pass, mean over heads; `None` is every frame.
        stored_bytes: keys and values of one video, counted from the tensors.
        video: of the first seed, `[3, frames, 48, 72]`.
    """

    entrant: Entrant
    of: str | None
    psnr: Tensor
    landmarks: Tensor
    actors: Tensor
    stored: float | None
    attended: float | None
    stored_bytes: int
    video: Tensor


@dataclass(frozen=True)
class Contest:
    """The result of a comparison.

    Attributes:
        setting: the videos that all entrants continued.
        trained: frames of the training videos.
        results: in the order of the entrants, each followed by its controls.
    """

    setting: Setting
    trained: int
    results: tuple[Result, ...]

    @property
    def entrants(self) -> tuple[Result, ...]:
        """The results without controls."""
        return tuple(result for result in self.results if result.of is None)

    @property
    def frames(self) -> int:
        """Frames of each video."""
        return self.setting.chunks * CHUNK

    @property
    def late(self) -> tuple[int, int]:
        """First and last frame of the late span."""
        return spans(self.frames, self.setting.given * CHUNK, self.trained)[1]

    def controls_of(self, result: Result) -> tuple[Result, ...]:
        """The controls of an entrant."""
        return tuple(other for other in self.results if other.of == result.entrant.name)

    def ended(self, result: Result) -> Interval:
        """Late PSNR."""
        return bootstrap_interval(self._late(result.psnr))

    def recognised(self, result: Result) -> Interval:
        """Late share of landmarks."""
        return bootstrap_interval(self._late(result.landmarks))

    def ahead(self, result: Result, other: Result) -> Interval:
        """Difference of late PSNR between two results, paired by video."""
        return paired_difference(self._late(result.psnr), self._late(other.psnr))

    def to_dict(self) -> dict[str, Any]:
        """Everything except the videos, ready for JSON; `None` is every frame, or not measured."""
        setting = self.setting
        return {
            "model": "headforcing demo",
            "camera": setting.camera,
            "seeds": list(setting.seeds),
            "frames": self.frames,
            "given": setting.given * CHUNK,
            "trained": self.trained,
            "late": list(self.late),
            "results": [self._row(result) for result in self.results],
        }

    def _late(self, values: Tensor) -> Tensor:
        return summarise(values, self.late[0], self.late[1] + 1)

    def _row(self, result: Result) -> dict[str, Any]:
        late = self._late(result.psnr)
        first = self.results[0]
        own = next((one for one in self.entrants if one.entrant.name == result.of), None)
        return {
            "name": result.entrant.name,
            "kind": result.entrant.kind,
            "control_of": result.of,
            "positions": "trained" if result.entrant.bounded else "beyond the trained range",
            "stored_frames": result.stored,
            "attended_frames": result.attended,
            "stored_bytes": result.stored_bytes,
            "psnr_late": _interval(self.ended(result)),
            "landmarks_late": _interval(self.recognised(result)),
            "minus_first": None if result is first else _interval(self.ahead(result, first)),
            "entrant_minus_this": None if own is None else _interval(self.ahead(own, result)),
            "psnr_late_by_seed": _numbers(late),
            "landmarks_late_by_seed": _numbers(self._late(result.landmarks)),
            "actors_late_by_seed": _numbers(self._late(result.actors)),
            "psnr_by_frame": _numbers(result.psnr.nanmean(0)),
            "roles": [[list(row) for row in draw.labels] for draw in result.entrant.draws],
        }


def decided(found: Interval) -> bool:
    """Whether a difference is significant."""
    return found.excludes_zero and found.count >= ENOUGH


@one_thread()
def compete(
    model: DemoModel,
    entrants: Sequence[Entrant],
    setting: Setting,
    *,
    with_controls: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Contest:
    """Lets every entrant continue the same scenes from the same noise.

    Args:
        model: the demo model, without head forcing; restored afterwards.
        entrants: what to compare; differences are to the first.
        setting: scenes and noise.
        with_controls: also run the controls of each, see `controls`.
        progress: called with the name of a stage, chunks done and chunks in total.

    Raises:
        OptionError: there is no entrant, or two have the same name.
    """
    names = [one.name for one in entrants]
    if not names or len(set(names)) < len(names):
        raise OptionError(f"{', '.join(names) or 'nothing'} to compare: expected names, each once")
    table: list[tuple[Entrant, str | None]] = []
    for one in entrants:
        table.append((one, None))
        if with_controls:
            table += [(control, one.name) for control in controls(one, model.config)]
    maps = dict.fromkeys(roles for one, _ in table for roles in one.draws)
    batches = [setting.seeds[at : at + BATCH] for at in range(0, len(setting.seeds), BATCH)]
    total, done = len(maps) * len(batches) * setting.chunks, 0

    def tell(*_: object) -> None:
        nonlocal done
        done += 1
        progress("chunks", done, total)

    made = {roles: [_rolled(model, roles, setting, some, tell) for some in batches] for roles in maps}
    found = tuple(
        _result(one, of, [made[roles] for roles in one.draws], setting, model.config) for one, of in table
    )
    return Contest(setting, model.config.window, found)


def _rolled(
    model: DemoModel, roles: RoleMap, setting: Setting, seeds: Sequence[int], tell: Callable[..., None]
) -> Rollout:
    scene = make_scene(seeds, setting.chunks, camera=setting.camera)
    policy = Policy("", roles)
    return roll(model, policy, scene, setting.chunks, seeds=seeds, given_chunks=setting.given, callback=tell)


def _result(
    one: Entrant, of: str | None, draws: Sequence[Sequence[Rollout]], setting: Setting, config: DemoConfig
) -> Result:
    """The result from the rollouts of every draw, batch by batch."""
    first = draws[0]

    def mean(metric: str) -> Tensor:
        drawn = [torch.cat([getattr(made, metric) for made in batches]) for batches in draws]
        return torch.stack(drawn).mean(0)

    return Result(
        one,
        of,
        mean("psnr"),
        mean("landmarks"),
        mean("actors"),
        stored_frames(one.roles, config),
        attended_frames(one.roles, config),
        round(sum(made.stored_bytes for made in first) / len(setting.seeds)),
        first[0].video[0],
    )


def _interval(found: Interval) -> dict[str, Any] | None:
    if not found.count:
        return None
    return {"mean": found.mean, "low": found.low, "high": found.high, "videos": found.count}


def _numbers(values: Tensor) -> list[float | None]:
    return [None if value != value else round(value, 4) for value in values.tolist()]
