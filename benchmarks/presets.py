"""What every preset is worth on the demo model, against StreamingLLM at its frames and its roles elsewhere.

Lets every preset and its controls continue the same scenes from the same noise, and writes a page, the
numbers behind it and a picture. The videos are those of `quality.py`; labels were measured on others.

    python benchmarks/presets.py                        # half an hour of one core
    python benchmarks/presets.py --keep runs/presets    # records are kept there, and taken from there
    python benchmarks/presets.py --seeds 2 --chunks 30 --out runs/presets.md    # a quick look
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from presets_page import OWN, draw, page
from quality import CAMERAS, LATE, REPORT_SEEDS, ROOT, Job
from rich.console import Console
from rich.progress import track

from headforcing.demo.contest.compare import Policy
from headforcing.demo.contest.entrants import (
    attended_frames,
    entrant,
    scattered,
    shuffled,
    stored_frames,
    streaming,
)
from headforcing.demo.model.attention import DemoConfig
from headforcing.demo.profiled import SEED, VIDEOS
from headforcing.demo.show.files import replace_file
from headforcing.demo.world.camera import CHUNK
from headforcing.roles import SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.maps.role_map import RoleMap

DRAWS = 4
"""Of labels; each draw makes its share of the videos, so that the intervals know of them."""


def contest(config: DemoConfig) -> tuple[dict[str, list[Policy]], dict[str, dict[str, Any]]]:
    """The policies by key, entrants first, and what is known of every entrant: its frames, its controls."""
    entrants = [entrant(name, config) for name in PRESETS]
    policies = {one.name: [Policy(one.name, one.roles)] for one in entrants}
    by_roles = {one.roles: one.name for one in entrants}
    facts: dict[str, dict[str, Any]] = {}
    drawn: dict[str, list[Policy]] = {}
    for one in entrants:
        attended = attended_frames(one.roles, config)
        facts[one.name] = fact = {
            "stored": stored_frames(one.roles, config),
            "attended": attended,
            "bounded": one.bounded,
            "roles": {str(role): count for role, count in one.roles.counts().items()},
            "controls": {},
        }
        if attended is not None:
            frames = min(max(round(attended), config.chunk + 1), config.window)
            roles = streaming(frames, config)
            key = by_roles.setdefault(roles, f"sink + recent, {frames} frames")
            policies.setdefault(key, [Policy(key, roles)])
            fact["controls"] |= {} if key == one.name else {"streaming": key}
        if sinks := {role.sink for role in one.roles.counts() if isinstance(role, Participating)}:
            role = SlidingWindow(config.window, sink=max(sinks))
            key = f"sink of {one.name}, {config.window} frames"
            policies[key] = [Policy(key, RoleMap.uniform(role, config.layers, config.heads))]
            fact["controls"]["sink"] = key
        if len(one.roles.counts()) > 1:
            for name, draw in (("shuffled", shuffled), ("random", scattered)):
                key = f"{one.name}, {name}"
                drawn[key] = [Policy(key, draw(one.roles, seed)) for seed in range(DRAWS)]
                fact["controls"][name] = key
    return policies | drawn, facts


def jobs_of(
    policies: Mapping[str, Sequence[Policy]], seeds: Sequence[int], chunks: int, batch: int
) -> list[Job]:
    """Every policy on both cameras; draws share the videos among them and come last."""
    found = []
    for key, draws in policies.items():
        each = -(-len(seeds) // len(draws))
        shares = [list(seeds[at : at + each]) for at in range(0, len(seeds), each)]
        for camera in CAMERAS:
            for policy, share in zip(draws, shares, strict=False):
                found.append(Job(key, policy, camera, share, chunks, batch))

    def turn(job: Job) -> int:
        still, drawn = job.camera == "still", len(policies[job.key]) > 1
        if not drawn:
            return 2 if still and job.key not in PRESETS else 0
        return 1 + 2 * job.key.endswith("random") + 3 * still

    return sorted(found, key=turn)


def evaluate_all(
    jobs: Sequence[Job], workers: int, keep: Path | None, console: Console
) -> list[dict[str, Any]]:
    """The records of all jobs, in their order."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(record, job, keep) for job in jobs]
        return [one.result() for one in track(running, "policies", console=console)]


