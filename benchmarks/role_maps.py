"""Which way to find the roles of heads is worth something: every classifier and its controls at equal bytes.

Profiles the demo model, classifies its heads in every way there is, asks how stable every map is, and lets
maps and controls continue the same scenes from the same noise, each with the same number of frames in all.

    python benchmarks/role_maps.py                  # the page, its numbers and pictures
    python benchmarks/role_maps.py --save           # also writes the map that the demo uses, and its report
    python benchmarks/role_maps.py --seeds 2 --chunks 30 --videos 8 --out runs/role-maps.md    # a quick look
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from demo_training.ablated import ablate_demo
from equal_bytes import at_budget, within_budget
from pruning import kind_of
from quality import (
    CHOSEN,
    DRAWS,
    NUMBERS,
    REPORT_SEEDS,
    ROOT,
    TUNE_SEEDS,
    arguments,
    by_camera,
    evaluate_all,
    jobs_of,
    shares_of,
)
from rich.console import Console
from role_maps_page import draw_pictures, page

from headforcing.demo import demo_model
from headforcing.demo.contest.compare import Policy
from headforcing.demo.profiled import LONG_CHUNKS, profile_demo
from headforcing.demo.world.camera import CHUNK
from headforcing.measure import labels as controls
from headforcing.measure.classifiers import Classification, find_classifier
from headforcing.measure.compare import compare_labels
from headforcing.measure.labels import measured_map
from headforcing.measure.profile import HeadProfile
from headforcing.measure.stability import stability
from headforcing.measure.stability_report import StabilityReport
from headforcing.roles import Memory, SlidingWindow
from headforcing.roles.maps.presets import pyramid_forcing
from headforcing.roles.maps.role_map import RoleMap

KEPT = 8
"""Frames kept per head, mean over the heads; the current chunk comes on top."""
STABILITY_DRAWS = 50
THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Errors that ablation may allow."""
SHIPPED = "ablation"
CONTROLLED = ("ablation", "head_forcing")
DEMO = ROOT / "headforcing" / "demo"


@dataclass(frozen=True)
class Way:
    """One way to find roles.

    Attributes:
        name: as the page calls it.
        profile: which profile it reads.
        method: name of the classifier.
        settings: its thresholds, where not the defaults.
    """

    name: str
    profile: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classify(self) -> Callable[[HeadProfile], Classification]:
        """The classifier with its thresholds."""
        return partial(find_classifier(self.method), **self.settings)


WAYS = {
    "ablation": Way("ablation", "ablation", "ablation"),
    "head_forcing": Way("head_forcing", "trained", "head_forcing"),
    "head_forcing_long": Way("head_forcing, long videos", "long", "head_forcing"),
    "pyramid_forcing": Way("pyramid_forcing", "trained", "pyramid_forcing"),
    "mass_ratio": Way("mass_ratio", "trained", "mass_ratio"),
    "output_regret": Way("output_regret", "trained", "output_regret"),
    "output_regret_long": Way("output_regret, long videos", "long", "output_regret"),
}


