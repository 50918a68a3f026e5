"""What a layer would take on GPUs that are not here, by arithmetic.

From kernels, FLOPs and bytes, which are counted, and from the time of the host, which is measured: a pass
takes as long as the device or the host, whichever is slower. What is assumed stands in `CARDS` and in the
constants below, with what would show it to be wrong. Trust ratios, and those to 30 %.

    python benchmarks/host_time.py && python benchmarks/predict.py
    python benchmarks/predict.py --measured runs/bench/transformer.json     # beside the times of a GPU
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launches import counted, rows
from measuring import CHUNK, PASSES, WINDOW, write
from rich.console import Console
from rich.table import Table
from wan_shaped import SHAPES, TEXT_TOKENS, WanShape

from headforcing.cli.amounts import parse_grid
from headforcing.measure.memory import steady
from headforcing.roles import HeadRole


@dataclass(frozen=True)
class Card:
    """What a GPU does, assumed; `transformer.py` on such a card measures it.

    Attributes:
        attention: FLOP/s of softmax attention in bfloat16: cuDNN's on compute capability 9.0, else
            FlashAttention-2.
        matmul: FLOP/s of large products of matrices in bfloat16.
        memory: bytes per second.
    """

    attention: float
    matmul: float
    memory: float


CARDS = {
    "H200": Card(575e12, 600e12, 4.8e12),
    "H100": Card(575e12, 600e12, 3.35e12),
    "RTX 4090": Card(150e12, 150e12, 1.0e12),
}
GAP = 2e-6
"""Seconds that a small kernel takes at least, its launch by the device included; a trace shows it."""
SWEEPS = 30
"""How often a layer reads or writes its hidden states beside products and attention; a trace shows it."""
OTHER_KERNELS, OTHER_HOST = 25, 0.3e-3
"""Kernels of cross-attention, MLP and modulation, and seconds of the host for them; a trace shows both."""


def attended(row: Sequence[HeadRole]) -> float:
    """Frames that a query attends to, mean over the heads; without roles the window."""
    found = [steady(role.fit(WINDOW, CHUNK), WINDOW, CHUNK) for role in row]
    return sum(float(one.attended) for one in found if one) / len(found) if found else float(WINDOW)


def device_time(card: Card, shape: WanShape, patches: int, frames: float, launches: int) -> float:
    """Seconds of the device for one pass of one layer."""
    tokens, dim = CHUNK * patches, shape.dim
    attention = 4 * tokens * frames * patches * dim
    products = 12 * tokens * dim**2 + 4 * tokens * dim * shape.hidden + 4 * tokens * TEXT_TOKENS * dim
    swept = SWEEPS * tokens * dim * 2
    kernels = launches + OTHER_KERNELS
    return attention / card.attention + products / card.matmul + swept / card.memory + kernels * GAP


def chunk_time(
    card: Card,
    shape: WanShape,
    patches: int,
    frames: float,
    counts: Mapping[str, Any],
    host: Mapping[str, float],
) -> float:
    """Seconds of one layer for a chunk: the first pass, and the later ones.

    Args:
        card: the GPU.
        shape: of the model.
        patches: of a frame.
        frames: that a query attends to.
        counts: kernels of self-attention, as `launches.counted` has them.
        host: microseconds of the host for self-attention, as `host_time.py` has them.
    """
    passes = []
    for which in ("first", "later"):
        device = device_time(card, shape, patches, frames, counts[f"{which}_launches"])
        passes.append(max(device, 1e-6 * host[f"{which}_median"] + OTHER_HOST))
    return passes[0] + (PASSES - 1) * passes[1]


def predicted(
    host: Mapping[str, Mapping[str, float]], grids: Sequence[str], store: str
) -> list[dict[str, Any]]:
    """Speed beside dense attention, by card, model and grid, of every variant with a host time."""
    table = {name: row for name, row in rows().items() if name in host and "neighbours" not in name}
    counts = {name: counted(row, (2, 6), store) for name, row in table.items()}
    frames = {name: attended(row) for name, row in table.items()}
    found = []
    for card, grid, model in ((c, g, m) for c in CARDS for g in grids for m in ("wan-1.3b", "wan-14b")):
        height, width = parse_grid(grid)
        seconds = {
            name: chunk_time(
                CARDS[card], SHAPES[model], height * width, frames[name], counts[name], host[name]
            )
            for name in table
        }
        for name in table:
            speed = seconds["dense"] / seconds[name]
            case = {"card": card, "model": model, "grid": grid, "variant": name}
            found.append({**case, "seconds": seconds[name], "speed": speed, "frames": frames[name]})
    return found


def measured_speeds(path: Path | None) -> dict[str, float]:
    """Speed beside dense of the variants of `transformer.py`, of its first case."""
    if path is None:
        return {}
    case = json.loads(path.read_text("utf-8"))["cases"][0]
    return {row["variant"]: 1 / row["best_wall_ratio"] for row in case["rows"]}


def main() -> None:
    """Predicts, shows, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host-time", type=Path, default=Path("runs/bench/host_time.json"))
    parser.add_argument("--scale", type=float, default=1.0, help="host time there over host time here")
    parser.add_argument("--measured", type=Path, help="JSON of transformer.py on a GPU, to show beside")
    parser.add_argument("--grids", nargs="+", default=["30x52", "45x80"], help="patches per frame, HxW")
    parser.add_argument("--store", default="ring", help="where keys and values live, by name")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/predict.json"))
    args, console = parser.parse_args(), Console(width=160)
    host = {
        row.pop("variant"): {name: args.scale * time for name, time in row.items()}
        for row in json.loads(args.host_time.read_text("utf-8"))["rows"]
    }
    found = predicted(host, args.grids, args.store)
    cases = list(dict.fromkeys((row["card"], row["model"], row["grid"]) for row in found))
    beside = measured_speeds(args.measured)
    title = f"speed beside dense attention over {WINDOW} frames, predicted; host time x {args.scale:g}"
    table = Table("heads scattered", "frames", *map("\n".join, cases), title=title)
    for name in dict.fromkeys(row["variant"] for row in found):
        same = [row for row in found if row["variant"] == name]
        shown = name.partition(":")[0] + (f", measured {beside[name]:.2f}" if name in beside else "")
        table.add_row(shown, f"{same[0]['frames']:.1f}", *(f"{row['speed']:.2f}" for row in same))
    console.print(table)
    facts = {"host_time": str(args.host_time), "scale": args.scale, "store": args.store}
    write(args.out, {**facts, "rows": found})


if __name__ == "__main__":
    main()
