"""How long Python takes for one call of a self-attention layer, beside dense attention.

Tiny tensors on a CPU, one thread, softmax attention and rotation by RoPE left out: what is left is the time
of the host, which an accelerator waits for where its kernels are shorter. Variants take turns pass by pass.
CPU time of the thread; on a machine that does other work, look at the ratios and at the least.

    python benchmarks/host_time.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from launches import HEADS, rows
from measuring import CHUNK, FILL, PASSES, WINDOW, write
from meta_layer import Layer
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from headforcing.adapters import rope
from headforcing.measure.sizes import ModelSize

SIZE = ModelSize(1, HEADS, 16, WINDOW, CHUNK, (2, 6))


def measured(names: Sequence[str], chunks: int, store: str) -> list[dict[str, Any]]:
    """Microseconds per call of every variant: the first pass of a chunk, and a later one."""
    layers, handles, taken = {}, [], {}
    for name in names:
        layers[name] = layer = Layer(SIZE, device="cpu")
        layer.x.normal_()
        for parameter in layer.parameters():
            parameter.data.normal_(0, 0.1)
        if row := rows()[name]:
            handles.append(layer.force(row, store))
        taken[name] = {"first": [], "later": []}
    clock, noisy = time.thread_time, torch.tensor([1.0])
    for chunk in range(2 * FILL + chunks):
        for turn in range(PASSES):
            for name, layer in layers.items():
                begun = clock()
                layer(chunk, noisy)
                if chunk >= 2 * FILL:
                    taken[name]["later" if turn else "first"].append(1e6 * (clock() - begun))
    for handle in handles:
        handle.remove()
    return [
        {
            "variant": name,
            **{f"{which}_{kind}": of(times[which]) for which in times for kind, of in KINDS.items()},
        }
        for name, times in taken.items()
    ]


KINDS = {"median": statistics.median, "least": min}


def main() -> None:
    """Measures, shows, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100, help="timed ones")
    parser.add_argument("--store", default="ring", help="where keys and values live, by name")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/host_time.json"))
    args, console = parser.parse_args(), Console(width=120)
    torch.set_num_threads(1)
    with (
        torch.no_grad(),
        mock.patch.object(
            functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q)
        ),
        mock.patch.object(rope, "in_one_kernel", return_value=True),
        mock.patch.object(rope, "at_once", lambda x, *_: torch.empty_like(x)),
    ):
        found = measured(list(rows()), args.chunks, args.store)
    titles = (
        "heads",
        *(f"{which} {what}" for which in ("first", "later") for what in ("us", "x dense", "least")),
    )
    table = Table(*titles, title=f"{HEADS} heads, store {args.store}, microseconds per call")
    dense = found[0]
    for row in found:
        cells = [
            (f"{row[f'{which}_median']:.0f}", f"{row[f'{which}_median'] / dense[f'{which}_median']:.2f}",
             f"{row[f'{which}_least'] / dense[f'{which}_least']:.2f}")
            for which in ("first", "later")
        ]  # fmt: skip
        table.add_row(row["variant"], *cells[0], *cells[1])
    console.print(table)
    write(args.out, {"torch": torch.__version__, "store": args.store, "chunks": args.chunks, "rows": found})


if __name__ == "__main__":
    main()
