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
import json
import math
import os
import platform
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from attention_presets import cycle_of, preset_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import headforcing as hf
from headforcing.backends import Part, find_backend
from headforcing.demo import attention as demo
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow
from headforcing.stores.ring import RingStore

WINDOW, CHUNK, HEADS, HEAD_DIM = 21, 3, 12, 128
PASSES = 5
FILL = 12  # chunks before the first timed one: 36 frames, so every memory is full and has evicted
TARGET = 1.2
SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Case:
    """One size and precision that all variants are run at."""

    height: int
    width: int
    dtype: torch.dtype
    device: str

    @property
    def tokens(self) -> int:
        """Tokens of one frame."""
        return self.height * self.width

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind}, {self.height}x{self.width} = {self.tokens} tokens per frame, {self.device}"


class Prepared(nn.Module):
    """Stands for a projection: returns a tensor that is there already."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs, self.turn = inputs, 0

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, C]`, another one for every pass."""
        return self.inputs[self.turn % len(self.inputs)]


class Variant:
    """One way to attend, its cache, and a video that goes on and on."""

    def __init__(self, name: str, roles: Sequence[HeadRole], case: Case, options: dict[str, Any]) -> None:
        self.name, self.roles, self.case = name, roles, case
        config = demo.DemoConfig(dim=HEADS * HEAD_DIM, layers=1, heads=HEADS, chunk=CHUNK, window=WINDOW)
        model = nn.ModuleList([demo.DemoCausalSelfAttention(config)]).eval().requires_grad_(False)
        module: Any = model[0]
        module.max_attention_size = WINDOW * case.tokens
        self.projections = {name: Prepared(prepared_inputs(case, name)) for name in "qkv"}
        for part in ("q", "k", "v", "o", "norm_q", "norm_k"):
            setattr(module, part, self.projections.get(part, nn.Identity()))
        shape = (1, WINDOW * case.tokens, HEADS, HEAD_DIM)
        self.cache = {n: torch.zeros(shape, dtype=case.dtype, device=case.device) for n in ("k", "v")}
        for index in ("global_end_index", "local_end_index"):
            self.cache[index] = torch.zeros(1, dtype=torch.long, device=case.device)
        self.grid = torch.tensor([[CHUNK, case.height, case.width]])
        self.freqs = demo.rope_table(config).to(case.device)
        self.seen: list[float] = []
        self.cycle = cycle_of(list(roles), WINDOW, CHUNK)
        self.handle: Any = None
        if roles:
            self.backend = find_backend("sdpa")
            self.handle = hf.apply_head_forcing(
                model, [roles], window=WINDOW, backend=self._attend, **options
            )
        self.module, self.chunk = model[0], 0

    @property
    def attended(self) -> float:
        """Frames that a query saw, mean over heads and over the passes of whole cycles that were run last."""
        last = self.seen[-PASSES * self.cycle :]
        return sum(last) / len(last) if last else float(WINDOW)

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

    def _attend(self, parts: Sequence[Part], num_heads: int) -> Tensor:
        pairs = sum(len(part.heads) * part.q.shape[1] * part.k.shape[1] for part in parts)
        queries = sum(len(part.heads) * part.q.shape[1] for part in parts)
        self.seen.append(pairs / queries / self.case.tokens)
        return self.backend(parts, num_heads)


def prepared_inputs(case: Case, name: str) -> list[Tensor]:
    """Random queries, keys or values; the same ones for every variant."""
    generator = torch.Generator().manual_seed("qkv".index(name))
    shape = (1, CHUNK * case.tokens, HEADS * HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(case.device, case.dtype) for _ in range(4)]


