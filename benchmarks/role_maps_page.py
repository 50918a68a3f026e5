"""Turns the results of `role_maps.py` into a page and pictures; every verdict follows from an interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from quality_page import decided, difference, markdown_table, mean_of, values_of

from headforcing.demo.contest.intervals import bootstrap_interval, paired_difference
from headforcing.measure import plots
from headforcing.measure.classifiers import Classification
from headforcing.measure.profile import HeadProfile

INTRO = """# Role maps of the demo model

<!-- Written by benchmarks/role_maps.py; do not edit. -->

There are many ways to measure which head should get which role. Here every method in the library labels the
36 heads of the demo model. For every map, the page shows how stable it is, and compares videos made with it
and with its controls, from the same scenes and the same noise and **with the same number of frames in all**,
so that only the *distribution* of frames over the heads differs. `python benchmarks/role_maps.py` reproduces
this page; its data: [{data}](data/{data}).

* **ablation** (ours): one head at a time is restricted to the last chunk, or to the first and the last; the
  error of the *model* decides. {ablation} videos of {trained_frames} frames.
* **head_forcing** ([arXiv:2605.14487](https://arxiv.org/abs/2605.14487); the rule is known from a third
  party): ranks heads by attention mass on the first frame, then on the current chunk. Measured on {trained}
  videos inside the trained range; *long videos*: on {long} videos of {long_frames} frames.
* **pyramid_forcing** ([2605.13111](https://arxiv.org/abs/2605.13111)): sign and period of the logits. Only
  its labels are used here, because its own roles have one fixed size: its anchors and waves get memory roles
  with frames spread evenly over the past, its veils the first and last frames.
* **mass_ratio** ([2605.09681](https://arxiv.org/abs/2605.09681), Forcing-KV's statistic, labels only).
* **output_regret** (ours): the cheapest role that changes the output *of the head* little.

Controls have the same number of heads of every role: **random**: any heads; **shuffled**: within every layer;
**inverted**: the fewest frames for the heads that need the most; **all one**: the same role for every head.
"""

LIMITS = """## What this does not show

* One small model, one training run, a synthetic world: [What the demo model shows](demo-results.md) explains
  the limits and the numbers.
* All maps have equal bytes, so rules that label many heads as memory have few frames for each of them.
* Labels are compared using our roles with the numbers of this page, not the published configurations.
* Shuffling a layer of six heads leaves some labels in place; all draws are listed.
* Intervals are over videos, not corrected for the number of comparisons. Random controls have {draws} draws;
  every draw makes its share of the videos.
"""


def page(results: Mapping[str, Any], data: str, pictures: Mapping[str, str]) -> str:
    """The page in Markdown."""
    videos = results["videos"]
    parts = [
        INTRO.format(
            data=data,
            ablation=videos["ablation"],
            trained=videos["trained"],
            long=videos["long"],
            trained_frames=results["trained_frames"],
            long_frames=results["long_frames"],
        ),
        "## The maps",
        f"![Head maps by method]({pictures['maps']})",
        _counts(results),
        _memories(results),
        "Normalised mutual information between the maps (1: the same, 0: unrelated):",
        _nmi(results),
        "## How stable they are",
        _stability(results),
        _thresholds(results),
        "## Where the heads attend",
        f"![Attention mass by role]({pictures['mass']})",
    ]
    parts += ["## What each map is worth", _quality(results)]
    parts += ["## Pyramid Forcing with its own roles", _published(results["scenarios"])]
    parts += [LIMITS.format(draws=results["draws"])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _counts(results: Mapping[str, Any]) -> str:
    rows = [["method", "heads per role"]]
    for key, counts in results["counts"].items():
        told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        rows.append([results["ways"][key]["name"], told])
    return markdown_table(rows)


def _thresholds(results: Mapping[str, Any]) -> str:
    """The threshold chosen for ablation, and the alternatives."""
    rows = [["allowed error", "heads per role", "halves of the prompts", "verdict"]]
    for error, found in results["thresholds"].items():
        told = ", ".join(f"{count} {name}" for name, count in found["counts"].items())
        kappa = "–" if found["kappa"] is None else f"{found['kappa']:.2f}"
        rows.append([f"{float(error):.0%}", told, kappa, "stable" if found["stable"] else "no stable map"])
    return "The error that ablation allows, and the alternatives:\n\n" + markdown_table(rows)


def _memories(results: Mapping[str, Any]) -> str:
    """The labels that every method gives to the memory heads of ablation."""
    labels, ways = results["labels"], results["ways"]
    rows = [["memory head of ablation", *[way["name"] for key, way in ways.items() if key != "ablation"]]]
    for layer, row in enumerate(labels["ablation"]):
        for head, label in enumerate(row):
            if label.startswith("memory"):
                others = [labels[key][layer][head] for key in ways if key != "ablation"]
                rows.append([f"layer {layer}, head {head}", *others])
    return markdown_table(rows)


def _nmi(results: Mapping[str, Any]) -> str:
    ways = results["ways"]
    rows = [["", *[ways[key]["name"] for key in ways]]]
    for a, row in results["nmi"].items():
        rows.append([ways[a]["name"], *[f"{row[b]:.2f}" for b in ways]])
    return markdown_table(rows, right=True)


def _stability(results: Mapping[str, Any]) -> str:
    head = [
        "method",
        "halves of the prompts",
        "chunks",
        "denoise steps",
        "prompts needed",
        "explained by depth",
        "verdict",
    ]
    rows = [head]
    for key, report in results["stability"].items():
        lines = [report[name] for name in ("halves", "chunks", "steps")]
        told = ["–" if line is None else f"{line['kappa']:.2f}" for line in lines]
        depth = ", ".join(
            f"{name} {share:.2f}" for name, share in report["depth"].items() if share is not None
        )
        needed = report["prompts_needed"]
        verdict = "stable" if report["stable"] else f"no stable map ({len(report['boundary'])} heads unsure)"
        name = results["ways"][key]["name"]
        rows.append([name, *told, "not reached" if needed is None else str(needed), depth, verdict])
    chance = next(iter(results["stability"].values()))["depth_by_chance"]
    return (
        "Cohen's kappa between maps from different halves of the prompts, different chunks, different "
        "denoising steps; the smallest number of prompts for which disjoint sets agree with a kappa of 0.8; "
        f"and the share of each role that is explained by the layer alone (eta squared; chance is "
        f"{chance:.2f}).\n\n{markdown_table(rows)}"
    )


def _quality(results: Mapping[str, Any]) -> str:
    ways, records = results["ways"], results["scenarios"]["equal"]
    about = (
        f"The camera pans. {results['kept']} stored frames per head (current chunk excluded, mean); "
        f"{results['frames']} frames, seeds {results['seeds'][0]} to {results['seeds'][1]}. Late PSNR of the "
        "background in dB; the difference is ablation minus the row, paired by video, with its 95 % "
        "bootstrap interval; bold: it excludes 0. Kappa: agreement with ablation about which heads store "
        "frames from between the first and the last ones, beyond chance."
    )
    rows = [["map", "kappa", "MB", "late", "difference", "landmarks"]]
    ours = values_of(records["ablation"], "psnr_late")
    for key, record in records.items():
        values = values_of(record, "psnr_late")
        late, kappa = bootstrap_interval(values), results["kappa"].get(key)
        row = [record["name"], "" if kappa is None else f"{kappa:.2f}", f"{record['bytes'] / 1e6:.2f}"]
        row += [f"{late.mean:.1f} [{late.low:.1f}, {late.high:.1f}]"]
        row += ["" if key == "ablation" else difference(paired_difference(ours, values))]
        rows.append([*row, mean_of(record, "landmarks_all", 2)])
    return f"{about}\n\n{markdown_table(rows, right=True)}\n\n{_controls(records, ways)}"


def _published(scenarios: Mapping[str, Any]) -> str:
    """The published roles with the labels of this model, not at equal bytes."""
    text = (
        "Its labels by our classifier, with the roles of its released configuration "
        "(`headforcing.roles.pyramid_forcing`), which store more than they attend to: not at equal bytes. "
        "Frames: attended, current chunk included. The difference is ablation of the table above minus the "
        "row."
    )
    ours = values_of(scenarios["equal"]["ablation"], "psnr_late")
    rows = [["map", "frames", "MB", "late", "difference"]]
    for record in scenarios["published"].values():
        values = values_of(record, "psnr_late")
        late = bootstrap_interval(values)
        row = [record["name"], f"{record['attended_frames']:.1f}", f"{record['bytes'] / 1e6:.2f}"]
        row += [f"{late.mean:.1f} [{late.low:.1f}, {late.high:.1f}]"]
        rows.append([*row, difference(paired_difference(ours, values))])
    return f"{text}\n\n{markdown_table(rows, right=True)}"


def _controls(records: Mapping[str, Any], ways: Mapping[str, Any]) -> str:
    """Whether the labels of a method are better than its controls."""
    told = []
    for key in ways:
        said = []
        for kind in ("random", "shuffled_within_layer", "inverted"):
            if f"{kind} {key}" in records:
                control = records[f"{kind} {key}"]
                found = paired_difference(
                    values_of(records[key], "psnr_late"), values_of(control, "psnr_late")
                )
                word = "better than" if found.mean > 0 else "worse than"
                word = word if decided(found) else "no significant difference from"
                draws = ", ".join(f"{value:.1f}" for value in control["draws"])
                each = f"; each draw: {draws}" if len(control["draws"]) > 1 else ""
                said.append(f"{word} {kind.replace('_', ' ')} ({found.mean:+.1f}{each})")
        if said:
            late = mean_of(records[key], "psnr_late")
            told.append(f"* {ways[key]['name']} ({late} dB): {', '.join(said)}.")
    return "\n".join(told)


def draw_pictures(
    folder: Path,
    found: Mapping[str, Classification],
    profiles: Mapping[str, HeadProfile],
    names: Mapping[str, str],
) -> dict[str, str]:
    """Writes the pictures; returns their paths relative to the page."""
    folder.mkdir(parents=True, exist_ok=True)
    maps = Figure(figsize=(11, 5.2), dpi=110, layout="constrained")
    axes = maps.subplots(2, 4).flatten()
    for ax, (key, labels) in zip(axes, found.items(), strict=False):
        plots.head_map(labels, labels.margin, ax=ax, per_layer=False)
        ax.set_title(names[key], fontsize=10)
    for ax in axes[len(found) :]:
        ax.set_axis_off()
    mass = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    left, right = mass.subplots(1, 2, width_ratios=(1.5, 1))
    plots.mass_by_age(profiles["trained"], found["head_forcing"], ax=left)
    plots.mass_scatter(profiles["trained"], found["head_forcing"], ax=right)
    paths = {}
    for name, figure in {"maps": maps, "mass": mass}.items():
        path = folder / f"role-maps-{name}.png"
        figure.savefig(path, bbox_inches="tight", facecolor="white")
        paths[name] = f"{folder.name}/{path.name}"
    return paths
