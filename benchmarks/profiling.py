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
from headforcing.demo.profiled import demo_rollouts, profile_demo
from headforcing.demo.world.scene import sample_scene
from headforcing.measure.profiler import METRICS, Protocol, profile_heads

CHUNKS = 12
VIDEOS = 4


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

    def default() -> None:
        run, texts, _ = demo_rollouts(model, videos=VIDEOS, seed=0, long=False)
        for text in texts:
            run(text)

    sampled = Protocol(starts=range(12, 3 * CHUNKS, 9))
    long = f"{CHUNKS} chunks, batch {given.batch}"
    plain = {long: seconds(make, given.rounds), "headforcing profile": seconds(default, given.rounds)}
    cases: dict[str, tuple[str, Callable[[], Any]]] = {
        "all metrics, as by default": (
            "headforcing profile",
            lambda: profile_demo(model, videos=VIDEOS, seed=0),
        ),
        "attention_mass, every pass": (long, lambda: profile_heads(model, make, ["attention_mass"])),
        "all but output_regret, every pass": (long, lambda: profile_heads(model, make, METRICS[:3])),
        "all metrics, every pass": (long, lambda: profile_heads(model, make)),
        "all metrics, every third chunk": (long, lambda: profile_heads(model, make, protocol=sampled)),
    }
    table = Table("rollout", "measured", "seconds", "ratio", title=f"torch {torch.__version__}, CPU")
    numbers = {f"{rollout}: nothing": value for rollout, value in plain.items()}
    for rollout, value in plain.items():
        table.add_row(rollout, "nothing", f"{value:.2f}", "1.00")
    for name, (rollout, run) in cases.items():
        took = numbers[f"{rollout}: {name}"] = seconds(run, given.rounds)
        table.add_row(rollout, name, f"{took:.2f}", f"{took / plain[rollout]:.2f}")
    console = Console()
    console.print(table)
    console.print(f"{given.threads} thread, shortest of {given.rounds} rounds after one of warm-up")
    if given.out:
        given.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
