"""Turns the numbers of `scenes.py` into a page; every verdict on it follows from an interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quality_page import difference, markdown_table, mean_of, values_of

from headforcing.demo.contest.intervals import bootstrap_interval, paired_difference
from headforcing.demo.scenes.run import WRONG

HERE = "Head Forcing"

INTRO = """# Scenes that return

<!-- Written by benchmarks/scenes.py; do not edit. -->

One video of {scenes} prompts on the demo model, **{names}**, {chunks} chunks each, {frames} frames in all:
two scenes return. A prompt names the light and what moves; the model invents the town, a new one in every
scene. So a returning scene can only look as before if some head still stores its frames. The modes
are explained in [Prompt switching](prompt-switching.md). Every mode and role map gets the same noise, seeds
{first} to {last}, one video each; the numbers of the roles were chosen on other scenarios. Data of this page:
[{data}](data/{data}). `python benchmarks/scenes.py` reproduces both; `headforcing scenes` makes one such
video.

* **Return**: correlation of the town of a returning scene with its first appearance. **Leak**: the same for
  scenes of different prompts, mean over all pairs: they should have nothing in common. **Distance**: return
  minus leak. Correlated are differences of neighbouring pixels in the landmarks' rows of the median over
  time; the first two chunks of a scene are not evaluated.
* **Within**: the same correlation between the two halves of one scene.
* **Actors**: share of what should fly and drive that has the right shape and colour; *at once*: in the first
  chunk of every scene except the first.
* **MB** per video at the end, marks included, counted from the tensors.
* In brackets: 95 % bootstrap intervals over the videos. *Difference*: distance of mode recall with the same
  map minus that of the row, paired by video, bold if the interval excludes 0. Not corrected for the number
  of comparisons.
"""

PICTURES = """![What the heads store in mode recall](assets/scenes-timeline.png)

*Mode recall, the first seed: after a cut no head stores an earlier frame; after a recall a memory head stores
the frames of the mark, and new frames replace some of them. Local heads recall nothing.*

![What a memory head stores in every mode](assets/scenes-modes.png)"""

CONTROLS = (
    "The same script with one role for all heads. What comes back at a recall depends on the role: all "
    "frames of a memory head, the first frames of a window with a sink, nothing of a local head. The smaller "
    "window has as many frames as Head Forcing has on average, current chunk included."
)

LIMITS = """## What this does not show

* One small model, one training run, a synthetic world, one script. The model was trained on videos of one
  town each; how a real model reacts to a cut, a smooth switch or a recall cannot be concluded from this.
* The prompt determines the light and what moves so strongly here that they follow it in every mode. In real
  models, traces of the old prompt in the KV cache are the problem that LongLive's KV recache solves; this
  page says nothing about it, nor about `recache`, which requires a base model that recomputes frames.
* How smooth a transition looks is not measured, except by the actors at once: if no head stores the last
  frames, a chunk starts from noise alone, as at the beginning of a video. With smooth and continue one may
  want the setting to stay: their leak is a fault only if the prompt asks for another place.
* A return is easy here: the camera stands still, and one scene fits into the memory of a head.
"""


def page(results: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    settings = results["settings"]
    first, last = settings["seeds"]
    intro = INTRO.format(
        scenes=len(settings["prompts"]),
        names=" ".join(settings["names"]),
        chunks=settings["chunks"],
        frames=settings["frames"],
        first=first,
        last=last,
        data=settings["data"],
    )
    records = {(record["map"], record["mode"]): record for record in results["records"]}
    roles = ", ".join(
        f"{count} {'head' if count == 1 else 'heads'} `{role}`" for role, count in settings["roles"].items()
    )
    parts = [
        intro,
        "## Head Forcing",
        f"The role map of the package: {roles}.",
        _table(records, HERE),
        _verdict(records),
        PICTURES,
        "## Other methods",
        CONTROLS,
    ]
    for name in dict.fromkeys(record["map"] for record in results["records"]):
        if name != HERE:
            parts += [f"### {name[0].upper()}{name[1:]}", _table(records, name)]
    return "\n\n".join(part.strip() for part in [*parts, LIMITS]) + "\n"


def _table(records: Mapping[tuple[str, str], Any], name: str) -> str:
    rows = [["mode", "return", "leak", "distance", "difference", "within", "actors", "at once", "MB"]]
    ours = records[name, "recall"]
    for (where, mode), record in records.items():
        if where != name:
            continue
        paired = paired_difference(values_of(ours, "distance"), values_of(record, "distance"))
        rows.append(
            [
                f"**{mode}**" if mode == "recall" else mode,
                _between(record, "returned"),
                _between(record, "leaked"),
                _between(record, "distance"),
                "" if mode == "recall" else difference(paired, 2),
                mean_of(record, "halves", 2),
                mean_of(record, "actors", 2),
                mean_of(record, "at_once", 2),
                f"{record['bytes'] / 1e6:.2f}",
            ]
        )
    return markdown_table(rows, right=True)


def _between(record: Mapping[str, Any], measure: str) -> str:
    found = bootstrap_interval(values_of(record, measure))
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _verdict(records: Mapping[tuple[str, str], Any]) -> str:
    """What the intervals show about Head Forcing's modes."""
    ours = records[HERE, "recall"]
    lines = []
    for name, measure in (("return", "returned"), ("leak", "leaked"), ("actors at once", "at_once")):
        said = []
        for mode in ("cut", "smooth", "continue", WRONG):
            found = paired_difference(values_of(ours, measure), values_of(records[HERE, mode], measure))
            said.append(f"{mode} {difference(found, 2)}")
        lines.append(f"* *{name}*, recall minus {'; '.join(said)}")
    gap = paired_difference(values_of(ours, "returned"), values_of(ours, "halves"))
    lines.append(f"* *recall*, return minus within {difference(gap, 3)}")
    return "Paired by video:\n\n" + "\n".join(lines)