def record(job: Job, keep: Path | None) -> dict[str, Any]:
    """All measures of a job, or those of an earlier run of the very same one."""
    if keep is None:
        return job.run()
    path = place(job, keep)
    if not path.exists():
        made = json.dumps(job.run())
        replace_file(path, lambda part: part.write_text(made, "utf-8"))
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def place(job: Job, keep: Path) -> Path:
    """Where the record of a job is kept."""
    return keep / f"{hashlib.sha256(repr(job).encode()).hexdigest()[:16]}.json"


def complete(jobs: Sequence[Job], keep: Path) -> list[Job]:
    """The jobs of those policies that are all there, on a camera."""
    missing = {(job.key, job.camera) for job in jobs if not place(job, keep).exists()}
    return [job for job in jobs if (job.key, job.camera) not in missing]


def by_camera(jobs: Sequence[Job], records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Records by camera and key; the videos of several draws side by side."""
    found: dict[str, dict[str, Any]] = {}
    for job, one in zip(jobs, records, strict=True):
        row = found.setdefault(job.camera, {}).setdefault(job.key, {**one, "measures": {}, "draws": []})
        for name, values in one["measures"].items():
            row["measures"].setdefault(name, []).extend(values)
        late = one["measures"]["psnr_late"]
        row["draws"].append(sum(late) / len(late))
    return found


def own_map(seeds: Sequence[int], frames: int) -> dict[str, dict[str, Any]]:
    """What the role map of the package did on the same videos, by camera, as `quality.py` found."""
    data = json.loads((ROOT / "docs" / "data" / "demo-results.json").read_text("utf-8"))
    if data["settings"]["seeds"] != [seeds[0], seeds[-1]] or data["settings"]["frames"] != frames:
        return {camera: {} for camera in CAMERAS}
    return {camera: {OWN: data["scenarios"][camera]["hf"]} for camera in CAMERAS}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quality of every preset on the demo model.")
    parser.add_argument("--seeds", type=int, default=16, help="videos per camera and policy")
    parser.add_argument("--chunks", type=int, default=80, help="of 3 frames each")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--keep", type=Path, help="folder for the records of single policies")
    parser.add_argument(
        "--kept-only", action="store_true", help="no videos: what --keep has, the rest left out"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "preset-results.md")
    return parser.parse_args()


def main() -> None:
    """See the module."""
    given, console, config = arguments(), Console(), DemoConfig()
    torch.set_num_threads(1)
    seeds = list(REPORT_SEEDS[: given.seeds])
    policies, facts = contest(config)
    jobs = jobs_of(policies, seeds, given.chunks, given.batch)
    if given.kept_only:
        jobs = complete(jobs, given.keep)
    records = evaluate_all(jobs, given.workers, given.keep, console)
    frames = given.chunks * CHUNK
    scenarios, own = by_camera(jobs, records), own_map(seeds, frames)
    results = {
        "settings": {
            "frames": frames,
            "trained": config.window,
            "late": LATE,
            "seeds": [seeds[0], seeds[-1]],
            "labels": [SEED, SEED + VIDEOS - 1],
            "draws": DRAWS,
        },
        "torch": torch.__version__,
        "entrants": facts,
        "scenarios": {camera: own[camera] | scenarios[camera] for camera in CAMERAS},
    }
    data = given.out.parent / "data" / f"{given.out.stem}.json"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    picture = given.out.parent / "assets" / f"{given.out.stem}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(results).figure.savefig(picture)
    given.out.write_text(page(results, data.name, picture.name), encoding="utf-8")
    console.print(f"wrote {given.out}, {data} and {picture}")


if __name__ == "__main__":
    main()
