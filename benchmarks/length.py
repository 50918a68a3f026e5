"""What a chunk costs against the number of chunks before it (flat), and against the frames kept (linear).

The self-attention of `attention.py`, without projections, on small frames. Chunks: dense, two mixes of Head
Forcing and StreamingLLM take turns for a thousand chunks; a line through medians of blocks of chunks, with a
95 % interval from a bootstrap over the blocks. Frames: windows of several sizes take turns; a line through
the best repeats, and how far they are from it. See README.md in this folder.

    python benchmarks/length.py --quick
    python benchmarks/length.py --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import tables
import torch
from measuring import (
    CHUNK,
    CLOCKS,
    FILL,
    PASSES,
    Case,
    Deadline,
    best,
    common_arguments,
    machine,
    measure,
    prepare,
    write,
)
from mixes import plain_mixes
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from variant import SCOPE, WARM_UP, Variant, facts_of, fill

from headforcing.cli.amounts import parse_grid
from headforcing.roles import SlidingWindow

BLOCKS, SMALLEST, FEWEST = 40, 5, 4
"""Blocks, chunks of one at least, and blocks for a line through medians: one slow moment is no slope."""
RESAMPLES = 2000
Values = NDArray[np.float64]
SIZES = (6, 12, 24, 48, 96)


def flat(case: Case, args: argparse.Namespace, deadline: Deadline) -> list[dict[str, Any]]:
    """Seconds per chunk by its number, and the line through them; a row per variant."""
    mixes = [mix for mix in plain_mixes(case, False) if mix.name != "identity"]
    options = {"store": args.store}
    chosen = [Variant(mix.name, mix.roles, case, args.backend, options) for mix in mixes]
    fill(chosen)
    taken = measure(chosen, args.chunks, deadline)
    rows = []
    for variant, chunks in zip(chosen, taken, strict=True):
        row = {"variant": variant.name, **facts_of(variant, args.store), "frames": variant.attended}
        for clock in CLOCKS:
            row[clock] = trend([sum(getattr(sample, clock) for sample in chunk) for chunk in chunks])
        rows.append(row | {"chunks": len(chunks)})
    return rows


def trend(seconds: Sequence[float]) -> dict[str, Any]:
    """What a thousand chunks more cost, in shares of a median chunk, with a 95 % interval.

    Of too few chunks for a line, `per_1000_chunks`, `low` and `high` are `None`.
    """
    count = max(1, min(BLOCKS, len(seconds) // SMALLEST))
    blocks = np.array_split(np.array(seconds), count)
    values = np.array([np.median(block) for block in blocks])
    edges = np.cumsum([0, *(len(block) for block in blocks)])
    middles = (edges[:-1] + edges[1:]) / 2
    usual = float(np.median(values))
    told: dict[str, float | None] = dict.fromkeys(("per_1000_chunks", "low", "high"))
    if count >= FEWEST:
        drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
        drawn = drawn[drawn.min(1) < drawn.max(1)]  # one block has no slope
        low, high = np.quantile(slope(middles[drawn], values[drawn]), (0.025, 0.975))
        found = (float(slope(middles, values)), float(low), float(high))
        told = {name: 1000 / usual * one for name, one in zip(told, found, strict=True)}
    return {
        "median": usual,
        **told,
        "block_middles": middles.tolist(),
        "block_medians": values.tolist(),
        "seconds": list(seconds),
    }


def slope(x: Values, y: Values) -> Any:
    """Of the least-squares lines through `[..., n]` points."""
    away = x - x.mean(-1, keepdims=True)
    return (away * y).sum(-1) / (away * away).sum(-1)


def linear(case: Case, args: argparse.Namespace, deadline: Deadline) -> list[dict[str, Any]]:
    """Seconds per chunk by the frames that are kept, the current chunk included; a row per size."""
    options = {"store": args.store}
    chosen = [
        Variant(f"{frames} frames", [window_of(frames)] * case.heads, case, args.backend, options)
        for frames in args.frames
    ]
    for variant in chosen:  # the largest memory is full when the video is as long
        while variant.chunk * CHUNK < 2 * case.window:
            fill([variant])
    taken = measure(chosen, args.repeats, deadline)
    seconds = [best(chunks, "wall") for chunks in taken]
    fixed, per_frame, away = line(args.frames, seconds)
    return [
        {
            "variant": variant.name,
            **facts_of(variant, args.store),
            "frames": variant.attended,
            "best_wall": one,
            "fitted": fixed + per_frame * frames,
            "fixed": fixed,
            "per_frame": per_frame,
            "largest_residual": away,
            "chunks": len(chunks),
            "stored_bytes": variant.stored,
        }
        for variant, frames, one, chunks in zip(chosen, args.frames, seconds, taken, strict=True)
    ]


def window_of(frames: int) -> SlidingWindow:
    """A window with a chunk as its sink, where there is room."""
    return SlidingWindow(frames, sink=min(CHUNK, frames - CHUNK))


def line(frames: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Seconds without any frame, seconds per frame, and the largest distance as a share of what is fitted."""
    x, y = np.array(frames, dtype=float), np.array(seconds)
    rise = float(slope(x, y))
    fixed = float(y.mean() - rise * x.mean())
    fitted = fixed + rise * x
    return fixed, rise, float(np.abs(y / fitted - 1).max())


