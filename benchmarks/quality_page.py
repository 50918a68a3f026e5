"""Turns the numbers of `quality.py` into a page; every verdict on it follows from an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from headforcing.demo.contest.intervals import Interval, bootstrap_interval, paired_difference

SCENARIOS = {
    "still": (
        "The camera stands still; the first chunk (3 frames) is given from the ground truth. The first half "
        "of the seeds, and fewer methods."
    ),
    "pan": (
        "The camera pans over a town three times as wide as the view, stops at its end for 6 frames, "
        "returns, and so on. The first 13 chunks (39 frames), one way through the town, are given."
    ),
}
ORDER = (
    *("window", "sink", "sink_most", "sink_small", "memory_all", "memory_middle", "memory_small"),
    *("local_all", "dense", "hf", "hf_default", "different", "no_episodic", "true_positions"),
    *("shuffled", "random"),
)
CLEAN = {"sink": ("sink_clean_9", "sink_clean_3"), "hf": ("hf_clean_9", "hf_clean_3")}
"""Methods, and the same with a smaller window in the clean pass."""
NO_DIFFERENCE = "no significant difference from"
MEASURES = {
    "psnr_late": "background, dB",
    "landmarks_all": "landmarks",
    "actors_late": "what moves",
}

INTRO = """# What the demo model shows

<!-- Written by benchmarks/quality.py; do not edit. -->

The demo model is trained on {trained} frames of a synthetic world. Here it generates {frames} frames,
{times:g} times as many, from the same scenes and the same noise with every method: seeds {first} to {last},
which were used neither to measure roles nor to choose their numbers. Data of this page:
[{data}](data/{data}). `python benchmarks/quality.py` reproduces both.

* **PSNR**: the town against the ground truth, in dB, where the given frames showed it, without what flies and
  drives. *Early*: the 18 frames after the given ones; *late*: the last {late}.
* **Landmarks**: share of the landmarks in full view that are the right one of 54, by kind and colour, in all
  generated frames; where the camera pans, only those that are back after more than {trained} frames.
* **Actors**: share of what should fly and drive in the late frames that has the right shape and colour.
  **Sharpness**: late differences between neighbouring pixels over those of the truth; below 1 is blurred.
* **Frames**: attended frames, current chunk included, mean over the heads. **MB** per video, counted from the
  tensors. Our store holds keys twice (before and after RoPE), so the same frames take 1.5 times the model's
  own cache.
* **Difference**: late PSNR of Head Forcing minus that of the row, mean over videos with the 95 % bootstrap
  interval of the paired difference. Bold: the interval excludes 0. Intervals are not corrected for the number
  of comparisons.
"""

CLEAN_TEXT = (
    "As in Commit Forcing: the clean pass, which writes the KV cache, attends to the newest frames only. "
    "Late PSNR, minus that of the same method without it."
)

LIMITS = """## What this does not show

* One model of 3.4 M parameters, one training run, a synthetic world of 72×48 pixels. Intervals cover videos,
  not training runs, and say nothing about large models.
* The prompt contains the camera position. Real models do not get it.
* Background PSNR requires a ground truth, which exists only here. It does not measure what people see.
* With 24 tokens per frame the length of the cache hardly changes the speed, so no speed is reported here.
* The numbers of the roles were chosen on other seeds of the same two scenarios.
* The labels (by ablation) and the numbers of the roles are ours: this is not a test of the paper's own
  configuration. Results of other labelling methods: [Role maps](role-maps.md).
