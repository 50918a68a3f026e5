"""What prompt switching is worth on the demo model: scenes that return, mode by mode, video by video.

Plays one script, six scenes of which two return, in every mode and from the same noise, under five role
maps, and writes a page, its numbers and its pictures. The roles' numbers were chosen without it.

    python benchmarks/scenes.py                                           # 8 seeds, ten minutes
    python benchmarks/scenes.py --seeds 2 --out runs/scenes-results.md    # a quick look
    python benchmarks/scenes.py --page                                    # the page again, from its numbers
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from scenes_page import page

from headforcing.demo import demo_model, demo_roles
from headforcing.demo.contest.entrants import attended_frames
from headforcing.demo.model.model import DemoModel
from headforcing.demo.scenes.run import MODES, WRONG, Found, Played, Script, measure, play
from headforcing.demo.scenes.show import modes, timeline
from headforcing.roles import HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.maps.role_map import RoleMap

ROOT = Path(__file__).resolve().parents[1]
SEEDS = range(8000, 9000)
"""Used nowhere else."""
HERE = "Head Forcing"


def maps(model: DemoModel) -> dict[str, tuple[RoleMap, tuple[str, ...]]]:
    """Role maps by name, and the modes each is played in."""
    config, roles = model.config, demo_roles()
    shape, window, chunk = (config.layers, config.heads), config.window, config.chunk
    small = round(attended_frames(roles, config) or window)
    fewer = ("recall", "continue")
    uniform: dict[str, tuple[HeadRole, tuple[str, ...]]] = {
        "every head a memory head": (next(r for r in roles.counts() if isinstance(r, Memory)), MODES),
        f"sink 3 + window, {window} frames": (SlidingWindow(window, sink=chunk), MODES),
        f"sink 3 + window, {small} frames": (SlidingWindow(small, sink=chunk), fewer),
        "every head a local head": (Local(chunk), fewer),
    }
    plain = {name: (RoleMap.uniform(role, *shape), modes) for name, (role, modes) in uniform.items()}
    return {HERE: (roles, (*MODES, WRONG)), **plain}


@dataclass(frozen=True)
class Job:
    """One mode under one map, for a process of its own."""

    name: str
    roles: RoleMap
    mode: str
    seeds: Sequence[int]
    chunks: int
    batch: int

    def run(self) -> dict[str, Any]:
        """All measures, one number per video; the process uses one thread."""
        torch.set_num_threads(1)
        model, script = demo_model(), Script(chunks=self.chunks)
        found: list[Found] = []
        stored = 0.0
        for first in range(0, len(self.seeds), self.batch):
            some = self.seeds[first : first + self.batch]
            played = play(model, self.roles, script, self.mode, some)
            found.append(measure(played.video, script))
            stored = played.stored_bytes / len(some)
        names = ("returned", "leaked", "distance", "halves", "actors", "at_once")
        columns = {name: torch.cat([getattr(each, name) for each in found]) for name in names}
        measures = {name: [round(float(x), 4) for x in column] for name, column in columns.items()}
        return {"map": self.name, "mode": self.mode, "bytes": stored, "measures": measures}


def one_video(script: Script, seed: int) -> list[Played]:
    """One video in every mode, for the pictures."""
    torch.set_num_threads(1)
    model, roles = demo_model(), demo_roles()
    return [play(model, roles, script, mode, [seed]) for mode in MODES]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Scenes that return, on the demo model.")
    parser.add_argument("--seeds", type=int, default=8, help="videos per mode and map")
    parser.add_argument("--chunks", type=int, default=8, help="of each scene, 3 frames each")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "scenes-results.md")
    parser.add_argument("--page", action="store_true", help="write the page from the numbers there are")
    given, console = parser.parse_args(), Console()
    data = given.out.parent / "data" / f"{given.out.stem}.json"
    if not given.page:
        make(given, data, console)
    given.out.write_text(page(json.loads(data.read_text(encoding="utf-8"))), encoding="utf-8")
    console.print(f"wrote {given.out}")


def make(given: argparse.Namespace, data: Path, console: Console) -> None:
    """The numbers and the pictures."""
    seeds, script, roles = list(SEEDS[: given.seeds]), Script(chunks=given.chunks), demo_roles()
    jobs = [
        Job(name, found, mode, seeds, given.chunks, given.batch)
        for name, (found, played) in maps(demo_model()).items()
        for mode in played
    ]
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        records = list(track(pool.map(Job.run, jobs), "modes", total=len(jobs), console=console))
    results = {
        "settings": {
            "prompts": script.prompts,
            "names": script.names,
            "chunks": script.chunks,
            "frames": script.frames,
            "seeds": [seeds[0], seeds[-1]],
            "data": data.name,
            "roles": {str(role): count for role, count in roles.counts().items()},
            "map": roles.hash,
        },
        "torch": torch.__version__,
        "records": records,
    }
    assets = given.out.parent / "assets"
    for folder in (data.parent, assets):
        folder.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    played = one_video(script, seeds[0])
    timeline(script, played[0], f"the demo's role map · seed {seeds[0]}").savefig(
        assets / "scenes-timeline.png"
    )
    modes(script, played).savefig(assets / "scenes-modes.png")


if __name__ == "__main__":
    main()
