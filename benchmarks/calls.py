"""What softmax attention of a chunk costs in one call per query frame instead of one for all of them.

Roles that see other frames from every query frame, such as those of Pyramid Forcing, are attended to so. Both
ways attend to as many tokens; they take turns, and of each the best counts. Made for `sdpa`: other backends
take both ways in one launch, and copy the keys for every query frame, which is then in the time.

    python benchmarks/calls.py --threads 1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import (
    CHUNK,
    Case,
    Deadline,
    common_arguments,
    finish,
    machine,
    prepare,
    write,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from headforcing.attention.backends import Part, find_backend
from headforcing.cli.amounts import parse_grid
from headforcing.types import Heads

ABOUT = {
    "scope": "softmax attention of a chunk alone",
    "warm_up": "one turn",
    "store": "none",
}


def ways(case: Case, heads: int, frames: int, backend: str) -> list[Callable[[], Tensor]]:
    """Attention of a chunk to so many frames: in one call, and in one per query frame."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        x = torch.randn(1, heads, count * case.tokens, case.head_dim, generator=generator)
        return x.to(case.device, case.dtype).transpose(1, 2)  # head by head in memory, as in the store

    q, k, v = draw(CHUNK), draw(frames), draw(frames)
    everyone, attend = Heads(range(heads), heads), find_backend(backend)
    rows = [slice(n * case.tokens, (n + 1) * case.tokens) for n in range(CHUNK)]
    whole = [Part(everyone, q, k, v)]
    split = [Part(everyone, q[:, own], k, v, own) for own in rows]
    return [lambda: attend(whole, heads), lambda: attend(split, heads)]


def shortest(taken: Sequence[Callable[[], Tensor]], repeats: int, device: str) -> list[float]:
    """Seconds of each, the best of some; a first turn is thrown away."""
    found = [float("inf")] * len(taken)
    for turn in range(repeats + 1):
        for number, call in enumerate(taken):
            began = time.perf_counter()
            call()
            finish(device)
            if turn:
                found[number] = min(found[number], time.perf_counter() - began)
    return found


def main() -> None:
    """Measures, shows, and writes the JSON file."""
    parser = common_arguments(__doc__.splitlines()[0], "runs/bench/calls.json")
    parser.add_argument("--grid", default="16x24", help="patches per frame, HxW")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 5, 6])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 9, 11])
    parser.add_argument("--repeats", type=int, default=6)
    args, console = parser.parse_args(), Console(width=110)
    if args.quick:
        args.grid, args.repeats = "2x4", 1
    prepare(args.device, args.threads)
    report = measured(args)
    show(console, args, report)
    write(args.out, report)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """A row per size; when the time is over there is one of them in any case."""
    deadline, rows, left_out = Deadline(args.minutes), list[dict[str, Any]](), list[str]()
    for dtype in args.dtypes:
        case = Case(*parse_grid(args.grid), getattr(torch, dtype), args.device)
        for heads in args.heads:
            for frames in args.frames:
                if rows and deadline.passed:
                    left_out.append(f"{heads} heads, {frames} frames, {dtype}: no time was left")
                    continue
                one, many = shortest(ways(case, heads, frames, args.backend), args.repeats, args.device)
                about = {**ABOUT, "backend": args.backend, "dtype": dtype, "device": args.device}
                rows.append({**about, "heads": heads, "frames": frames, "one": one, "per_frame": many})
    size = f"{args.grid} patches per frame"
    return {"machine": machine(args.device), "case": size, "rows": rows, "left_out": left_out}


def show(console: Console, args: argparse.Namespace, report: dict[str, Any]) -> None:
    """The table."""
    rows, calls = report["rows"], ("one call, ms", f"{CHUNK} calls, ms")
    table = Table("dtype", "heads", "frames", *calls, "ratio", title=report["case"])
    for row in rows:
        cells = (
            f"{1e3 * row['one']:.2f}",
            f"{1e3 * row['per_frame']:.2f}",
            f"{row['per_frame'] / row['one']:.2f}",
        )
        table.add_row(row["dtype"], str(row["heads"]), str(row["frames"]), *cells)
    console.print(f"{ABOUT['scope']}; backend {args.backend}, device {args.device}", table)
    ratios = [row["per_frame"] / row["one"] for row in rows]
    console.print(f"{min(ratios):.2f} to {max(ratios):.2f} times as long", *report["left_out"], sep="\n")


if __name__ == "__main__":
    main()
