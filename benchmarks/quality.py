"""What head-wise memory is worth on the demo model, against every plainer policy, video by video.

Profiles the model, labels its heads, lets every policy continue the same scenes from the same noise,
and writes a page and the numbers behind it. Profiling, tuning and reporting use disjoint seeds.

    python benchmarks/quality.py --tune                 # candidates for the numbers of the roles
    python benchmarks/quality.py --save-roles           # also writes the role map of the demo
    python benchmarks/quality.py --seeds 2 --chunks 30 --out runs/quality.md    # a quick look
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from ablation import function_labels, pruning_table
from quality_page import page
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from headforcing.demo.camera import CHUNK
from headforcing.demo.compare import GIVEN_CHUNKS, Policy, make_scene, returning_columns, roll, summarise
from headforcing.demo.metrics import background_psnr
from headforcing.demo.model import DemoModel
from headforcing.demo.pipeline import DemoPipeline
from headforcing.demo.world import render
from headforcing.profile import (
    HeadMass,
    Labels,
    attention_mass,
    bottom_ranked_roles,
    head_forcing_roles,
    shuffled_within_layers,
)
from headforcing.role_map import RoleMap
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow

ROOT = Path(__file__).resolve().parents[1]
PROFILE_SEEDS, TUNE_SEEDS, REPORT_SEEDS = range(4000, 4008), range(5000, 5008), range(6000, 7000)
PROFILE_CHUNKS = 30
DRAWS = 4
LATE = 30
CAMERAS: tuple[Literal["still", "pan"], ...] = ("still", "pan")

Numbers = Mapping[str, HeadRole]
DEFAULT: Numbers = {"anchor": Anchor(1), "local": Local(1), "memory": Memory(1, 8, 9)}
CHUNKWISE: Numbers = {"anchor": Anchor(3, 3), "local": Local(3), "memory": Memory(3, 12, 3)}
RULES = {
    "mass": (
        "by attention mass: anchors are the top 25 % by mass on the first frame, local the top 20 % of the "
        "rest by own mass"
    ),
    "strict": (
        "by attention mass: anchors only heads that look more at the first frame than at everything between, "
        "at most 25 %; local the top 20 % of the rest by own mass"
    ),
    "function": "by the error that grows when a head is cut alone, see benchmarks/ablation.py",
}
CANDIDATES: dict[str, tuple[str, Numbers]] = {
    f"{rule}, {name}": (rule, numbers)
    for rule in RULES
    for name, numbers in {
        "defaults": DEFAULT,
        "14 episodic": {"anchor": Anchor(1), "local": Local(1), "memory": Memory(1, 14, 3)},
        "12 episodic": {"anchor": Anchor(3), "local": Local(1), "memory": Memory(3, 12, 3)},
        "chunkwise": CHUNKWISE,
    }.items()
}
CHOSEN = "function, chunkwise"
"""The candidate with the best late PSNR over both cameras on the tuning seeds (`--tune`)."""


def measure(model: DemoModel) -> HeadMass:
    """Where the heads look on panning scenes.

    The camera must move: while it stands still, the first frame shows what every other frame shows,
    and a head that looks for content looks like an anchor.
    """
    scene = make_scene(PROFILE_SEEDS, PROFILE_CHUNKS, camera="pan")
    given = render(scene, torch.arange(GIVEN_CHUNKS["pan"] * CHUNK)).video
    prompts = scene.prompts(torch.arange(PROFILE_CHUNKS))
    noise = torch.Generator().manual_seed(PROFILE_SEEDS.start)
    return attention_mass(
        model, lambda: DemoPipeline(model).generate(prompts, generator=noise, first_chunk=given)
    )


def role_map(labels: Labels, numbers: Numbers, facts: Mapping[str, Any] | None = None) -> RoleMap:
    """Roles for labels; numbers that no head needs are left out by `RoleMap`."""
    return RoleMap.from_labels(labels, numbers, facts)


def label_rules(model: DemoModel, mass: HeadMass) -> dict[str, Labels]:
    """Labels by every rule of `RULES`."""
    looks_first = mass.first > mass.middle
    share = min(0.25, float(looks_first.double().mean()))
    strict = replace(mass, first=mass.first.where(looks_first, 0.0))
    return {
        "mass": head_forcing_roles(mass),
        "strict": head_forcing_roles(strict, anchor_share=share),
        "function": function_labels(model),
    }


def policies(rules: Mapping[str, Labels], mass: HeadMass, window: int) -> dict[str, list[Policy]]:
    """The policies by key; the draws of a random control stand in one list."""
    rule, numbers = CANDIDATES[CHOSEN]
    labels = rules[rule]
    generator = torch.Generator().manual_seed(0)
    memory = numbers["memory"]
    assert isinstance(memory, Memory)
    kept = {name: role.fit(window, CHUNK).capacity(CHUNK) or 0 for name, role in numbers.items()}
    flat = [kept[label] for row in labels for label in row]
    same = round(sum(flat) / len(flat)) + CHUNK
    plain: Numbers = {**numbers, "memory": SlidingWindow(window, sink=memory.sink, positions="compact")}
    draws = [shuffled_within_layers(labels, generator) for _ in range(DRAWS)]
    found = {
        "window": Policy(f"own sliding window, {window} frames"),
        "sink": Policy(f"sink 3 + window, {window} frames", SlidingWindow(window, sink=CHUNK)),
        "sink_small": Policy(f"sink 3 + window, {same} frames", SlidingWindow(same, sink=CHUNK)),
        "hf": Policy("**Head Forcing**", role_map(labels, numbers)),
        "hf_default": Policy("same labels, library defaults", role_map(labels, DEFAULT)),
        "hf_strict": Policy("labels by mass, strict anchors", role_map(rules["strict"], numbers)),
        "hf_mass": Policy("labels by mass", role_map(rules["mass"], numbers)),
        "hf_plain": Policy("labels by mass, library defaults", role_map(rules["mass"], DEFAULT)),
        "no_episodic": Policy("recent instead of episodic frames", role_map(labels, plain)),
        "memory_all": Policy("every head a memory head", memory),
        "local_all": Policy("every head a local head", numbers["local"]),
        "bottom": Policy("labels by mass, bottom up", role_map(bottom_ranked_roles(mass), numbers)),
        "dense": Policy("dense, every frame", window=-1),
    }
    shuffles = [Policy("labels shuffled in each layer", role_map(draw, numbers)) for draw in draws]
    return {key: [policy] for key, policy in found.items()} | {"shuffled": shuffles}


def evaluate(
    model: DemoModel,
    policy: Policy,
    camera: Literal["still", "pan"],
    seeds: Sequence[int],
    chunks: int,
    batch: int,
) -> dict[str, Any]:
    """All measures of one policy, one number per video."""
    given, frames = GIVEN_CHUNKS[camera] * CHUNK, chunks * CHUNK
    away = model.config.window - CHUNK
    columns: dict[str, list[Tensor]] = {}
    stored = attended = 0.0
    for first in range(0, len(seeds), batch):
        some = seeds[first : first + batch]
        scene = make_scene(some, chunks, camera=camera)
        made = roll(model, policy, scene, chunks, seeds=some, given_chunks=given // CHUNK)
        back = background_psnr(made.video, scene, columns=returning_columns(scene.camera, chunks, away))
        spans = {"early": (given, given + 18), "late": (frames - LATE, frames)}
        values = {"psnr": made.psnr, "identity": made.identity, "motion": made.motion}
        found = {
            f"{name}_{span}": summarise(value, *spans[span])
            for name, value in values.items()
            for span in spans
        }
        found["psnr_return"] = summarise(back, given, frames)
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
        stored, attended = made.stored_bytes / len(some), made.attended_frames
    measures = {name: [round(float(x), 4) for x in torch.cat(parts)] for name, parts in columns.items()}
    return {"name": policy.name, "attended_frames": attended, "bytes": stored, "measures": measures}


def mean_of_draws(draws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record: per video the mean over the draws; the late PSNR of each draw is kept."""
    if len(draws) == 1:
        return dict(draws[0])
    measures = {
        name: torch.tensor([draw["measures"][name] for draw in draws]).mean(0).tolist()
        for name in draws[0]["measures"]
    }
    late = [sum(draw["measures"]["psnr_late"]) / len(draw["measures"]["psnr_late"]) for draw in draws]
    mean = {name: sum(draw[name] for draw in draws) / len(draws) for name in ("attended_frames", "bytes")}
    return {"name": draws[0]["name"], **mean, "measures": measures, "psnr_late_of_draws": late}


