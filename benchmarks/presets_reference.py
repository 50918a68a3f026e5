"""Writes docs/presets.md from the presets themselves, or prints where the two differ.

python benchmarks/presets_reference.py
python benchmarks/presets_reference.py --check
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_page import markdown_table
from typer.testing import CliRunner

from headforcing.cli import app
from headforcing.roles.base import bounded
from headforcing.roles.maps.preset import Preset
from headforcing.roles.maps.presets import PRESETS, commit_forcing

PAGE = Path(__file__).resolve().parents[1] / "docs" / "presets.md"
LEFT_OUT = "Not taken over: "
PHASES = "[A smaller window in the clean pass](concepts.md#a-smaller-window-in-the-clean-pass)"
WIDTH = 110
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")

INTRO = """# Presets

<!-- Written by benchmarks/presets_reference.py; do not edit. -->

Published methods by name. How much each stores and attends to is counted on a real store, here for a model
of the size of Wan2.1 1.3B: a window of {window} latent frames, chunks of {chunk}, {tokens_per_frame} tokens
per frame. For your sizes:

```bash
headforcing presets --window 12 --grid 22x40
```

A preset that treats all heads alike goes by name, `apply_head_forcing(model, "memrope")`. The others need a
label for every head. Labels belong to a checkpoint: [import or measure them](measuring.md), then call
`headforcing.roles.maps.presets.PRESETS["pyramid_forcing"].labelled(labels, window, chunk)`. Results on the
demo model: [Presets on the demo](preset-results.md).

The sources publish their numbers for a window of {window} frames. At another window, a number that its source
ties to the window is multiplied by `window / {window}` and rounded down, to at least 1; a number that is tied
to a chunk follows the chunk, and all others stay. Below, each preset says which are which. At any window, no
query attends to more frames than the window, but for `full`, and no head stores more than the window and a
chunk, but for `full` and wave heads. A preset that would require more is refused with a `WindowError`.

Pass the window and the chunk of your model to `labelled`, or to `headforcing roles import`; a preset that
goes by name takes them from the model. On a model with a larger window, a map works and stores no more; on
one with a smaller window, a map whose numbers are beyond it is refused.

* **Stored**, **attended**: frames that a head stores, and frames that a query attends to in a noisy pass,
  both including the current chunk, once a video is long. If heads differ, it is the mean over the published
  numbers of heads.
* **Of window**: keys and values, as a share of the dense window of {window} frames. The `ring` store contains
  rotated keys as well: its share is the second number.
* **\\***: positions leave the range the model was trained on, as in the source.
"""

HEAD = ("preset", "source", "labels", "stored", "attended", "of window, in `ring`")
ROLE_HEAD = ("label", "heads", "role", "stored", "attended")


def page() -> str:
    """The page in Markdown."""
    found = json.loads(CliRunner().invoke(app, ["presets", "--json"]).stdout)
    rows: dict[str, Mapping[str, Any]] = {row["name"]: row for row in found["presets"]}
    model = found["model"]
    parts = [INTRO.format(**model)]
    parts.append(markdown_table([HEAD, *(_summary(PRESETS[name], row, model) for name, row in rows.items())]))
    parts += [_section(PRESETS[name], row, model) for name, row in rows.items()]
    said, *_ = (inspect.getdoc(commit_forcing) or "").splitlines()
    wrapper = (
        f"{said} `headforcing.roles.maps.presets.commit_forcing(role_map, window)` applies it to a map: "
        f"{PHASES}."
    )
    parts += ["## commit_forcing", _wrapped(wrapper)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _summary(preset: Preset, row: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    star = "" if all(map(bounded, _roles(preset, model).values())) else " \\*"
    share = "grows" if not row["labels"] else "?"
    if row["of_window"] is not None:
        share = f"{row['of_window']:.0%}, {row['ring_bytes'] / model['window_bytes']:.0%}"
    whole = "all" if not row["labels"] else "?"
    kept, seen = (_frames(row[name], whole) for name in ("stored", "attended"))
    name = f"[`{preset.name}`](#{preset.name}){star}"
    return [name, _linked(preset.source), ", ".join(row["labels"]) or "none", kept, seen, share]


def _section(preset: Preset, row: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The roles of a preset, which heads have them, and what is left out."""
    about, _, missing = _flat(inspect.getdoc(preset.roles)).partition(LEFT_OUT)
    roles = [
        [
            role["label"],
            "all" if not row["labels"] else "?" if role["heads"] is None else str(role["heads"]),
            f"`{role['role']}`",
            _frames(role["stored"]),
            _frames(role["attended"]),
        ]
        for role in row["roles"]
    ]
    facts = [f"* Source: {_linked(preset.source)}."]
    if preset.counted:
        facts.append(f"* Heads of Wan2.1 1.3B ({sum(preset.published.values())} known): {preset.counted}.")
    if preset.first_layer is not None:
        facts.append(f"* All heads of layer 0 are {preset.first_layer}, whatever their labels.")
    if preset.classifier is not None:
        facts.append(f"* Labels, measured: `headforcing roles classify --method {preset.classifier}`.")
    if preset.importer is not None:
        facts.append(f"* Labels, published: `headforcing roles import FILE --format {preset.importer}`.")
    if missing:
        facts.append(f"* Left out: {missing}")
    listed = "\n".join(_wrapped(fact, "  ") for fact in facts)
    return "\n\n".join([f"## {preset.name}", _wrapped(about), markdown_table([ROLE_HEAD, *roles]), listed])


def _roles(preset: Preset, model: Mapping[str, Any]) -> Mapping[str, Any]:
    return preset.roles(model["window"], model["chunk"])


def _frames(count: float | None, otherwise: str = "all") -> str:
    return otherwise if count is None else f"{count:.2f}".removesuffix(".00")


def _flat(text: str | None) -> str:
    return " ".join((text or "").split())


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _linked(source: str) -> str:
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def differences(said: str, page: str) -> list[str]:
    """Numbered lines that only the text has (-), and that only the page has (+)."""
    old, new, found = said.splitlines(), page.splitlines(), []
    for kind, first, last, start, stop in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if kind != "equal":
            found += [f"-{number + 1}: {old[number]}" for number in range(first, last)]
            found += [f"+{number + 1}: {new[number]}" for number in range(start, stop)]
    if not found and said != page:
        found.append(f"-{len(old)}: other line endings: expected one newline after each line, also the last")
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Writes the page, or compares; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="the page [default: docs/presets.md]")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 and the lines that differ")
    args = parser.parse_args(given)
    if not args.check:
        args.out.write_bytes(page().encode())
        return 0
    try:
        said = args.out.read_bytes().decode()
    except FileNotFoundError:
        parser.error(f"{args.out} does not exist: write it first, without --check")
    found = differences(said, page())
    if not found:
        return 0
    script = "python benchmarks/presets_reference.py"
    wrong = f"{args.out} differs from the presets; run: {script} --out {args.out}"
    sys.stdout.write("\n".join([wrong, *found, ""]))
    return 1


if __name__ == "__main__":
    sys.exit(main())
