"""Turns what `role_maps.py` found into a page and its pictures; intervals decide every judgement."""

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
from headforcing.measure.stability_report import StabilityReport

INTRO = """# Role maps of the demo model

<!-- Written by benchmarks/role_maps.py; do not edit. -->

Which heads need which memory can be measured in many ways. Here every way that the library knows labels
the 24 heads of the demo model; every map says how stable it is; and every map, and its controls, continue
the same scenes from the same noise **with the same number of frames in all**, so that only *where* memory
goes differs. `python benchmarks/role_maps.py` makes this page again; numbers behind it:
[{data}](data/{data}).

* **ablation** (ours): one head at a time keeps only the last chunk, or the first and the last; the error of
  the *model* decides. {ablation} videos of {trained_frames} frames.
* **head_forcing** ([arXiv:2605.14487](https://arxiv.org/abs/2605.14487); rule known third-hand): ranks heads
  by attention mass on the first frame, then on the own chunk. Measured on {trained} videos inside the trained
  range; *long videos*: on {long} videos of {long_frames} frames.
* **pyramid_forcing** ([2605.13111](https://arxiv.org/abs/2605.13111)): sign and period of the logits. Here
  only its labels: its own roles come in one size, so its anchors and waves get memories spread evenly over
  the past, its veils the first and last frames.
* **mass_ratio** ([2605.09681](https://arxiv.org/abs/2605.09681), Forcing-KV's statistic, labels only).
* **output_regret** (ours): the cheapest role that changes the output *of the head* little.

Controls have as many heads of every role: **random** anywhere, **shuffled** inside every layer, **inverted**:
the least memory for those that need the most; **all one**: the same for every head.
"""