"""


def page(results: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    settings = results["settings"]
    first, last = settings["seeds"]
    intro = INTRO.format(
        trained=settings["trained"],
        frames=settings["frames"],
        times=settings["frames"] / settings["trained"],
        late=settings["late"],
        first=first,
        last=last,
        data=settings["data"],
    )
    parts = [intro, "## Head Forcing here", _roles(results)]
    for camera, text in SCENARIOS.items():
        parts += [f"## Camera: {camera}", text, _table(results["scenarios"][camera])]
    parts += ["## The worst video", _worst(settings["worst"])]
    parts += ["## A smaller window in the clean pass", CLEAN_TEXT, _clean(results["scenarios"])]
    parts += ["## What the intervals show", _verdicts(results["scenarios"])]
    parts += ["## Which heads depend on their past", _pruning(results["pruning"]), LIMITS]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def markdown_table(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """A table whose first row is the head; `right`: all but the first column are aligned right."""
    rule = ["---", *["---:" if right else "---"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def values_of(record: Mapping[str, Any], measure: str) -> torch.Tensor:
    """A measure, one number per video."""
    return torch.tensor(record["measures"][measure], dtype=torch.float64)


def mean_of(record: Mapping[str, Any], measure: str, digits: int = 1) -> str:
    """Mean over the videos where it can be measured."""
    values = values_of(record, measure)
    return "–" if bool(values.isnan().all()) else f"{float(values.nanmean()):.{digits}f}"


def decided(found: Interval) -> bool:
    """Whether a difference is significant; a bootstrap of a few videos never is."""
    return found.excludes_zero and found.count >= 5


def difference(found: Interval, digits: int = 1) -> str:
    """A difference with its interval, bold if it is significant."""
    if not found.count:
        return "–"
    text = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if decided(found) else text


def _table(records: Mapping[str, Any]) -> str:
    rows = [
        ["method", "frames", "MB", "early", "late", "difference", "landmarks", "actors", "sharpness"],
    ]
    for key in (key for key in ORDER if key in records):
        record = records[key]
        late = bootstrap_interval(values_of(record, "psnr_late"))
        row = [record["name"], f"{record['attended_frames']:.1f}", f"{record['bytes'] / 1e6:.2f}"]
        row += [mean_of(record, "psnr_early"), f"{late.mean:.1f} [{late.low:.1f}, {late.high:.1f}]"]
        paired = paired_difference(values_of(records["hf"], "psnr_late"), values_of(record, "psnr_late"))
        row += ["" if key == "hf" else difference(paired)]
        row += [mean_of(record, name, 2) for name in ("landmarks_all", "actors_late", "sharpness_late")]
        rows.append(row)
    draws = [
        f"{name}: {', '.join(f'{value:.1f}' for value in records[name]['draws'])} dB"
        for name in ("shuffled", "random")
        if name in records
    ]
    note = "Every draw of a random control makes its share of the videos; late PSNR of each: "
    return f"{markdown_table(rows, right=True)}\n\n{note}{'; '.join(draws)}."


def _worst(found: Mapping[str, Any]) -> str:
    """The video of the panning camera that Head Forcing made worst."""
    return (
        f"Of all seeds, {found['seed']} has the lowest PSNR over all generated frames with Head Forcing:\n\n"
        f"![Truth, own window and Head Forcing of seed {found['seed']}]({found['picture']})"
    )


def _clean(scenarios: Mapping[str, Any]) -> str:
    """What a smaller window in the clean pass changes."""
    rows = [["method", *scenarios]]
    for base, narrow in CLEAN.items():
        for key in narrow:
            row = [scenarios["pan"][key]["name"]]
            for records in scenarios.values():
                pair = (values_of(records[one], "psnr_late") for one in (key, base))
                row.append(difference(paired_difference(*pair)))
            rows.append(row)
    return markdown_table(rows, right=True)


def _verdicts(scenarios: Mapping[str, Any]) -> str:
    """Which methods Head Forcing is better than, worse than, or not significantly different from."""
    lines = []
    for measure, unit in MEASURES.items():
        for camera, records in scenarios.items():
            groups: dict[str, list[str]] = {"better than": [], "worse than": [], NO_DIFFERENCE: []}
            for key in (key for key in ORDER if key in records):
                found = paired_difference(values_of(records["hf"], measure), values_of(records[key], measure))
                if key == "hf" or not found.count:
                    continue
                word = NO_DIFFERENCE
                if decided(found):
                    word = "better than" if found.mean > 0 else "worse than"
                groups[word].append(
                    f"{records[key]['name']} ({found.mean:+.{1 if 'psnr' in measure else 2}f})"
                )
            said = "; ".join(f"{word}: {', '.join(names)}" for word, names in groups.items() if names)
            lines += [f"* *{camera}, {unit}*: {said}."] if said else []
    return "Head Forcing is\n\n" + "\n".join(lines)


def _roles(results: Mapping[str, Any]) -> str:
    """The roles that are applied."""
    settings = results["settings"]
    roles = "\n".join(f"* {count} heads `{role}`" for role, count in settings["roles"].items())
    return (
        f"The role map of the package, measured by {settings['method']} (see [Role maps]"
        f"(role-maps.md)), content hash `{settings['map'][:19]}…`:\n\n{roles}\n\n"
        "The numbers were chosen on seeds 5000 to 5007 where the camera pans, for the best PSNR of all "
        "generated frames, and of two that were equal for the better end; "
        "`python benchmarks/quality.py --tune` compares them."
    )


def _pruning(pruning: Mapping[str, Any]) -> str:
    """The pruning table and its verdict."""
    labels = list(next(iter(pruning.values())))
    rows = [["all heads of this role lose", *labels]]
    for cut, found in pruning.items():
        rows.append([cut, *[f"{found[label][0]:+.0f} % / {found[label][1]:+.0f} %" for label in labels]])
    table = markdown_table(rows, right=True)
    middle = pruning["all but the first and the last chunk"]["memory"]
    word = "count" if middle[1] > 10 else "do not count"
    return (
        "Inside the trained range, with drifted context as in training: increase of the squared error on "
        "latents that were visible before / on those among them that the last chunk did not show. "
        "These are other videos than those that decided the labels.\n\n"
        f"{table}\n\nIf all memory heads lose the frames between the first and the last chunk, the error "
        f"grows by {middle[1]:.0f} % on returning latents ({middle[0]:.0f} % on all visible before): "
        f"they {word} as memory heads by the criterion of 10 % that was set beforehand."
    )
