"""What the benchmarks share: cases, taking turns pass by pass, the machine, softmax attention left out.

Whatever is compared takes turns pass by pass, in rotating order, so that a slower minute of the machine
falls on all of it. Of every pass the best repeat counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from headforcing.attention.backends import Part, find_backend
from headforcing.demo.model import attention as demo

WINDOW, CHUNK, PASSES = 21, 3, 5
FILL = 12
"""Chunks before the first timed one: 36 frames, so that every memory is full and has evicted."""
CLOCKS = ("wall", "cpu")


@dataclass(frozen=True)
class Case:
    """One size and precision that all variants are run at.

    Attributes:
        height: patches of a frame, one above the other.
        width: patches of a frame, side by side.
        dtype: of weights, keys and values.
        device: where they are.
        heads: of a layer.
        head_dim: channels of a head.
        window: frames that the dense side attends to.
        rope_rows: frames after which the dense side's table of positions ends.
    """

    height: int
    width: int
    dtype: torch.dtype
    device: str
    heads: int = 12
    head_dim: int = 128
    window: int = WINDOW
    rope_rows: int = 1024

    @property
    def tokens(self) -> int:
        """Tokens of one frame."""
        return self.height * self.width

    @property
    def kind(self) -> str:
        """Name of the dtype."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.kind}, {self.height}x{self.width} = {self.tokens} tokens per frame, {self.device}"


class Runs(Protocol):
    """What takes turns: a video that goes on and on.

    Attributes:
        chunk: number of the chunk that has its turn.
    """

    chunk: int

    def run(self, number: int) -> object:
        """One pass over the chunk that has its turn, until the device is done."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one pass: of the clock on the wall, and of all threads of the processor."""

    wall: float
    cpu: float


Chunks = Sequence[Sequence[Sample]]
"""Samples `[chunk][pass]`."""


class Deadline:
    """When to stop beginning things.

    Args:
        minutes: from now; `None`: never.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self._end


class Counted:
    """A backend that counts what it is shown, and can be told to leave out its work.

    Args:
        name: of the backend.

    Attributes:
        seen: frames that a query of a call saw, mean over heads.
        tokens: of one frame.
        leaves_out: whether calls return zeros, of every backend.
    """

    leaves_out = False

    def __init__(self, name: str, tokens: int) -> None:
        self.name, self.tokens, self.attend = name, tokens, find_backend(name)
        self.seen: list[float] = []

    def __call__(self, parts: Sequence[Part], num_heads: int) -> Tensor:
        """See `headforcing.attention.backends.Attend`."""
        pairs = sum(len(part.heads) * part.q.shape[1] * part.k.shape[1] for part in parts)
        queries = sum(len(part.heads) * part.q.shape[1] for part in parts)
        self.seen.append(pairs / queries / self.tokens)
        if not self.leaves_out:
            return self.attend(parts, num_heads)
        q = parts[0].q
        rows = max(part.rows.stop or part.q.shape[1] for part in parts)
        return q.new_zeros(q.shape[0], rows, num_heads, q.shape[3])


@contextmanager
def without_softmax_attention() -> Iterator[None]:
    """Leaves out self-attention on both sides while entered, zeros in its place: no cache keeps a trace."""
    with (
        mock.patch.object(Counted, "leaves_out", True),
        mock.patch.object(demo, "attend", lambda q, k, v: torch.zeros_like(q)),
    ):
        yield


def measure(chosen: Sequence[Runs], repeats: int, deadline: Deadline | None = None) -> list[Chunks]:
    """Samples per variant; a first chunk of two passes is thrown away, and one is measured in any case."""
    taken: list[list[list[Sample]]] = [[] for _ in chosen]
    for chunk in range(repeats + 1):
        if chunk > 1 and deadline is not None and deadline.passed:
            break
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


def best(chunks: Chunks, clock: str, cycle: int = 1) -> float:
    """Seconds of a chunk, of every pass the best; mean over the chunks of a cycle."""
    turns = [chunks[turn::cycle] for turn in range(min(cycle, len(chunks)))]
    bests = [sum(min(getattr(chunk[i], clock) for chunk in turn) for i in range(PASSES)) for turn in turns]
    return sum(bests) / len(bests)


def median(chunks: Chunks, clock: str, cycle: int = 1) -> float:
    """Seconds of the median chunk, whatever its place in the cycle."""
    return statistics.median(sum(getattr(sample, clock) for sample in chunk) for chunk in chunks)


def finish(device: str) -> None:
    """Waits until the device has done what it was asked for."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    name = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        names = [line for line in cpus.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "device": device if device == "cpu" else torch.get_device_module(device).get_device_name(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """What was measured; `None` outside of a checkout."""
    if (git := shutil.which("git")) is None:
        return None
    asked, here = [git, "describe", "--always", "--dirty"], Path(__file__).parent
    said = subprocess.run(asked, capture_output=True, text=True, cwd=here, check=False)  # noqa: S603
    return said.stdout.strip() or None


def common_arguments(description: str, out: str) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: what torch chooses")
    parser.add_argument("--backend", default="sdpa", help="attention of the head-forced side, by name")
    parser.add_argument("--store", default="ring", help="where its keys and values live, by name")
    parser.add_argument("--minutes", type=float, help="begin nothing more when they are over")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def prepare(device: str, threads: int | None) -> None:
    """Makes `cuda:1` the device of everything that names none, and sets the threads of the CPU."""
    asked = torch.device(device)
    if asked.type in ("cuda", "xpu") and asked.index is not None:
        torch.get_device_module(device).set_device(device)
    if threads:
        torch.set_num_threads(threads)


def write(path: Path, report: dict[str, Any]) -> None:
    """The report as JSON, which has no NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
