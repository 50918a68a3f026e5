"""What profiling costs: the same rollout of the demo model unprofiled, and with each set of metrics.

python benchmarks/profiling.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from headforcing.demo import DemoPipeline, demo_model
from headforcing.demo.world import sample_scene
from headforcing.profiler import METRICS, Protocol, profile_heads

CHUNKS = 12


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Shortest wall time, after one round of warm-up."""
    run()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Cost of profiling the demo model.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = demo_model()
    prompts = sample_scene(given.batch, torch.Generator().manual_seed(0)).prompts(torch.arange(CHUNKS))

    def make() -> torch.Tensor:
        return DemoPipeline(model).generate(prompts, generator=torch.Generator().manual_seed(1))

    plain = seconds(make, given.rounds)
    sampled = Protocol(starts=range(12, 3 * CHUNKS, 9))
    cases: dict[str, Callable[[], Any]] = {
        "attention_mass, every pass": lambda: profile_heads(model, make, ["attention_mass"]),
        "all but output_regret, every pass": lambda: profile_heads(model, make, METRICS[:3]),
        "all metrics, every pass": lambda: profile_heads(model, make),
        "all metrics, every third chunk": lambda: profile_heads(model, make, protocol=sampled),
    }
    table = Table(
        "measured", "seconds", "ratio", title=f"{CHUNKS} chunks, batch {given.batch}, {torch.__version__}"
    )
    table.add_row("nothing", f"{plain:.2f}", "1.00")
    numbers = {"nothing": plain}
    for name, run in cases.items():
        numbers[name] = seconds(run, given.rounds)
        table.add_row(name, f"{numbers[name]:.2f}", f"{numbers[name] / plain:.2f}")
    console = Console()
    console.print(table)
    console.print(f"CPU, {given.threads} thread, shortest of {given.rounds} rounds after one of warm-up")
    if given.out:
        given.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
