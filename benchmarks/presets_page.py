"""Turns the numbers of `presets.py` into a page and a picture; every verdict follows from an interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from quality_page import SCENARIOS, decided, difference, markdown_table, mean_of, values_of

from headforcing.demo.contest.intervals import Interval, bootstrap_interval, paired_difference
from headforcing.measure.plots import style
from headforcing.roles.maps.presets import PRESETS

OWN = "demo map"
BASE = "sliding_window"
AGAINST = {
    "streaming": "StreamingLLM with as many frames",
    "sink": "its sink and the last frames, a window in all",
    "shuffled": "its roles shuffled in each layer",
    "random": "its roles on random heads",
}
MARKS = {
    "streaming": ("D", "#D55E00"),
    "sink": ("s", "#E69F00"),
    "shuffled": ("v", "#009E73"),
    "random": ("x", "#CC79A7"),
}
MEASURES = {
    "psnr_late": "late background, dB",
    "landmarks_all": "landmarks",
    "actors_late": "what moves",
}

INTRO = """# Presets on the demo model

<!-- Written by benchmarks/presets.py; do not edit. -->

Every preset on the demo model, which is trained on {trained} frames and generates {frames} here, {times:.1f}
times as many. Scenes and noise are the same for all: seeds {first} to {last}, those of
[What the demo model shows](demo-results.md), where the metrics are explained. The labels of presets with
several roles were measured on seeds {labels[0]} to {labels[1]} with the classifiers that the presets name
and their default thresholds; nothing was chosen on the videos of this page. Data of this page:
[{data}](data/{data}). `python benchmarks/presets.py` reproduces both.

* **Stored** and **attended**: frames that a head stores, and frames that a query attends to in a noisy pass,
  current chunk included, mean over the heads, once a video is long. **MB** of one video, counted from the
  tensors; our store holds keys twice, and for some roles copies of what each query frame attends to.
* **Late** and **early**: PSNR of the town in dB; 95 % bootstrap interval over videos.
* **Landmarks**: share that is right of those that are back after more than a window. **Actors** and
  **sharpness**: late; 1 is right.
* **Controls**: *StreamingLLM with as many frames*: the first and the last frames for all heads, as many as
  the preset attends to, rounded. *Sink*: if a preset has more first frames than a chunk, these and the last
  frames, {trained} in all, and no selected tokens; this control was added after seeing deep_forcing's
  results. *Shuffled*: its roles on other heads of the same layer; *random*: on any heads. There are {draws}
  draws each, and every draw makes its share of the videos, so that intervals include both sources of
  variation.
* A difference is the preset minus its control, paired by video; bold: its interval excludes 0. Intervals are
  not corrected for the number of comparisons.
* **\\***: its positions leave the range that the model was trained on, as in the source.
"""

LIMITS = """## What this does not show

* The presets were designed for models of 1.3 B parameters and more, and their numbers were chosen there. Here
  they run on 3.4 M parameters, 36 heads and a synthetic world of 72×48 pixels. A preset that does badly here
  may do well there, and the reverse: this page tests our implementation and its controls, not the papers.
* [Presets](presets.md) says what was left out of each source.
* Labels follow our reading of each rule; some sources label heads again in every video.
* Background PSNR rewards methods that store the start of a video. It does not measure what people see, and a
  frozen background scores as well as a live one: see actors.
* One model, one training run. Shuffling a layer of six heads leaves some heads with their own label.
* With 24 tokens per frame, nothing here is about speed: see [Speed](performance.md).
"""


def page(results: Mapping[str, Any], data: str, picture: str) -> str:
    """The page in Markdown."""
    settings = results["settings"]
    first, last = settings["seeds"]
    intro = INTRO.format(
        **{name: settings[name] for name in ("trained", "frames", "labels", "draws")},
        times=settings["frames"] / settings["trained"],
        first=first,
        last=last,
        data=data,
    )
    parts = [
        intro,
        "## In short",
        _short(results),
        f"![Late PSNR of every preset and of its controls](assets/{picture})",
    ]
    parts += ["## All of them", SCENARIOS["pan"], _table(results), _labelled(results)]
    parts += ["## What the intervals show", _verdicts(results), "## The roles", _roles(results)]
    return "\n\n".join(part.strip() for part in [*parts, LIMITS]) + "\n"


def draw(results: Mapping[str, Any]) -> Any:
    """Late PSNR of every preset with its interval, and its controls."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    records = results["records"]
    names = [one for one in (*results["entrants"], OWN) if one in records]
    figure = style.new_figure(6.9, 0.3 * len(names) + 1.2)
    ax = figure.subplots()
    for row, name in enumerate(names):
        found = bootstrap_interval(values_of(records[name], "psnr_late"))
        ax.plot([found.low, found.high], [row, row], color="#0072B2", lw=2.2, zorder=3)
        ax.plot([found.mean], [row], "o", color="#0072B2", ms=5, zorder=4)
        for kind, key in _controls(results, name).items():
            mark, colour = MARKS[kind]
            late = float(values_of(records[key], "psnr_late").nanmean())
            ax.plot([late], [row], mark, color=colour, ms=5, mew=1.4, zorder=2)
    ax.set(xlabel="late background PSNR, dB", ylim=(len(names) - 0.5, -0.5))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_yticks(range(len(names)), [_name(results, name).replace("\\*", "*") for name in names])
    style.dress(ax, grid="x")
    looks: list[Any] = [Line2D([], [], color="#0072B2", marker="o", ms=5, label="preset, 95 % interval")]
    for kind, (mark, colour) in MARKS.items():
        looks.append(Line2D([], [], ls="none", marker=mark, color=colour, ms=5, mew=1.4, label=AGAINST[kind]))
    size: Any = {"fontsize": style.TICK, "frameon": False, "handlelength": 1.6}
    figure.legend(handles=looks, loc="outside upper left", ncols=2, **size)
    return ax


