"""What head-wise memory is worth on the demo model, against every plainer policy, video by video.

Lets every policy continue the same scenes from the same noise, with the role map of the demo, and writes
a page and the numbers behind it. Where the map comes from is the work of `role_maps.py`. Measuring the
map, tuning its numbers and reporting use disjoint seeds.

    python benchmarks/quality.py --keep runs/quality    # records are kept there, and taken from there
    python benchmarks/quality.py --tune                 # candidates for the numbers of the roles
    python benchmarks/quality.py --seeds 2 --chunks 30 --out runs/quality.md    # a quick look
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pruning import kind_of, pruning_table
from quality_page import page
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from headforcing.demo import demo_model, demo_roles
from headforcing.demo.contest.compare import (
    DEFAULT_CHUNKS,
    GIVEN_CHUNKS,
    Policy,
    make_scene,
    roll,
    summarise,
)
from headforcing.demo.contest.entrants import scattered, shuffled
from headforcing.demo.model.model import DemoModel
from headforcing.demo.show.draw import draw_sheet
from headforcing.demo.show.files import replace_file
from headforcing.demo.show.show import FPS, Request, roll_both, story, summarise_all
from headforcing.demo.world.camera import CHUNK
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.episodic import MaxMin, Uniform
from headforcing.roles.maps.presets import commit_forcing
from headforcing.roles.maps.role_map import RoleMap

ROOT = Path(__file__).resolve().parents[1]
TUNE_SEEDS, REPORT_SEEDS = range(5000, 5008), range(6000, 7000)
DRAWS = 4
"""Of a random control; each draw makes its share of the videos, so that the intervals know of them."""
LATE = 30
MIDDLE = 15
"""Frames of a uniform memory between that of Head Forcing and a whole window, current chunk included."""
STILL = (
    *("window", "sink", "sink_small", "memory_all", "memory_small", "local_all", "hf", "different", "random"),
    *("sink_clean_9", "sink_clean_3", "hf_clean_9", "hf_clean_3"),
)
"""Where the camera stands still, less is asked, and of half as many videos."""
Camera = Literal["still", "pan"]

Numbers = Mapping[str, HeadRole]
DEFAULT: Numbers = {"anchor": Anchor(1), "local": Local(1), "memory": Memory(1, 8, 9)}
NUMBERS: dict[str, Numbers] = {
    "defaults": DEFAULT,
    "3+12+3": {"anchor": Anchor(3, 3), "local": Local(3), "memory": Memory(3, 12, 3)},
    "1+14+3": {"anchor": Anchor(3, 3), "local": Local(3), "memory": Memory(1, 14, 3)},
    "1+14+3, local 6": {"anchor": Anchor(3, 6), "local": Local(6), "memory": Memory(1, 14, 3)},
    "3+12+3 spread": {"anchor": Anchor(3, 3), "local": Local(3), "memory": Memory(3, 12, 3, Uniform())},
    "1+14+3 spread": {"anchor": Anchor(3, 3), "local": Local(3), "memory": Memory(1, 14, 3, Uniform())},
    "1+16+1 spread": {"anchor": Anchor(3, 3), "local": Local(3), "memory": Memory(1, 16, 1, Uniform())},
}
"""Numbers for the roles of the shipped map: sink + episodic + recent of memory heads."""
CHOSEN = "1+14+3 spread"
"""Of the two with the best mean PSNR on the tuning seeds, camera panning, the better one at the end."""
MEASURES = ("psnr", "landmarks", "actors", "sharpness")


def with_numbers(roles: RoleMap, numbers: Numbers) -> RoleMap:
    """The same kinds of roles with other numbers."""
    return RoleMap(tuple(tuple(numbers[kind_of(role)] for role in row) for row in roles.layers))


def policies(roles: RoleMap, window: int) -> dict[str, list[Policy]]:
    """The policies by key; the draws of a random control stand in one list."""
    flat = [role.capacity(CHUNK) or 0 for row in roles.layers for role in row]
    same = round(sum(flat) / len(flat)) + CHUNK
    kinds = {type(role): role for role in roles.counts()}
    memory = kinds[Memory]
    assert isinstance(memory, Memory)

    def smaller(frames: int) -> Memory:
        return dataclasses.replace(memory, episodic=frames - CHUNK - memory.sink - (memory.recent or 0))

    sink = SlidingWindow(window, sink=CHUNK)
    different = dataclasses.replace(memory, update=MaxMin())
    true = dataclasses.replace(memory, positions="absolute")
    found: dict[str, Policy] = {
        "window": Policy(f"own sliding window, {window} frames"),
        "sink": Policy(f"sink 3 + window, {window} frames", sink),
        "sink_most": Policy(
            f"sink {window - 3 * CHUNK} + window, {window} frames",
            SlidingWindow(window, sink=window - 3 * CHUNK),
        ),
        "sink_small": Policy(f"sink 3 + window, {same} frames", SlidingWindow(same, sink=CHUNK)),
        "memory_all": Policy("every head a memory head", memory),
        "memory_middle": Policy(f"every head a memory head, {MIDDLE} frames", smaller(MIDDLE)),
        "memory_small": Policy(f"every head a memory head, {same} frames", smaller(same)),
        "local_all": Policy("every head a local head", kinds[Local]),
        "dense": Policy("dense, every frame", window=-1),
        "hf": Policy("**Head Forcing**", roles),
        "hf_default": Policy("same labels, library defaults", with_numbers(roles, DEFAULT)),
        "different": Policy("episodic frames that differ most", exchanged(roles, different)),
        "no_episodic": Policy("first and last instead of episodic frames", exchanged(roles, plain(window))),
        "true_positions": Policy("memory heads at true positions", exchanged(roles, true)),
    }
    for narrow in (3 * CHUNK, CHUNK):
        told = f", clean pass sees {narrow} frames"
        found[f"sink_clean_{narrow}"] = Policy(
            found["sink"].name + told, dataclasses.replace(sink, clean_window=narrow)
        )
        found[f"hf_clean_{narrow}"] = Policy("Head Forcing" + told, commit_forcing(roles, narrow))
    draws = {
        "shuffled": [Policy("labels shuffled in each layer", shuffled(roles, draw)) for draw in range(DRAWS)],
        "random": [Policy("labels on random heads", scattered(roles, draw)) for draw in range(DRAWS)],
    }
    return {key: [policy] for key, policy in found.items()} | draws


def plain(window: int) -> HeadRole:
    """First and last frames, as many as the window has."""
    return SlidingWindow(window, sink=window - 3 * CHUNK, positions="compact")


def exchanged(roles: RoleMap, memory: HeadRole) -> RoleMap:
    """The map with another role for its memory heads."""
    return RoleMap(
        tuple(tuple(memory if isinstance(role, Memory) else role for role in row) for row in roles.layers)
    )


def evaluate(
    model: DemoModel,
    policy: Policy,
    camera: Camera,
    seeds: Sequence[int],
    chunks: int,
    batch: int,
) -> dict[str, Any]:
    """All measures of one policy, one number per video."""
    given, frames = GIVEN_CHUNKS[camera] * CHUNK, chunks * CHUNK
    spans = {"early": (given, given + 18), "late": (frames - LATE, frames), "all": (given, frames)}
    columns: dict[str, list[Tensor]] = {}
    stored = attended = 0.0
    for first in range(0, len(seeds), batch):
        some = seeds[first : first + batch]
        scene = make_scene(some, chunks, camera=camera)
        made = roll(model, policy, scene, chunks, seeds=some, given_chunks=given // CHUNK)
        found = {
            f"{name}_{span}": summarise(getattr(made, name), *spans[span])
            for name in MEASURES
            for span in spans
        }
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
        stored, attended = made.stored_bytes / len(some), made.attended_frames
    measures = {name: [round(float(x), 4) for x in torch.cat(parts)] for name, parts in columns.items()}
    return {"name": policy.name, "attended_frames": attended, "bytes": stored, "measures": measures}


@dataclass(frozen=True)
class Job:
    """One policy on one camera, for a process of its own."""

    key: str
    policy: Policy
    camera: Camera
    seeds: Sequence[int]
    chunks: int
    batch: int

    def run(self) -> dict[str, Any]:
        """All measures; the process uses one thread."""
        torch.set_num_threads(1)
        return evaluate(demo_model(), self.policy, self.camera, self.seeds, self.chunks, self.batch)


def shares_of(seeds: Sequence[int], draws: int) -> list[Sequence[int]]:
    """The seeds of every draw of a control; with few seeds there are fewer shares than draws."""
    each = -(-len(seeds) // draws)
    return [seeds[at : at + each] for at in range(0, len(seeds), each)]


def jobs_of(
    policies: Mapping[str, Sequence[Policy]], camera: Camera, seeds: Sequence[int], given: argparse.Namespace
) -> list[Job]:
    """Every policy on every seed; the draws of a random control share the videos among them."""
    found = []
    for key, draws in policies.items():
        for policy, share in zip(draws, shares_of(seeds, len(draws)), strict=False):
            found.append(Job(key, policy, camera, share, given.chunks, given.batch))
    return found


def evaluate_all(jobs: Sequence[Job], given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """The records of all jobs, in their order."""
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(record, job, given.keep) for job in jobs]
        return [one.result() for one in track(running, "policies", console=console)]


def record(job: Job, keep: Path | None) -> dict[str, Any]:
    """All measures of a job, or those of an earlier run of the very same one."""
    if keep is None:
        return job.run()
    path = keep / f"{hashlib.sha256(repr(job).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        made = json.dumps(job.run())
        replace_file(path, lambda part: part.write_text(made, "utf-8"))
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


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


def tune(model: DemoModel, roles: RoleMap, chunks: int, batch: int, console: Console) -> None:
    """A table of the numbers on the tuning seeds."""
    keys = ("psnr_all", "psnr_late", "landmarks_all", "actors_late", "sharpness_late")
    table = Table("numbers", "camera", "frames", *keys)
    for name, numbers in NUMBERS.items():
        for camera in get_args(Camera):
            policy = Policy(name, with_numbers(roles, numbers))
            row = evaluate(model, policy, camera, TUNE_SEEDS, chunks, batch)
            means = [f"{torch.tensor(row['measures'][key]).nanmean():.2f}" for key in keys]
            table.add_row(name, camera, f"{row['attended_frames']:.1f}", *means)
            console.log(name, camera, *means)
    console.print(table)


def worst(model: DemoModel, roles: RoleMap, record: Mapping[str, Any], chunks: int) -> tuple[int, Any]:
    """The seed of the video that Head Forcing made worst, and its contact sheet, a Pillow image."""
    values = record["measures"]["psnr_all"]
    seed = REPORT_SEEDS[values.index(min(values))]
    request = Request(seed=seed, seconds=chunks * CHUNK / FPS, camera="pan")
    scene = make_scene([seed], chunks, camera="pan")
    made, _ = roll_both(model, roles, scene, request, lambda *_: None)
    return seed, draw_sheet(story(summarise_all(request, scene, model, made), scene, made))


def arguments(description: str, page: str, seeds: int) -> argparse.ArgumentParser:
    """The command line that the pages have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=seeds, help="videos per camera and policy")
    parser.add_argument("--chunks", type=int, default=DEFAULT_CHUNKS, help="of 3 frames each")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--keep", type=Path, help="folder for the records of single policies")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / page)
    return parser