def finish(device: str) -> None:
    """Waits until the device has done what it was asked for."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def variants(case: Case, args: argparse.Namespace, options: dict[str, Any]) -> list[Variant]:
    """Dense attention first, then what is compared to it, and what must equal it last."""
    rows = preset_rows(HEADS, WINDOW, CHUNK, args.contiguous) if args.presets else mixes(args.contiguous)
    table: dict[str, list[HeadRole]] = {
        "dense": [],
        **rows,
        "identity": [SlidingWindow(WINDOW, positions="absolute")] * HEADS,
    }
    return [Variant(name, roles, case, options) for name, roles in table.items()]


def mixes(contiguous: bool) -> dict[str, list[HeadRole]]:
    """Roles of Head Forcing in two mixes, and StreamingLLM at as many frames as the first."""
    memory = Memory(sink=1, episodic=8, recent=9)
    mix = [*[Anchor(1)] * 3, *[Local(1)] * 2, *[memory] * 7]
    short = [*[Anchor(1)] * 6, *[Local(1)] * 6]
    if not contiguous:  # roles of a trained model are scattered over the heads
        for row in (mix, short):
            random.Random(0).shuffle(row)  # noqa: S311 - a fixed order, no secret
    frames = round(sum(min((role.capacity(CHUNK) or 0) + CHUNK, WINDOW) for role in mix) / HEADS)
    return {
        "anchor 3, local 2, memory 7": mix,
        "anchor 6, local 6": short,
        f"StreamingLLM, {frames} frames": [SlidingWindow(frames, sink=CHUNK)] * HEADS,
    }


def without_softmax_attention() -> Any:
    """Skips it on both sides while entered: it leaves no trace in a cache."""
    return mock.patch.object(nn.functional, SDPA, lambda q, k, v: torch.empty_like(q))


def fill(chosen: Sequence[Variant]) -> None:
    """Brings every memory into steady state."""
    with without_softmax_attention():
        for variant in chosen:
            for _ in range(FILL):
                variant.run(PASSES - 1)
                variant.chunk += 1


@dataclass(frozen=True)
class Sample:
    """One pass of one variant."""

    wall: float
    cpu: float


def measure(chosen: Sequence[Variant], repeats: int) -> list[list[list[Sample]]]:
    """`[variant][chunk][pass]`; a first chunk of two passes is thrown away."""
    taken: list[list[list[Sample]]] = [[] for _ in chosen]
    for chunk in range(repeats + 1):
        for samples in taken:
            samples.append([])
        for number in range(PASSES if chunk else 2):
            order = [(chunk + number + i) % len(chosen) for i in range(len(chosen))]
            for index in order:
                wall, cpu = time.perf_counter(), time.process_time()
                chosen[index].run(number)
                sample = Sample(time.perf_counter() - wall, time.process_time() - cpu)
                taken[index][chunk].append(sample)
        for variant in chosen:
            variant.chunk += 1
    return [samples[1:] for samples in taken]


def agreement(chosen: Sequence[Variant]) -> float:
    """Largest difference between dense attention and the variant that must equal it."""
    dense, identity = (variant.run(0).float() for variant in (chosen[0], chosen[-1]))
    return float((dense - identity).abs().max())


def best(chunks: Sequence[Sequence[Sample]], clock: str, cycle: int = 1) -> float:
    """Seconds of a chunk, of every pass the best; mean over the chunks of a cycle."""
    turns = [chunks[turn::cycle] for turn in range(min(cycle, len(chunks)))]
    bests = [sum(min(getattr(chunk[i], clock) for chunk in turn) for i in range(PASSES)) for turn in turns]
    return sum(bests) / len(bests)


def median(chunks: Sequence[Sequence[Sample]], clock: str, cycle: int = 1) -> float:
    """Seconds of the median chunk, whatever its place in the cycle."""
    return statistics.median(sum(getattr(sample, clock) for sample in chunk) for chunk in chunks)


Samples = Sequence[Sequence[Sequence[Sample]]]


def summary(chosen: Sequence[Variant], taken: Samples, rest: Samples) -> list[dict[str, Any]]:
    """One row per variant, everything relative to dense attention."""
    rows = []
    for variant, chunks, others in zip(chosen, taken, rest, strict=True):
        ideal = variant.attended / WINDOW
        row: dict[str, Any] = {"variant": variant.name, "frames": variant.attended, "ideal": ideal}
        for clock in ("wall", "cpu"):
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


# Where the time goes ------------------------------------------------------------------------------


class Clock:
    """Seconds by phase; an inner phase is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what runs inside."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, counted; keys are rotated inside a view, queries outside."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            keys = name == "rotate queries" and "view" in self._open
            with self.phase("rotate keys" if keys else name):
                return function(*args, **kwargs)

        return counted

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


PHASES = {
    "_append": "move history",
    "_begin": "move history",
    "check": "check for NaN",
    "_stage": "write chunk",
    "view": "view",
}