LIMITS = """## What this does not show

* One small model, one training run, a synthetic world: [What the demo model shows](demo-results.md) has the
  limits, and what the numbers mean.
* Equal bytes decide who is compared with whom: rules that label many heads memory have little for each.
* Labels are compared with our roles in the numbers of this page, not with the published configurations.
* A shuffle inside a layer of four heads leaves a single label in place one time in four; draws are listed.
* Intervals are over videos, not corrected for the number of comparisons; random controls are means over
  {draws} draws.
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
        f"![Head maps by way of measuring]({pictures['maps']})",
        _counts(results),
        _memories(results),
        "Normalised mutual information between the maps (1: the same, 0: unrelated):",
        _nmi(results),
        "## How stable they are",
        _stability(results),
        f"![Stability of the map by ablation]({pictures['stability']})",
        _thresholds(results),
        "## Where the heads look",
        f"![Attention mass by role]({pictures['mass']})",
    ]
    equal = {kept: cameras for kept, cameras in results["scenarios"].items() if kept != "published"}
    for kept, cameras in equal.items():
        parts += [f"## {kept} frames per head", _quality(results, kept, cameras)]
    parts += ["## Pyramid Forcing with its own roles", _published(results["scenarios"])]
    parts += [LIMITS.format(draws=results["draws"])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _counts(results: Mapping[str, Any]) -> str:
    rows = [["way", "heads per role"]]
    for key, counts in results["counts"].items():
        told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        rows.append([results["ways"][key]["name"], told])
    return markdown_table(rows)


def _thresholds(results: Mapping[str, Any]) -> str:
    """The choice that was made for ablation, and what the others would have been."""
    rows = [["error allowed", "heads per role", "halves of the prompts", "verdict"]]
    for error, found in results["thresholds"].items():
        told = ", ".join(f"{count} {name}" for name, count in found["counts"].items())
        kappa = "–" if found["kappa"] is None else f"{found['kappa']:.2f}"
        rows.append([f"{float(error):.0%}", told, kappa, "stable" if found["stable"] else "no stable map"])
    return (
        "The error that ablation allows was chosen on these profiles, after looking: 5 % is where the map "
        "is stable. With less, single heads come and go with the videos.\n\n" + markdown_table(rows)
    )


def _memories(results: Mapping[str, Any]) -> str:
    """What the other ways call the heads that ablation makes memories."""
    labels, ways = results["labels"], results["ways"]
    told = []
    for layer, row in enumerate(labels["ablation"]):
        for head, label in enumerate(row):
            if label.startswith("memory"):
                others = [
                    f"{labels[key][layer][head]} ({ways[key]['name']})" for key in ways if key != "ablation"
                ]
                told.append(
                    f"Layer {layer}, head {head} is a memory by ablation; elsewhere: {', '.join(others)}."
                )
    return " ".join(told)


def _nmi(results: Mapping[str, Any]) -> str:
    ways = results["ways"]
    rows = [["", *[ways[key]["name"] for key in ways]]]
    for a, row in results["nmi"].items():
        rows.append([ways[a]["name"], *[f"{row[b]:.2f}" for b in ways]])
    return markdown_table(rows, right=True)


def _stability(results: Mapping[str, Any]) -> str:
    head = [
        "way",
        "halves of the prompts",
        "chunks",
        "denoise steps",
        "prompts needed",
        "by depth",
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
        "Cohen's kappa between maps from other halves of the prompts, other chunks, other denoise steps; the "
        "smallest number of prompts from which disjoint sets agree with a kappa of 0.8; and the share of "
        f"each role that the layer alone explains (eta squared; chance is {chance:.2f}).\n\n"
        f"{markdown_table(rows)}"
    )


def _quality(results: Mapping[str, Any], kept: str, cameras: Mapping[str, Any]) -> str:
    ways = results["ways"]
    parts = [
        f"{kept} frames beside the own chunk, mean over the heads; {results['frames']} frames, seeds "
        f"{results['seeds'][0]} to {results['seeds'][1]}. Late PSNR of the background in dB; the difference "
        "is ablation minus the row, paired by video, with its 95 % bootstrap interval; bold: excludes 0."
    ]
    head = ["map", "MB"]
    for camera in cameras:
        head += [f"{camera}: late", f"{camera}: difference"]
    rows = [head]
    for key in next(iter(cameras.values())):
        record = cameras[next(iter(cameras))][key]
        row = [record["name"], f"{record['bytes'] / 1e6:.2f}"]
        for records in cameras.values():
            late = bootstrap_interval(values_of(records[key], "psnr_late"))
            ours = values_of(records["ablation"], "psnr_late")
            paired = paired_difference(ours, values_of(records[key], "psnr_late"))
            row += [f"{late.mean:.1f} [{late.low:.1f}, {late.high:.1f}]"]
            row += ["" if key == "ablation" else difference(paired)]
        rows.append(row)
    parts.append(markdown_table(rows, right=True))
    for camera, records in cameras.items():
        parts.append(_controls(records, ways, camera))
    return "\n\n".join(part for part in parts if part)


def _published(scenarios: Mapping[str, Any]) -> str:
    """The published roles on the labels of this model, not at equal bytes."""
    text = (
        "Its labels by our classifier, with the roles of its released configuration "
        "(`headforcing.roles.pyramid_forcing`), which keep more than they read: not at equal bytes. "
        "Frames: attended, own chunk included. The difference is ablation at 4 frames minus the row."
    )
    rows = [["map", "frames", "MB", "still: late", "still: difference", "pan: late", "pan: difference"]]
    for key in scenarios["published"]["still"]:
        records = {camera: found[key] for camera, found in scenarios["published"].items()}
        first = records["still"]
        row = [first["name"], f"{first['attended_frames']:.1f}", f"{first['bytes'] / 1e6:.2f}"]
        for camera in ("still", "pan"):
            values = values_of(records[camera], "psnr_late")
            late = bootstrap_interval(values)
            ours = values_of(scenarios["4"][camera]["ablation"], "psnr_late")
            row += [f"{late.mean:.1f} [{late.low:.1f}, {late.high:.1f}]"]
            row += [difference(paired_difference(ours, values))]
        rows.append(row)
    return f"{text}\n\n{markdown_table(rows, right=True)}"


def _controls(records: Mapping[str, Any], ways: Mapping[str, Any], camera: str) -> str:
    """Whether the labels of a way are worth more than where its controls put them."""
    told = []
    for key in ways:
        said = []
        for kind in ("random", "shuffled_within_layer", "inverted"):
            if f"{kind} {key}" in records:
                control = records[f"{kind} {key}"]
                found = paired_difference(
                    values_of(records[key], "psnr_late"), values_of(control, "psnr_late")
                )
                word = (
                    "not told apart from"
                    if not decided(found)
                    else "ahead of"
                    if found.mean > 0
                    else "behind"
                )
                name = kind.replace("_", " ")
                draws = control.get("psnr_late_of_draws")
                each = f"; each draw: {', '.join(f'{value:.1f}' for value in draws)}" if draws else ""
                said.append(f"{word} {name} ({found.mean:+.1f}{each})")
        if said:
            late = mean_of(records[key], "psnr_late")
            told.append(f"* *{camera}*, {ways[key]['name']} ({late} dB): {', '.join(said)}.")
    return "\n".join(told)


def draw_pictures(
    folder: Path,
    found: Mapping[str, Classification],
    profiles: Mapping[str, HeadProfile],
    judged: Mapping[str, StabilityReport],
    names: Mapping[str, str],
) -> dict[str, str]:
    """Writes the pictures; returns their places as the page links them."""
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
    stability = plots.stability_panels(judged["ablation"]).flat[0].figure
    places = {}
    for name, figure in {"maps": maps, "mass": mass, "stability": stability}.items():
        path = folder / f"role-maps-{name}.png"
        figure.savefig(path, bbox_inches="tight", facecolor="white")
        places[name] = f"{folder.name}/{path.name}"
    return places