def main() -> None:
    """See the module."""
    parser = arguments("Quality of memory policies on the demo model.", "demo-results.md", 16)
    parser.add_argument("--tune", action="store_true", help="compare numbers for the roles and stop")
    given, console = parser.parse_args(), Console()
    torch.set_num_threads(1)
    model, roles = demo_model(), demo_roles()
    if given.tune:
        tune(model, roles, given.chunks, given.batch, console)
        return
    asked, seeds = policies(roles, model.config.window), list(REPORT_SEEDS[: given.seeds])
    jobs = jobs_of(asked, "pan", seeds, given)
    jobs += jobs_of({key: asked[key] for key in STILL}, "still", seeds[: -(-len(seeds) // 2)], given)
    scenarios = by_camera(jobs, evaluate_all(jobs, given, console))
    data = given.out.parent / "data" / f"{given.out.stem}.json"
    data.parent.mkdir(parents=True, exist_ok=True)
    picture = given.out.parent / "assets" / f"{given.out.stem}-worst.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    seed, sheet = worst(model, roles, scenarios["pan"]["hf"], given.chunks)
    sheet.save(picture)
    measurement = roles.origin.measurement
    assert measurement is not None
    results = {
        "settings": {
            "frames": given.chunks * CHUNK,
            "trained": model.config.window,
            "late": LATE,
            "seeds": [REPORT_SEEDS[0], REPORT_SEEDS[given.seeds - 1]],
            "data": data.name,
            "worst": {"seed": seed, "picture": f"{picture.parent.name}/{picture.name}"},
            "roles": {str(role): count for role, count in roles.counts().items()},
            "map": roles.hash,
            "method": measurement.method,
        },
        "torch": torch.__version__,
        "pruning": pruning_table(model, roles),
        "scenarios": scenarios,
    }
    data.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    given.out.write_text(page(results), encoding="utf-8")
    console.print(f"wrote {given.out} and {data}")


if __name__ == "__main__":
    main()