def profile(case: Case, args: argparse.Namespace, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per phase, of the first pass over a chunk and of a later one."""
    clock = Clock()
    store = type("Store", (RingStore,), {n: clock.wrap(getattr(RingStore, n), p) for n, p in PHASES.items()})
    rotate = clock.wrap(SelfForcing.rotate, "rotate queries")
    adapter = type("Rotating", (SelfForcing,), {"rotate": rotate})()
    chosen = variants(case, args, {"store": store, "adapter": adapter})
    fill(chosen)
    dense: Any = demo.DemoCausalSelfAttention
    rows = []
    with ExitStack() as stack:
        for owner, name, phase in (
            (nn.functional, SDPA, "attend"),
            (demo, "rotate", "rotate queries and keys"),
            (dense, "_append", "write chunk"),
        ):
            counted = clock.wrap(getattr(owner, name), phase)
            stack.enter_context(mock.patch.object(owner, name, counted))
        for variant in chosen:
            phases: dict[str, dict[str, float]] = {}
            for chunk in range(repeats + 1):
                for number in range(2):
                    clock.seconds.clear()
                    with clock.phase("other"):
                        variant.run(number)
                    if chunk:
                        for phase, seconds in clock.seconds.items():
                            row = phases.setdefault(phase, {})
                            key = "later" if number else "first"
                            row[key] = min(row.get(key, math.inf), 1e3 * seconds)
                variant.chunk += 1
            rows.append({"variant": variant.name, "phases": phases})
    return rows


# What is shown ------------------------------------------------------------------------------------


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "device": args.device
        if args.device == "cpu"
        else torch.get_device_module(args.device).get_device_name(),
        "heads": f"{HEADS} x {HEAD_DIM}, {'neighbours' if args.contiguous else 'scattered'}",
        "chunk": f"{CHUNK} frames, {PASSES} passes, window {WINDOW}",
        "warm_up": f"{FILL} chunks without softmax attention, then 2 passes with it",
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


def show_profile(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Phases of every variant, in milliseconds."""
    for row in rows:
        table = Table("phase", "first pass, ms", "later pass, ms", title=row["variant"])
        for phase, cost in sorted(row["phases"].items(), key=lambda item: -item[1].get("first", 0.0)):
            table.add_row(phase, f"{cost.get('first', 0.0):.2f}", f"{cost.get('later', 0.0):.2f}")
        console.print(table)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grids", nargs="+", default=["15x26", "30x52"], help="patches per frame, HxW")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--repeats", type=int, default=6, help="timed chunks; larger grids take fewer, at least 2"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    parser.add_argument("--presets", action="store_true", help="a row per preset instead of the mixes")
    parser.add_argument("--contiguous", action="store_true", help="heads of one role are neighbours")
    parser.add_argument("--profile", action="store_true", help="also show where the time goes")
    parser.add_argument(
        "--quick", action="store_true", help="the smaller grid only, 2 chunks: about a minute"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/attention.json"))
    args = parser.parse_args()
    if args.quick:
        args.grids, args.repeats = args.grids[:1], 2
    return args


def main() -> None:
    """Measures, shows, and writes the JSON file."""
    args, console = arguments(), Console(width=110)
    if args.threads:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"machine": machine(args), "cases": []}
    console.print(report["machine"])
    for grid in args.grids:
        height, width = map(int, grid.split("x"))
        for dtype in args.dtypes:
            case = Case(height, width, getattr(torch, dtype), args.device)
            chosen = variants(case, args, {})
            fill(chosen)
            repeats = max(2, round(args.repeats * min(1.0, 390 / case.tokens)))
            taken = measure(chosen, repeats)
            with without_softmax_attention():
                rest = measure(chosen, repeats)
            rows = summary(chosen, taken, rest)
            found: dict[str, Any] = {"case": str(case), "chunks": repeats, "variants": rows}
            found["identity_differs_by"] = agreement(chosen)
            del chosen
            show(console, f"{case}; best of {repeats} chunks", rows)
            found["load_average"] = os.getloadavg()
            console.print(
                f"identity differs from dense by {found['identity_differs_by']:g}; median over best chunk "
                f"of dense {rows[0]['median_wall'] / rows[0]['best_wall']:.2f}; "
                f"load {found['load_average'][0]:.1f}\n"
            )
            if args.profile:
                found["profile"] = profile(case, args, 2)
                show_profile(console, found["profile"])
            report["cases"].append(found)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
