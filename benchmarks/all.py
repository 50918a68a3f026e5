"""Runs every benchmark of speed and memory into one folder: JSON, pictures, and `report.md` with the tables.

    python benchmarks/all.py                        # on a CUDA machine: 7 minutes and a case in progress
    python benchmarks/all.py --backends sdpa flash  # a run of attention and transformer per backend
    python benchmarks/all.py --quick --device cpu   # tiny, to see that everything runs

Every part has its share of the time and begins nothing more when it is over; what it leaves out is in the
report. When the time of all is over no part is begun, and the one in progress has `GRACE` minutes to end.
Only attention and transformer are run once per backend: presets and length with the first one, calls with
`sdpa`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tables
import torch
from measuring import machine, prepare, write

HERE = Path(__file__).parent
ON_CUDA = {
    "attention": ["--grids", "30x52", "45x80", "--dtypes", "bfloat16"],
    "presets": ["--presets", "--grids", "30x52", "--dtypes", "bfloat16", "--repeats", "8"],
    "transformer": [],
    "length": ["--dtype", "bfloat16", "--grid", "30x52", "--chunks", "300"],
    "calls": ["--grid", "30x52", "--dtypes", "bfloat16"],
}
ON_CPU: dict[str, list[str]] = {
    "attention": ["--grids", "15x26"],
    "presets": ["--presets", "--grids", "16x24", "--repeats", "8"],
    "transformer": ["--models", "wan-1.3b", "--grids", "16x24", "--dtypes", "float32", "--layers", "1"],
    "length": [],
    "calls": [],
}
SHARE = {"transformer": 0.5, "attention": 0.2, "presets": 0.15, "length": 0.1, "calls": 0.05}
"""Of the time that there is, first things first; what one does not need goes to those behind it."""
REPEATED = ("transformer", "attention")
"""Parts that are run once per backend."""
NOT_BEGUN = "was not begun: no time was left"
GRACE = 3.0
"""Minutes that a part may take beyond its share, for the case that it is in the middle of."""


@dataclass(frozen=True)
class Part:
    """One run of one benchmark.

    Attributes:
        name: of its files.
        script: which benchmark.
        options: what it is given.
        share: of the time that it has, in proportion to the others.
    """

    name: str
    script: str
    options: tuple[str, ...]
    share: float


def parts(args: argparse.Namespace) -> list[Part]:
    """What is run, in order."""
    options = ON_CPU if args.device == "cpu" else ON_CUDA
    found = []
    for name, share in SHARE.items():
        script = "attention" if name == "presets" else name
        backends = args.backends if name in REPEATED else args.backends[:1]
        backends = ["sdpa"] if name == "calls" else backends  # others would copy keys in one of its two ways
        for backend in backends:
            told = [*options[name], "--device", args.device, "--store", args.store, "--backend", backend]
            told += ["--quick"] if args.quick else []
            told += ["--threads", str(args.threads)] if args.threads else []
            title = name if len(backends) == 1 else f"{name}-{backend}"
            found.append(Part(title, script, tuple(told), share / len(backends)))
    return found


def run(part: Part, minutes: float, folder: Path) -> dict[str, Any]:
    """What became of a part that has so many minutes to begin things; with none it is not begun."""
    out, began = folder / f"{part.name}.json", time.monotonic()
    out.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"{part.script}.py"), *part.options]
    command += ["--minutes", f"{minutes:g}", "--out", str(out)]
    ended = begun(command, minutes) if minutes > 0 else NOT_BEGUN
    return {
        "name": part.name,
        "command": " ".join([f"python benchmarks/{part.script}.py", *part.options]),
        "ended": ended,
        "seconds": time.monotonic() - began,
        "report": json.loads(out.read_text(encoding="utf-8")) if out.exists() else None,
    }


def begun(command: Sequence[str], minutes: float) -> str:
    """How a command ended that may take `GRACE` minutes more."""
    try:
        code = subprocess.run(command, check=False, timeout=60 * (minutes + GRACE)).returncode  # noqa: S603
        return "ended" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        return f"was stopped: not done {GRACE:g} minutes after its share of {minutes:.1f}"


def page(facts: dict[str, Any], done: Sequence[dict[str, Any]]) -> str:
    """The report."""
    blocks = ["# Benchmarks", tables.machine(facts)]
    for part in done:
        blocks += [f"## {part['name']}", f"`{part['command']}`: {part['ended']}, {part['seconds']:.0f} s."]
        report = part["report"]
        if report is None:
            continue
        if part["name"].startswith(("length", "calls")):
            blocks.append(tables.length(report) if "flat" in report else tables.calls(report))
            blocks += [f"* Not run: {reason}" for reason in report.get("left_out", [])]
            continue
        table = tables.transformer if part["name"].startswith("transformer") else tables.attention
        blocks += [table(found) for found in report["cases"]]
        blocks += [f"* Not run: {reason}" for reason in report["left_out"]]
    return "\n\n".join(blocks) + "\n"


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", default=["sdpa"], help="attention, by name")
    parser.add_argument("--store", default="ring", help="where keys and values live, by name")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all parts together")
    parser.add_argument("--threads", type=int, help="of the CPU; default: what torch chooses")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser.parse_args()


def main() -> None:
    """Runs the parts and writes the report, also where one of them fails; then the exit code is 1."""
    args = arguments()
    prepare(args.device, args.threads)
    facts, done = machine(args.device), []
    write(args.out / "machine.json", facts)
    began, todo = time.monotonic(), parts(args)
    for number, part in enumerate(todo):
        left = max(0.0, args.minutes - (time.monotonic() - began) / 60)
        share = part.share / sum(other.share for other in todo[number:])
        done.append(run(part, left * share, args.out))
        (args.out / "report.md").write_text(page(facts, done), encoding="utf-8")
    failed = [part["name"] for part in done if part["ended"] not in ("ended", NOT_BEGUN)]
    sys.stdout.write(f"written to {args.out / 'report.md'}\n")
    if failed:
        sys.exit(f"not all went well: {', '.join(failed)}")


if __name__ == "__main__":
    main()