def draw(report: dict[str, Any], path: Any) -> None:
    """Both pictures side by side, as PNG."""
    from headforcing.measure.plots import style

    figure = style.new_figure(9.0, 3.2)
    left, right = figure.subplots(1, 2)
    for number, row in enumerate(report["flat"]):
        look = {"ls": style.DASHES[number % len(style.DASHES)], "lw": 1.4, "label": row["variant"]}
        wall = row["wall"]
        left.plot(wall["block_middles"], [1e3 * one for one in wall["block_medians"]], **look)
    left.set(xlabel="chunks before", ylabel="ms per chunk", ylim=(0, None))
    rows = report["linear"]
    right.plot([row["frames"] for row in rows], [1e3 * row["best_wall"] for row in rows], "o", ms=4)
    right.plot([row["frames"] for row in rows], [1e3 * row["fitted"] for row in rows], lw=1.2)
    right.set(xlabel="frames attended", ylabel="ms per chunk", ylim=(0, None), xlim=(0, None))
    for ax in (left, right):
        style.dress(ax, grid="y")
    style.legend_above(left, left.get_lines())
    figure.savefig(path, dpi=150)


def show(console: Console, report: dict[str, Any]) -> None:
    """Both tables."""
    first = report["flat"][0]
    title = f"{report['case']}; {first['chunks']} chunks"
    table = Table("variant", "frames", "ms/chunk", "per 1000 chunks more", "by CPU", title=title)
    for row in report["flat"]:
        told = [tables.trend(row[clock]) for clock in CLOCKS]
        table.add_row(row["variant"], f"{row['frames']:.1f}", f"{1e3 * row['wall']['median']:.2f}", *told)
    console.print(table)
    table = Table("frames", "ms/chunk", "on the line", "MB", title="by frames kept")
    for row in report["linear"]:
        cells = (row["frames"], 1e3 * row["best_wall"], 1e3 * row["fitted"], row["stored_bytes"] / 1e6)
        table.add_row(*(f"{cell:.2f}" for cell in cells))
    console.print(table)
    last = report["linear"][-1]
    console.print(
        f"{1e3 * last['fixed']:.2f} ms and {1e3 * last['per_frame']:.3f} ms per frame; no size is further "
        f"than {last['largest_residual']:.1%} from the line"
    )


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = common_arguments(__doc__.splitlines()[0], "runs/bench/length.json")
    parser.add_argument("--grid", default="8x8", help="patches per frame, HxW")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunks", type=int, default=1000, help="chunks of a long video")
    parser.add_argument("--frames", type=int, nargs="+", default=list(SIZES), help="windows to compare")
    parser.add_argument("--repeats", type=int, default=20, help="timed chunks per window")
    args = parser.parse_args()
    if args.quick:
        args.grid, args.chunks, args.frames, args.repeats = "2x4", 40, [6, 12, 24], 3
    prepare(args.device, args.threads)
    return args


def main() -> None:
    """Measures, shows, draws, and writes the JSON file."""
    args, console = arguments(), Console(width=110)
    deadline, first = Deadline(args.minutes), Deadline(args.minutes and 0.85 * args.minutes)
    grid, dtype = parse_grid(args.grid), getattr(torch, args.dtype)
    rows = CHUNK * (args.chunks + 2 * FILL)
    case = Case(*grid, dtype, args.device, rope_rows=rows)
    console.print(
        f"{SCOPE}; {WARM_UP}; chunks of {CHUNK} frames, {PASSES} passes; backend {args.backend}, store "
        f"{args.store}, device {args.device}"
    )
    report: dict[str, Any] = {"machine": machine(args.device), "case": str(case)}
    report["flat"] = flat(case, args, first)
    long = Case(*grid, dtype, args.device, window=max(args.frames))
    report["linear"] = linear(long, args, deadline)
    show(console, report)
    write(args.out, report)
    draw(report, args.out.with_suffix(".png"))
    console.print(f"written to {args.out} and {args.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
