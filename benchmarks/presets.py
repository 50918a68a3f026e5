"""What every preset is worth on the demo model, against StreamingLLM at its frames and its roles elsewhere.

Lets every preset and its controls continue the same scenes from the same noise, and writes a page, the
numbers behind it and a picture. The videos are those of `quality.py`; labels were measured on others.

    python benchmarks/presets.py
    python benchmarks/presets.py --keep runs/presets    # records are kept there, and taken from there
    python benchmarks/presets.py --seeds 2 --chunks 30 --out runs/presets.md    # a quick look
"""

from __future__ import annotations

import json
from typing import Any

import torch
from presets_page import OWN, draw, page
from quality import DRAWS, LATE, REPORT_SEEDS, ROOT, arguments, by_camera, evaluate_all, jobs_of, shares_of
from rich.console import Console

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
from headforcing.demo.world.camera import CHUNK
from headforcing.roles import SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.maps.role_map import RoleMap


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


def own_map(first: int, last: int, frames: int) -> dict[str, Any]:
    """What the role map of the package did on the first of these videos, as `quality.py` found."""
    data = json.loads((ROOT / "docs" / "data" / "demo-results.json").read_text("utf-8"))
    settings, count = data["settings"], last - first + 1
    if settings["seeds"][0] != first or settings["seeds"][1] < last or settings["frames"] != frames:
        return {}
    row = data["scenarios"]["pan"]["hf"]
    return {OWN: {**row, "measures": {name: values[:count] for name, values in row["measures"].items()}}}


def main() -> None:
    """See the module."""
    given = arguments("Quality of every preset on the demo model.", "preset-results.md", 6).parse_args()
    console, config = Console(), DemoConfig()
    torch.set_num_threads(1)
    policies, facts = contest(config)
    jobs = jobs_of(policies, "pan", REPORT_SEEDS[: given.seeds], given)
    records = by_camera(jobs, evaluate_all(jobs, given, console))["pan"]
    first, last, frames = REPORT_SEEDS[0], REPORT_SEEDS[given.seeds - 1], given.chunks * CHUNK
    results = {
        "settings": {
            "frames": frames,
            "trained": config.window,
            "late": LATE,
            "seeds": [first, last],
            "labels": [SEED, SEED + VIDEOS - 1],
            "draws": len(shares_of(REPORT_SEEDS[: given.seeds], DRAWS)),
        },
        "torch": torch.__version__,
        "entrants": facts,
        "records": own_map(first, last, frames) | records,
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
