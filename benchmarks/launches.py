"""How many kernels one self-attention layer launches in a pass, and how often it reads its host's counters.

Counted, not timed, on the `meta` device: it requires no accelerator, and what it says of one depends on no
machine. A launch is an operator that returns no view and does more than take memory; a rotation by RoPE of
ours, and softmax attention per call, are one each, as on an accelerator. Counters that lie on the device, as
upstream has them, are a sync each time they are read. Projections, norms and the checks for NaN are in it.

    python benchmarks/launches.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attention_presets import preset_rows
from measuring import CHUNK, FILL, WINDOW, write
from meta_layer import Layer, ResultAlone, returns_views
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headforcing.cli.amounts import parse_grid
from headforcing.measure.sizes import ModelSize
from headforcing.roles import HeadRole

IDLE = {"empty", "new_empty", "empty_strided", "_unsafe_view", "promote_types"}
"""Operators that launch nothing; `empty_like` stands for a fused kernel here."""
HEADS = 12


class Launches(TorchDispatchMode):
    """Counts while entered.

    Args:
        counters: tensors whose reads count.
    """

    def __init__(self, counters: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.launches = self.reads = 0
        self._counters = [x.untyped_storage() for x in counters]

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts it."""
        if torch.Tag.data_dependent_output in func.tags:
            self.reads += any(args[0].untyped_storage() == known for known in self._counters)
        elif not returns_views(func):
            self.launches += func.overloadpacket.__name__ not in IDLE
        return func(*args, **(kwargs or {}))


def rows() -> dict[str, list[HeadRole]]:
    """Roles by name: dense, and the presets, with heads of a role as neighbours and scattered."""
    found: dict[str, list[HeadRole]] = {"dense": []}
    for contiguous in (True, False):
        for name, roles in preset_rows(HEADS, WINDOW, CHUNK, contiguous).items():
            where = "neighbours" if contiguous else "scattered"
            found[name if len(set(roles)) == 1 else f"{name}, {where}"] = roles
    return found


def counted(row: Sequence[HeadRole], grid: tuple[int, int], store: str) -> dict[str, Any]:
    """The first pass over a chunk, and a later one, once a video is long; of several chunks the most."""
    layer = Layer(ModelSize(1, HEADS, 128, WINDOW, CHUNK, grid))
    handle = layer.force(row, store) if row else None
    counters = [x for name, x in layer.cache.items() if name.endswith("index")]
    most = {"first": (0, 0), "later": (0, 0)}
    with torch.no_grad(), ResultAlone():
        for chunk in range(2 * FILL):
            layer(chunk, torch.tensor([1.0]))
        for chunk in range(2 * FILL, 2 * FILL + 8):
            for name in most:
                with Launches(counters) as seen:
                    layer(chunk, torch.tensor([1.0]))
                most[name] = max(most[name], (seen.launches, seen.reads))
    if handle is not None:
        handle.remove()
    return {
        f"{name}_{what}": number
        for name, both in most.items()
        for what, number in zip(("launches", "reads"), both, strict=True)
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "heads": lambda row: row["variant"],
    "first pass": lambda row: str(row["first_launches"]),
    "later passes": lambda row: str(row["later_launches"]),
    "counters read": lambda row: str(row["later_reads"]),
}


def main() -> None:
    """Counts, shows, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", default="30x52", help="patches per frame, HxW")
    parser.add_argument("--store", default="ring", help="where keys and values live, by name")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/launches.json"))
    args, console = parser.parse_args(), Console(width=110)
    table, grid = Table(*COLUMNS, title=f"{HEADS} heads, store {args.store}"), parse_grid(args.grid)
    found = [{"variant": name, **counted(row, grid, args.store)} for name, row in rows().items()]
    for row in found:
        table.add_row(*(cell(row) for cell in COLUMNS.values()))
    console.print(table)
    write(args.out, {"torch": torch.__version__, "store": args.store, "grid": args.grid, "rows": found})


if __name__ == "__main__":
    main()