def _controls(results: Mapping[str, Any], name: str) -> Mapping[str, str]:
    facts = results["entrants"].get(name)
    return {} if facts is None else facts["controls"]


def _name(results: Mapping[str, Any], name: str) -> str:
    facts = results["entrants"].get(name)
    return name if facts is None or facts["bounded"] else f"{name} \\*"


def _paired(records: Mapping[str, Any], name: str, key: str | None, measure: str = "psnr_late") -> Interval:
    """An entrant minus another one; an empty interval if there is none."""
    if key is None:
        return Interval(torch.nan, torch.nan, torch.nan, 0)
    return paired_difference(values_of(records[name], measure), values_of(records[key], measure))


def _late(record: Mapping[str, Any]) -> str:
    found = bootstrap_interval(values_of(record, "psnr_late"))
    return f"{found.mean:.1f} [{found.low:.1f}, {found.high:.1f}]"


def _table(results: Mapping[str, Any]) -> str:
    """Every preset, and StreamingLLM with as many frames."""
    records, frames = results["records"], results["settings"]["frames"]
    head = ["preset", "stored", "attended", "MB", "early", "late", "minus StreamingLLM"]
    rows = [[*head, "landmarks", "actors", "sharpness"]]
    for name in [*results["entrants"], OWN]:
        if name not in records:
            continue
        record, facts = records[name], results["entrants"].get(name, {})
        counts = [facts.get(key, record["attended_frames"]) for key in ("stored", "attended")]
        shown = [f"{frames if count is None else count:.1f}" for count in counts]
        row = [_name(results, name), *shown, f"{record['bytes'] / 1e6:.2f}"]
        row += [mean_of(record, "psnr_early"), _late(record)]
        key = _controls(results, name).get("streaming")
        row.append(difference(_paired(records, name, key)))
        rows.append(
            [*row, *(mean_of(record, name, 2) for name in ("landmarks_all", "actors_late", "sharpness_late"))]
        )
    note = f"`{OWN}` is the role map of the package, by ablation, with the videos of [Demo results]"
    return f"{markdown_table(rows, right=True)}\n\n" + (f"{note}(demo-results.md)." if OWN in records else "")


def _labelled(results: Mapping[str, Any]) -> str:
    """Presets with several roles, against the same roles on other heads."""
    records = results["records"]
    rows = [["preset", "late", "minus shuffled", "each draw", "minus random", "each draw"]]
    for name in results["entrants"]:
        keys = [_controls(results, name).get(kind) for kind in ("shuffled", "random")]
        if None in keys:
            continue
        row = [_name(results, name), _late(records[name])]
        for key in keys:
            draws = ", ".join(f"{one:.1f}" for one in records[key]["draws"])
            row += [difference(_paired(records, name, key)), draws]
        rows.append(row)
    head = "Labels against the same roles on other heads; the number of a draw is the mean over its videos:"
    return f"{head}\n\n{markdown_table(rows, right=True)}"


def _verdicts(results: Mapping[str, Any]) -> str:
    """Which presets are better or worse than their controls, or not significantly different."""
    lines, records = [], results["records"]
    for kind, told in {**AGAINST, BASE: f"`{BASE}`, what the unmodified model does"}.items():
        lines.append(f"Compared with {told}:\n")
        for measure, unit in MEASURES.items():
            groups: dict[str, list[str]] = {"better": [], "worse": [], "no significant difference": []}
            for name in results["entrants"]:
                key = kind if kind == BASE else _controls(results, name).get(kind)
                found = _paired(records, name, key, measure)
                if name == key or not found.count:
                    continue
                word = "better" if found.mean > 0 else "worse"
                digits = 1 if "psnr" in measure else 2
                said = f"{name} ({found.mean:+.{digits}f})"
                groups[word if decided(found) else "no significant difference"].append(said)
            said = "; ".join(f"{word}: {', '.join(names)}" for word, names in groups.items() if names)
            lines += [f"* *{unit}*: {said}."]
        lines.append("")
    return "\n".join(lines)


def _short(results: Mapping[str, Any]) -> str:
    """Which presets are better or worse than a control in late PSNR; from the intervals alone."""
    lines = []
    for kind, told in AGAINST.items():
        names = {name: _controls(results, name).get(kind) for name in results["entrants"]}
        paired = {name: _paired(results["records"], name, key) for name, key in names.items()}
        found = {name: one for name, one in paired.items() if one.count}
        better, worse = (
            ", ".join(
                f"{name} ({one.mean:+.1f} dB)" for name, one in found.items() if decided(one) and side(one)
            )
            for side in (lambda one: one.mean > 0, lambda one: one.mean < 0)
        )
        said = f"better: {better or 'none'}; worse: {worse or 'none'}; of {len(found)}"
        lines.append(f"* Compared with {told}: {said}.")
    return "\n".join(lines)


def _roles(results: Mapping[str, Any]) -> str:
    rows = [["preset", "source", "roles on the demo model"]]
    for name, facts in results["entrants"].items():
        roles = "; ".join(f"{count} × `{role}`" for role, count in facts["roles"].items())
        rows.append([name, PRESETS[name].source, roles])
    return markdown_table(rows)
