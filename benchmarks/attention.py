"""How long head-forced attention takes beside dense attention, and how far that is from ideal.

Both sides are the same self-attention module with Self Forcing's rolling cache: once as it is, once
head-forced. Projections and norms are excluded on both sides (they return prepared tensors); RoPE,
the cache, its eviction and softmax attention are included. A sample is a whole chunk in steady state:
4 denoise passes and the commit pass. The variants take turns pass by pass, so that whatever else
the machine does falls on all of them. See README.md in this folder.

    python benchmarks/attention.py --quick
    python benchmarks/attention.py --grids 30x52 --dtypes float32 --profile --out runs/bench/attention.json
    python benchmarks/attention.py --presets --grids 16x24 --repeats 8 --threads 1
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from measuring import (
    CHUNK,
    CLOCKS,
    PASSES,
    WINDOW,
    Case,
    Chunks,
    Deadline,
    best,
    common_arguments,
    measure,
    median,
    prepare,
    without_softmax_attention,
)
from mixes import plain_mixes, preset_mixes
from phases import phases, show_phases
from reporting import report_cases
from rich.console import Console
from rich.table import Table
from variant import SCOPE, WARM_UP, Variant, facts_of, fill

from headforcing.cli.amounts import parse_grid

TARGET = 1.2


def variants(case: Case, args: argparse.Namespace, options: dict[str, Any]) -> list[Variant]:
    """Dense attention first, then what is compared to it, and what must equal it last."""
    mixes = preset_mixes if args.presets else plain_mixes
    return [Variant(mix.name, mix.roles, case, args.backend, options) for mix in mixes(case, args.contiguous)]


def filled(case: Case, args: argparse.Namespace, options: dict[str, Any]) -> list[Variant]:
    """The same, with every memory full."""
    chosen = variants(case, args, options)
    fill(chosen)
    return chosen


def agreement(chosen: Sequence[Variant]) -> float:
    """Largest difference between dense attention and the variant that must equal it."""
    dense, identity = (variant.run(0).float() for variant in (chosen[0], chosen[-1]))
    return float((dense - identity).abs().max())


def summary(
    chosen: Sequence[Variant], taken: Sequence[Chunks], rest: Sequence[Chunks], store: str
) -> list[dict[str, Any]]:
    """One row per variant, everything relative to dense attention."""
    rows = []
    for variant, chunks, others in zip(chosen, taken, rest, strict=True):
        ideal = variant.attended / variant.case.window
        row: dict[str, Any] = {"variant": variant.name, "frames": variant.attended, "ideal": ideal}
        row |= facts_of(variant, store)
        for clock in CLOCKS:
            for how in (best, median):
                seconds, dense = how(chunks, clock, variant.cycle), how(taken[0], clock)
                key = f"{how.__name__}_{clock}"
                row |= {key: seconds, f"{key}_ratio": seconds / dense}
                row[f"{key}_over_ideal"] = seconds / dense / ideal
        row["rest_wall"], row["rest_cpu"] = (
            best(others, "wall", variant.cycle),
            best(others, "cpu", variant.cycle),
        )
        row["stored_bytes"] = variant.stored
        row["roles"] = [str(role) for role in variant.roles]
        row["passes"] = [[sample.wall for sample in chunk] for chunk in chunks]
        rows.append(row)
    return rows


def show(console: Console, found: dict[str, Any]) -> None:
    """The table of one case."""
    rows = found["rows"]
    table = Table(
        "variant",
        "frames",
        "s/chunk",
        "rest",
        "ratio",
        "ideal",
        "/ ideal",
        "median",
        "cpu",
        "MB",
        title=f"{found['case']}; best of {found['chunks']} chunks",
    )
    for row in rows:
        good = row["variant"] == "dense" or row["best_wall_over_ideal"] <= TARGET
        table.add_row(
            row["variant"],
            f"{row['frames']:.1f}",
            f"{row['best_wall']:.3f}",
            f"{row['rest_wall']:.3f}",
            f"{row['best_wall_ratio']:.3f}",
            f"{row['ideal']:.3f}",
            f"[{'green' if good else 'red'}]{row['best_wall_over_ideal']:.3f}",
            f"{row['median_wall_over_ideal']:.3f}",
            f"{row['best_cpu_over_ideal']:.3f}",
            f"{row['stored_bytes'] / 1e6:.0f}",
        )
    console.print(table)
    console.print(
        f"identity differs from dense by {found['identity_differs_by']:g}; median over best chunk "
        f"of dense {rows[0]['median_wall'] / rows[0]['best_wall']:.2f}; "
        f"load {found['load_average'][0]:.1f}\n"
    )
    if "profile" in found:
        show_phases(console, found["profile"])


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = common_arguments(__doc__.splitlines()[0], "runs/bench/attention.json")
    parser.add_argument("--grids", nargs="+", default=["15x26", "30x52"], help="patches per frame, HxW")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--repeats", type=int, default=6, help="timed chunks; larger grids take fewer on a CPU, at least 2"
    )
    parser.add_argument("--presets", action="store_true", help="a row per preset instead of the mixes")
    parser.add_argument("--contiguous", action="store_true", help="heads of one role are neighbours")
    parser.add_argument("--profile", action="store_true", help="also show where the time goes, on a CPU")
    args = parser.parse_args()
    if args.quick:
        args.grids, args.dtypes, args.repeats = ["4x6"], args.dtypes[:1], 1
    prepare(args.device, args.threads)
    return args


def measured(case: Case, args: argparse.Namespace, deadline: Deadline) -> dict[str, Any]:
    """All variants of one case."""
    chosen = filled(case, args, {"store": args.store})
    repeats = args.repeats
    if case.device == "cpu":
        repeats = min(repeats, max(2, round(repeats * min(1.0, 390 / case.tokens))))
    taken = measure(chosen, repeats, deadline)
    with without_softmax_attention():
        rest = measure(chosen, repeats, deadline)
    return {
        "case": str(case),
        "heads": f"{case.heads} x {case.head_dim}, {'neighbours' if args.contiguous else 'scattered'}",
        "chunks": len(taken[0]),
        "rows": summary(chosen, taken, rest, args.store),
        "identity_differs_by": agreement(chosen),
        "load_average": os.getloadavg(),
    }


def profiled(case: Case, args: argparse.Namespace, deadline: Deadline) -> dict[str, Any]:
    """The same, and where the time goes if that was asked for."""
    found = measured(case, args, deadline)
    if args.profile:
        found["profile"] = phases(partial(filled, case, args), 2, args.store)
    return found


def main() -> None:
    """Measures, shows, and writes the JSON file."""
    args, console = arguments(), Console(width=110)
    sizes = [(*parse_grid(grid), getattr(torch, dtype)) for grid in args.grids for dtype in args.dtypes]
    cases = [Case(*size, args.device) for size in sizes]
    head = (
        f"{SCOPE}; {WARM_UP}; chunks of {CHUNK} frames, {PASSES} passes, window {WINDOW}; backend "
        f"{args.backend}, store {args.store}, device {args.device}"
    )
    asked = [(case, partial(profiled, case, args)) for case in cases]
    report_cases(console, args, head, asked, partial(show, console))


if __name__ == "__main__":
    main()
