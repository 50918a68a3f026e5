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
from attention_presets import cycle_of
from measuring import (
    CHUNK,
    CLOCKS,
    FILL,
    PASSES,
    WINDOW,
    Case,
    Chunks,
    Counted,
    Deadline,
    best,
    common_arguments,
    finish,
    machine,
    measure,
    median,
    parse_grid,
    without_softmax_attention,
    write,
)
from mixes import plain_mixes, preset_mixes
from phases import phases, show_phases
from pictures import draw_ratios
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import headforcing as hf
from headforcing.demo import attention as demo
from headforcing.roles import HeadRole

TARGET = 1.2
SCOPE = "self-attention without projections"
WARM_UP = f"{FILL} chunks without softmax attention, then 2 passes with it"


class Prepared(nn.Module):
    """Stands for a projection: returns a tensor that is there already."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs, self.turn = inputs, 0

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, C]`, another one for every pass."""
        return self.inputs[self.turn % len(self.inputs)]


class Variant:
    """One way to attend, its cache, and a video that goes on and on.

    Args:
        name: what to call it.
        roles: one per head; none: dense.
        case: its size.
        backend: name of the backend, of the head-forced side.
        options: what else head forcing is applied with.
    """

    def __init__(
        self, name: str, roles: Sequence[HeadRole], case: Case, backend: str, options: dict[str, Any]
    ) -> None:
        self.name, self.roles, self.case = name, roles, case
        dim = case.heads * case.head_dim
        sizes = {"chunk": CHUNK, "window": case.window, "rope_rows": case.rope_rows}
        config = demo.DemoConfig(dim=dim, layers=1, heads=case.heads, **sizes)
        model = nn.ModuleList([demo.DemoCausalSelfAttention(config)]).eval().requires_grad_(False)
        module: Any = model[0]
        module.max_attention_size = case.window * case.tokens
        self.projections = {name: Prepared(prepared_inputs(case, name)) for name in "qkv"}
        for part in ("q", "k", "v", "o", "norm_q", "norm_k"):
            setattr(module, part, self.projections.get(part, nn.Identity()))
        shape = (1, case.window * case.tokens, case.heads, case.head_dim)
        self.cache = {n: torch.zeros(shape, dtype=case.dtype, device=case.device) for n in ("k", "v")}
        for index in ("global_end_index", "local_end_index"):
            self.cache[index] = torch.zeros(1, dtype=torch.long, device=case.device)
        self.grid = torch.tensor([[CHUNK, case.height, case.width]])
        self.freqs = demo.rope_table(config).to(case.device)
        self.cycle = cycle_of(list(roles), case.window, CHUNK)
        self.backend = Counted(backend, case.tokens)
        self.handle: Any = None
        if roles:
            self.handle = hf.apply_head_forcing(
                model, [roles], window=case.window, backend=self.backend, **options
            )
        self.module, self.chunk = model[0], 0

    @property
    def attended(self) -> float:
        """Frames that a query saw, mean over heads and over the passes of whole cycles that were run last."""
        last = self.backend.seen[-PASSES * self.cycle :]
        return sum(last) / len(last) if last else float(self.case.window)

    @property
    def stored(self) -> int:
        """Bytes of keys and values that are held."""
        if self.handle is not None:
            return int(self.handle.status().stored_bytes)
        return sum(self.cache[name].nbytes for name in ("k", "v"))

    def run(self, number: int) -> Tensor:
        """One pass over the chunk that has its turn."""
        for projection in self.projections.values():
            projection.turn = self.chunk + number
        start = self.chunk * CHUNK * self.case.tokens
        x = self.projections["q"](None)
        with torch.no_grad():
            out: Tensor = self.module(x, None, self.grid, self.freqs, None, self.cache, start)
            finish(self.case.device)
        return out


def prepared_inputs(case: Case, name: str) -> list[Tensor]:
    """Random queries, keys or values; the same ones for every variant."""
    generator = torch.Generator().manual_seed("qkv".index(name))
    shape = (1, CHUNK * case.tokens, case.heads * case.head_dim)
    return [torch.randn(shape, generator=generator).to(case.device, case.dtype) for _ in range(4)]


def variants(case: Case, args: argparse.Namespace, options: dict[str, Any]) -> list[Variant]:
    """Dense attention first, then what is compared to it, and what must equal it last."""
    mixes = preset_mixes if args.presets else plain_mixes
    return [Variant(mix.name, mix.roles, case, args.backend, options) for mix in mixes(case, args.contiguous)]


def filled(case: Case, args: argparse.Namespace, options: dict[str, Any]) -> list[Variant]:
    """The same, with every memory full."""
    chosen = variants(case, args, options)
    fill(chosen)
    return chosen


def fill(chosen: Sequence[Variant]) -> None:
    """Brings every memory into steady state."""
    with without_softmax_attention():
        for variant in chosen:
            for _ in range(FILL):
                variant.run(PASSES - 1)
                variant.chunk += 1


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


def facts_of(variant: Variant, store: str) -> dict[str, Any]:
    """What a row is about."""
    forced = variant.handle is not None
    return {
        "scope": SCOPE,
        "warm_up": WARM_UP,
        "backend": variant.backend.name if forced else "sdpa, of the host",
        "store": store if forced else "the host's cache",
        "dtype": variant.case.kind,
        "device": variant.case.device,
    }


def show(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """The table of one case."""
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
        title=title,
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
    if args.threads:
        torch.set_num_threads(args.threads)
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


def main() -> None:
    """Measures, shows, and writes the JSON file."""
    args, console = arguments(), Console(width=110)
    deadline = Deadline(args.minutes)
    report: dict[str, Any] = {"machine": machine(args.device), "cases": [], "left_out": []}
    console.print(report["machine"])
    console.print(
        f"{SCOPE}; {WARM_UP}; chunks of {CHUNK} frames, {PASSES} passes, window {WINDOW}; backend "
        f"{args.backend}, store {args.store}, device {args.device}"
    )
    for grid in args.grids:
        for dtype in args.dtypes:
            case = Case(*parse_grid(grid), getattr(torch, dtype), args.device)
            if deadline.passed:
                report["left_out"].append(f"{case}: no time was left")
                continue
            found = measured(case, args, deadline)
            show(console, f"{case}; best of {found['chunks']} chunks", found["rows"])
            dense = found["rows"][0]
            console.print(
                f"identity differs from dense by {found['identity_differs_by']:g}; median over best chunk "
                f"of dense {dense['median_wall'] / dense['best_wall']:.2f}; "
                f"load {found['load_average'][0]:.1f}\n"
            )
            if args.profile:
                found["profile"] = phases(partial(filled, case, args), 2)
                show_phases(console, found["profile"])
            report["cases"].append(found)
            write(args.out, report)
            draw_ratios(report["cases"], args.out.with_suffix(".png"))
    console.print(*report["left_out"], f"written to {args.out}", sep="\n")


if __name__ == "__main__":
    main()