def tune(model: DemoModel, rules: Mapping[str, Labels], chunks: int, batch: int, console: Console) -> None:
    """A table of the candidates on the tuning seeds."""
    table = Table("numbers", "camera", "frames", "PSNR late", "return", "identity late")
    for name, (rule, numbers) in CANDIDATES.items():
        for camera in CAMERAS:
            policy = Policy(name, role_map(rules[rule], numbers))
            row = evaluate(model, policy, camera, TUNE_SEEDS, chunks, batch)
            means = [
                f"{torch.tensor(row['measures'][key]).nanmean():.2f}"
                for key in ("psnr_late", "psnr_return", "identity_late")
            ]
            table.add_row(name, camera, f"{row['attended_frames']:.1f}", *means)
            console.log(name, camera, *means)
    console.print(table)


def provenance(weights: Path, numbers: str) -> dict[str, Any]:
    """Where the role map of the demo comes from."""
    profile, tuning = (f"seeds {seeds.start} to {seeds.stop - 1}" for seeds in (PROFILE_SEEDS, TUNE_SEEDS))
    return {
        "model": "headforcing demo model",
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "labels": RULES[CANDIDATES[CHOSEN][0]],
        "mass_measured_on": f"pan, {PROFILE_CHUNKS} chunks, {profile}",
        "numbers": f"{numbers}: chosen on {tuning}",
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quality of memory policies on the demo model.")
    parser.add_argument("--seeds", type=int, default=16, help="videos per camera and policy")
    parser.add_argument("--chunks", type=int, default=80, help="of 3 frames each")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=Path, help="default: those in the package")
    parser.add_argument("--tune", action="store_true", help="compare candidates and stop")
    parser.add_argument("--save-roles", action="store_true", help="write headforcing/demo/roles.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "demo-results.md")
    return parser.parse_args()


def main() -> None:
    """See the module."""
    given, console = arguments(), Console()
    torch.set_num_threads(given.threads)
    with resources.as_file(resources.files("headforcing.demo") / "weights.safetensors") as packaged:
        weights = given.weights or packaged
        model = DemoModel().load_weights(weights).eval().requires_grad_(False)
    mass = measure(model)
    rules = label_rules(model, mass)
    rule, numbers = CANDIDATES[CHOSEN]
    if given.tune:
        tune(model, rules, given.chunks, given.batch, console)
        return
    facts = provenance(weights, CHOSEN)
    if given.save_roles:
        role_map(rules[rule], numbers, facts).save(ROOT / "headforcing" / "demo" / "roles.json")
    seeds = list(REPORT_SEEDS[: given.seeds])
    scenarios: dict[str, dict[str, Any]] = {camera: {} for camera in CAMERAS}
    contest = policies(rules, mass, model.config.window)
    jobs = [(key, camera) for key in contest for camera in CAMERAS]
    for key, camera in track(jobs, "policies", console=console):
        draws = [evaluate(model, policy, camera, seeds, given.chunks, given.batch) for policy in contest[key]]
        scenarios[camera][key] = mean_of_draws(draws)
    data = given.out.parent / "data" / f"{given.out.stem}.json"
    settings = {
        "frames": given.chunks * CHUNK,
        "trained": model.config.window,
        "late": LATE,
        "seeds": [seeds[0], seeds[-1]],
        "data": data.name,
        "roles": ", ".join(str(role) for role in numbers.values()),
    }
    results = {
        "settings": settings | facts,
        "torch": torch.__version__,
        "labels": rules[rule],
        "label_rules": rules,
        "mass": {name: getattr(mass, name).tolist() for name in ("first", "middle", "own")},
        "pruning": pruning_table(model, rules[rule]),
        "scenarios": scenarios,
    }
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    given.out.write_text(page(results), encoding="utf-8")
    console.print(f"wrote {given.out} and {data}")


if __name__ == "__main__":
    main()
