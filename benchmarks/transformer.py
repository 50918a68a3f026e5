"""What a whole transformer of the shapes of Wan takes per chunk: dense, head-forced, and StreamingLLM.

Random weights, real shapes, 4 denoise passes and the clean one. All variants share the weights and take turns
pass by pass in one run. Every block is alike, so fewer than the model has can be run (`--layers`); numbers
are for those that ran. See README.md in this folder.

    python benchmarks/transformer.py --quick
    python benchmarks/transformer.py                                   # on a CUDA machine
    python benchmarks/transformer.py --models wan-1.3b --grids 16x24 --layers 1 --threads 1   # on a CPU
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerator import accelerator_facts, allocated
from attention_presets import cycle_of
from measuring import (
    CHUNK,
    FILL,
    PASSES,
    Case,
    Chunks,
    Counted,
    Deadline,
    best,
    common_arguments,
    finish,
    measure,
    median,
    prepare,
    without_softmax_attention,
)
from mixes import Mix, beside_streaming, runnable
from reporting import report_cases
from rich.console import Console
from rich.table import Table
from torch import Tensor
from wan_shaped import CHANNELS, PATCH, SHAPES, TEXT_CHANNELS, TEXT_TOKENS, WanShaped, random_model

import headforcing as hf
from headforcing.cli.amounts import parse_grid

SCOPE = "whole transformer: embeddings, self- and cross-attention, MLP, head"
WARM_UP = f"{FILL} chunks through self-attention without its softmax, then 2 whole passes"
TIMES = (1000.0, 937.5, 833.3, 625.0, 0.0)
"""Of the passes, as Self Forcing has them; only the last one, the clean pass, means anything here."""
PRESETS = ["head_forcing", "pyramid_forcing"]


class Video:
    """One variant: a model that shares its weights with the others, and a video that goes on and on."""

    def __init__(self, mix: Mix, case: Case, model: WanShaped, text: Any, args: argparse.Namespace) -> None:
        self.mix, self.case, self.text, self.chunk = mix, case, text, 0
        before = allocated(case.device)
        self.model = model.twin()
        self.caches = self.model.caches(1, case.window * case.tokens)
        self.backend = Counted(args.backend, case.tokens)
        self.handle: Any = None
        if mix.roles:
            self.handle = hf.apply_head_forcing(
                self.model,
                [mix.roles] * len(self.model.blocks),
                window=case.window,
                backend=self.backend,
                store=args.store,
            )
        self.call = torch.compile(self.model) if args.compile else self.model
        self.cycle = cycle_of(mix.roles, case.window, CHUNK)
        self._fill()
        self.allocated = None if before is None else (allocated(case.device) or 0) - before

    @property
    def attended(self) -> float:
        """Frames that a query saw, mean over heads and over the passes of whole cycles that were run last."""
        last = self.backend.seen[-PASSES * self.cycle * len(self.model.blocks) :]
        return sum(last) / len(last) if last else float(self.case.window)

    @property
    def stored(self) -> int:
        """Bytes of keys and values that are held."""
        if self.handle is not None:
            return int(self.handle.status().stored_bytes)
        return sum(cache[name].nbytes for cache in self.caches for name in ("k", "v"))

    def run(self, number: int) -> Tensor:
        """One pass over the chunk that has its turn, until the device is done."""
        out = self.launch(number)
        finish(self.case.device)
        return out

    def launch(self, number: int) -> Tensor:
        """One pass, which nobody waits for."""
        case = self.case
        x = latents(case, self.chunk, number)
        t = torch.full((1, CHUNK), TIMES[number], device=case.device)
        with torch.no_grad():
            out: Tensor = self.call(x, t, self.text, self.caches, self.chunk * CHUNK * case.tokens)
        return out

    def _fill(self) -> None:
        """Brings the memory into steady state, by self-attention alone and without softmax."""
        case, model = self.case, self.model
        grid, like = torch.tensor([[CHUNK, case.height, case.width]]), model.head.weight
        lengths = torch.full((1,), CHUNK * case.tokens)
        generator = torch.Generator(case.device).manual_seed(1)
        shape = (1, CHUNK * case.tokens, model.config.dim)
        with torch.no_grad(), without_softmax_attention():
            for _ in range(FILL):
                x = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
                for block, cache in zip(model.blocks, self.caches, strict=True):
                    start = self.chunk * CHUNK * case.tokens
                    block.self_attn(x, lengths, grid, model.freqs, None, cache, start, None)
                self.chunk += 1


def latents(case: Case, chunk: int, number: int) -> Tensor:
    """Noisy frames of a pass, the same ones for every variant."""
    generator = torch.Generator(case.device).manual_seed(PASSES * chunk + number)
    shape = (1, CHANNELS, CHUNK, case.height * PATCH, case.width * PATCH)
    return torch.randn(shape, generator=generator, device=case.device).to(case.dtype)


# One case -----------------------------------------------------------------------------------------


def measured(
    name: str, case: Case, only: Sequence[str], args: argparse.Namespace, deadline: Deadline
) -> dict[str, Any]:
    """All variants of one model on one grid."""
    shape = SHAPES[name]
    layers = args.layers or shape.layers
    model = random_model(
        shape, layers, case.dtype, case.device, chunk=CHUNK, window=case.window, tokens=case.tokens
    )
    words = torch.randn(1, TEXT_TOKENS, TEXT_CHANNELS, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        text = model.project_text(words.to(case.device, case.dtype))
    mixes, left_out = beside_streaming(case, list(only), args.store)
    videos = [Video(mix, case, model, text, args) for mix in mixes]
    apart = agreement(videos)
    taken = measure(videos, args.repeats, deadline)
    with without_softmax_attention():
        rest = measure(videos, 1, deadline)
    rows = [
        row_of(video, chunks, others, taken[0], args) | accelerator_facts(video, case.device, args.chunks)
        for video, chunks, others in zip(videos, taken, rest, strict=True)
    ]
    found = {
        "case": f"{name}, {layers} of {shape.layers} layers, {case}",
        "model": name,
        "grid": [case.height, case.width],
        "layers": layers,
        "chunks": len(taken[0]),
        "rows": rows,
        "left_out": left_out,
        "load_average": os.getloadavg(),
        **apart,
    }
    if args.extrapolate:
        found["extrapolated"] = {row["variant"]: row["best_wall"] * shape.layers / layers for row in rows}
    return found


def agreement(videos: Sequence[Video]) -> dict[str, float]:
    """Largest difference between dense and the variant that must equal it, and the largest value."""
    dense, same = (video.run(0).float() for video in (videos[0], videos[-1]))
    return {
        "identity_differs_by": float((dense - same).abs().max()),
        "largest_value": float(dense.abs().max()),
    }


def row_of(
    video: Video, chunks: Chunks, others: Chunks, dense: Chunks, args: argparse.Namespace
) -> dict[str, Any]:
    """The row of one variant, relative to dense attention."""
    case, forced, layers = video.case, video.handle is not None, len(video.model.blocks)
    seconds, rest = best(chunks, "wall", video.cycle), best(others, "wall")
    return {
        "variant": video.mix.name,
        "equals": video.mix.equals,
        "scope": SCOPE,
        "warm_up": WARM_UP,
        "backend": video.backend.name if forced else "sdpa, of the host",
        "store": args.store if forced else "the host's cache",
        "dtype": case.kind,
        "device": case.device,
        "compiled": args.compile,
        "layers": layers,
        "frames": video.attended,
        "ideal": video.attended / case.window,
        "best_wall": seconds,
        "best_wall_ratio": seconds / best(dense, "wall"),
        "median_wall": median(chunks, "wall"),
        "median_wall_ratio": median(chunks, "wall") / median(dense, "wall"),
        "per_layer": seconds / layers,
        "rest_wall": rest,
        "attention_share": 1 - rest / seconds,
        "stored_bytes": video.stored,
        "allocated_bytes": video.allocated,
        "released_bytes": int(video.handle.status().released_bytes) if forced else 0,
        "roles": [str(role) for role in video.mix.roles],
        "passes": [[sample.wall for sample in chunk] for chunk in chunks],
    }


# What is asked for, and shown ---------------------------------------------------------------------


def show(console: Console, found: dict[str, Any]) -> None:
    """The table of one case."""
    columns = ("variant", "frames", "s/chunk", "ratio", "ideal", "attention", "MB", "syncs", "growth")
    table = Table(*columns, title=f"{found['case']}; best of {found['chunks']} chunks")
    for row in found["rows"]:
        table.add_row(
            row["variant"],
            f"{row['frames']:.1f}",
            f"{row['best_wall']:.3f}",
            f"{row['best_wall_ratio']:.3f}",
            f"{row['ideal']:.3f}",
            f"{row['attention_share']:.0%}",
            f"{row['stored_bytes'] / 1e6:.0f}",
            *("-" if row[name] is None else f"{row[name]:g}" for name in ("host_syncs", "growth_bytes")),
        )
    console.print(table)
    for row in found["rows"]:
        for other in row["equals"]:
            console.print(f"{row['variant']}: as many {other}")
        if row["sync_places"]:
            console.print(f"{row['variant']}: the host waits at {', '.join(row['sync_places'])}")
    console.print(
        f"identity differs from dense by {found['identity_differs_by']:g}, largest value "
        f"{found['largest_value']:.2g}; load {found['load_average'][0]:.1f}"
    )
    for name, seconds in found.get("extrapolated", {}).items():
        console.print(
            f"extrapolated to all layers, embeddings counted as often: {name} {seconds:.3f} s/chunk"
        )
    console.print(*found["left_out"], "", sep="\n")


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = common_arguments(__doc__.splitlines()[0], "runs/bench/transformer.json")
    parser.add_argument("--models", nargs="+", default=["wan-1.3b", "wan-14b"], choices=[*SHAPES])
    parser.add_argument("--grids", nargs="+", default=["30x52", "45x80"], help="patches per frame, HxW")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--presets", nargs="+", default=PRESETS, help="beside dense and StreamingLLM")
    parser.add_argument("--layers", type=int, default=2, help="blocks that run; 0: as many as the model has")
    parser.add_argument("--repeats", type=int, default=4, help="timed chunks")
    parser.add_argument("--chunks", type=int, default=4, help="chunks of which an accelerator tells memory")
    parser.add_argument("--compile", action="store_true", help="compile the model around its attention")
    parser.add_argument("--extrapolate", action="store_true", help="also seconds for all layers")
    args = parser.parse_args()
    if args.compile:  # one compilation per variant and shape
        torch._dynamo.config.cache_size_limit = 256
    if args.quick:
        args.models, args.grids, args.dtypes, args.repeats = ["tiny"], ["4x6", "5x6"], ["float32"], 1
    prepare(args.device, args.threads)
    return args


def main() -> None:
    """Measures, shows, and writes the JSON file."""
    args, console = arguments(), Console(width=120)
    head = (
        f"{SCOPE}; {WARM_UP}; chunks of {CHUNK} frames, {PASSES} passes; backend {args.backend}, store "
        f"{args.store}, device {args.device}, compiled {args.compile}"
    )
    asked = [
        (f"{name}, {case}", partial(measured, name, case, presets, args))
        for name, whole in cases_of(args)
        for case, presets in runnable(whole, args.presets)
    ]
    report_cases(console, args, head, asked, partial(show, console))


def cases_of(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Every model on every grid in every dtype."""
    for name, grid, dtype in itertools.product(args.models, args.grids, args.dtypes):
        heads, head_dim = SHAPES[name].heads, SHAPES[name].dim // SHAPES[name].heads
        yield name, Case(*parse_grid(grid), getattr(torch, dtype), args.device, heads, head_dim)


if __name__ == "__main__":
    main()