def measure(videos: int, folder: Path, console: Console) -> dict[str, HeadProfile]:
    """The three profiles, kept in a folder; one that lies there is read, whatever it was measured with."""
    model = demo_model()
    makers = {
        "trained": lambda: profile_demo(model, videos=videos),
        "long": lambda: profile_demo(model, videos=max(videos // 2, 2), long=True),
        "ablation": lambda: ablate_demo(model, videos=videos * 2),
    }
    found = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in makers.items():
        path = folder / f"{name}.safetensors"
        if not path.exists():
            console.log(f"measuring: {name}")
            make().save(path)
        found[name] = HeadProfile.load(path)
    return found


def reports(profiles: Mapping[str, HeadProfile], console: Console) -> dict[str, StabilityReport]:
    """A stability report for every way."""
    found = {}
    for key, way in WAYS.items():
        found[key] = stability(profiles[way.profile], way.classify, draws=STABILITY_DRAWS)
        console.log(f"{way.name}: {found[key]}")
    return found


def thresholds(profile: HeadProfile) -> dict[str, dict[str, Any]]:
    """What ablation says for other errors that are allowed, and how stable that is."""
    found = {}
    for error in THRESHOLDS:
        way = Way("ablation", "ablation", "ablation", {"error": error})
        report = stability(profile, way.classify, draws=STABILITY_DRAWS)
        kappa = None if report.halves is None else report.halves.kappa
        counts = {name: count for name, count in way.classify(profile).counts().items() if count}
        found[str(error)] = {"counts": counts, "kappa": kappa, "stable": report.stable}
    return found


def contest(
    found: Mapping[str, Classification], profiles: Mapping[str, HeadProfile]
) -> dict[str, list[Policy]]:
    """The policies of equal bytes by key; the draws of a random control stand in one list."""
    facts = profiles["trained"].facts.model
    total = KEPT * facts.layers * facts.heads

    def policy(name: str, labels: Classification) -> Policy:
        return Policy(name, at_budget(labels, facts, total))

    policies: dict[str, list[Policy]] = {}
    for key, way in WAYS.items():
        labels = found[key]
        if way.method == "output_regret":
            labels = within_budget(way.classify, profiles[way.profile], total)
        policies[key] = [policy(way.name, labels)]
    for key in CONTROLLED:
        labels, name = found[key], WAYS[key].name
        for control in (controls.random, controls.shuffled_within_layer):
            drawn = [control(labels, seed) for seed in range(DRAWS)]
            told = control.__name__.replace("_", " ")
            policies[f"{control.__name__} {key}"] = [policy(f"{name}, {told}", one) for one in drawn]
        policies[f"inverted {key}"] = [policy(f"{name}, inverted", controls.inverted(labels))]
    alike = Memory(CHUNK, KEPT - 2 * CHUNK, CHUNK)
    policies["all_one"] = [Policy("all one: every head a memory", RoleMap.uniform(alike, *_shape(facts)))]
    plain = SlidingWindow(KEPT + CHUNK, sink=CHUNK, positions="compact")
    policies["streaming"] = [Policy("all one: sink + recent", RoleMap.uniform(plain, *_shape(facts)))]
    return policies


def reads_far(roles: Any) -> list[list[str]]:
    """Of a role map, which heads store frames from between the first and the last ones."""
    return [["far" if isinstance(role, Memory) else "near" for role in row] for row in roles.layers]


def as_published(found: Mapping[str, Classification]) -> dict[str, list[Policy]]:
    """Pyramid Forcing's labels with its own roles, which come in one size, and on random heads."""
    labels = found["pyramid_forcing"]
    draws = [controls.random(labels, seed) for seed in range(DRAWS)]
    name = "pyramid_forcing, its own roles"
    return {
        "own": [Policy(name, pyramid_forcing(labels.labels))],
        "own, random": [Policy(f"{name}, random", pyramid_forcing(draw.labels)) for draw in draws],
    }


def compete(
    groups: Mapping[str, Mapping[str, Sequence[Policy]]], given: argparse.Namespace, console: Console
) -> dict[str, dict[str, Any]]:
    """Records by group of policies and key."""
    seeds = REPORT_SEEDS[: given.seeds]
    by_group = {group: jobs_of(policies, "pan", seeds, given) for group, policies in groups.items()}
    records = iter(evaluate_all([job for jobs in by_group.values() for job in jobs], given, console))
    by_key = {group: by_camera(jobs, list(islice(records, len(jobs)))) for group, jobs in by_group.items()}
    return {group: found["pan"] for group, found in by_key.items()}


def save(found: Classification, profile: HeadProfile, report: StabilityReport) -> RoleMap:
    """The map that the demo uses, with the numbers that `quality.py --tune` chose; and its stability."""
    notes = {
        "measured_on": "scenes as in training with drifted context; error on returning latents",
        "numbers": f"{CHOSEN}, chosen on seeds {TUNE_SEEDS[0]} to {TUNE_SEEDS[-1]}",
    }
    kinds = tuple(tuple(kind_of(found.roles[label]) for label in row) for row in found.labels)
    named = dataclasses.replace(found, labels=kinds, roles=NUMBERS[CHOSEN])
    roles = measured_map(named, profile, stability=report.summary(), notes=notes, seeds=[3000])
    roles.save(DEMO / "roles.json")
    report.save(DEMO / "stability.json")
    return roles


def main() -> None:
    """See the module."""
    parser, console = arguments("Ways to find head roles, at equal bytes.", "role-maps.md", 6), Console()
    parser.add_argument("--videos", type=int, default=32, help="measured inside the trained range")
    parser.add_argument("--save", action="store_true", help="write headforcing/demo/{roles,stability}.json")
    parser.add_argument("--save-only", action="store_true", help="and stop")
    parser.add_argument("--profiles", type=Path, help="keep profiles here, and read those that are here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as nowhere:
        profiles = measure(given.videos, given.profiles or Path(nowhere), console)
    found = {key: way.classify(profiles[way.profile]) for key, way in WAYS.items()}
    if given.save or given.save_only:
        way = WAYS[SHIPPED]
        report = stability(profiles[way.profile], way.classify, draws=STABILITY_DRAWS)
        console.print(save(found[SHIPPED], profiles[way.profile], report).to_json())
        if given.save_only:
            return
    groups = {"equal": contest(found, profiles), "published": as_published(found)}
    scenarios = compete(groups, given, console)
    far = {key: reads_far(groups["equal"][key][0].roles) for key in WAYS}
    judged = reports(profiles, console)
    results = {
        "frames": given.chunks * CHUNK,
        "kept": KEPT,
        "seeds": [REPORT_SEEDS[0], REPORT_SEEDS[given.seeds - 1]],
        "trained_frames": profiles["trained"].facts.model.window,
        "long_frames": LONG_CHUNKS * CHUNK,
        "draws": len(shares_of(REPORT_SEEDS[: given.seeds], DRAWS)),
        "videos": {name: len(profile.prompt.unique()) for name, profile in profiles.items()},
        "hashes": {name: profile.hash for name, profile in profiles.items()},
        "torch": torch.__version__,
        "ways": {key: {"name": way.name, "profile": way.profile} for key, way in WAYS.items()},
        "labels": {key: labels.labels for key, labels in found.items()},
        "counts": {key: labels.counts() for key, labels in found.items()},
        "stability": {key: report.to_dict() for key, report in judged.items()},
        "nmi": {a: {b: compare_labels(found[a].labels, found[b].labels).nmi for b in WAYS} for a in WAYS},
        "kappa": {key: compare_labels(far[SHIPPED], far[key]).kappa for key in WAYS},
        "thresholds": thresholds(profiles["ablation"]),
        "scenarios": scenarios,
    }
    data = given.out.parent / "data" / f"{given.out.stem}.json"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    names = {key: way.name for key, way in WAYS.items()}
    pictures = draw_pictures(given.out.parent / "assets", found, profiles, names)
    given.out.write_text(page(json.loads(data.read_text("utf-8")), data.name, pictures), encoding="utf-8")
    console.print(f"wrote {given.out} and {data}")


def _shape(facts: Any) -> tuple[int, int]:
    return facts.layers, facts.heads


if __name__ == "__main__":
    main()
