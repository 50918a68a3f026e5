"""What only an accelerator tells of a variant: its allocator, and where the host waits for the device."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from measuring import PASSES, finish

FACTS = ("pass_bytes", "growth_bytes", "host_syncs", "sync_places")


class Launches(Protocol):
    """A video that goes on and on.

    Attributes:
        chunk: number of the chunk that has its turn.
    """

    chunk: int

    def launch(self, number: int) -> object:
        """One pass over the chunk that has its turn, which nobody waits for."""


def allocated(device: str) -> int | None:
    """Bytes that the allocator has given away; `None`: it does not say."""
    return None if device == "cpu" else int(torch.get_device_module(device).memory_allocated())


def accelerator_facts(video: Launches, device: str, chunks: int) -> dict[str, Any]:
    """Of some chunks of one variant alone; all `None` on a CPU, which does not tell.

    `pass_bytes` is the most that was allocated at once beside what was there before, `growth_bytes` what is
    left of it at the end, `host_syncs` how often the host waited per chunk, `sync_places` in which lines.
    """
    if device == "cpu":
        return dict.fromkeys(FACTS)
    module = torch.get_device_module(device)
    finish(device)
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    places: list[str] = []
    for _ in range(chunks):
        places += _syncs(video, module)
        video.chunk += 1
    finish(device)
    most, growth = module.max_memory_allocated() - before, module.memory_allocated() - before
    return dict(zip(FACTS, (most, growth, len(places) / chunks, sorted(set(places))), strict=True))


def let_go(device: str) -> None:
    """Gives back what the last case held, so that the next one has room."""
    gc.collect()
    if device != "cpu":
        torch.get_device_module(device).empty_cache()


def _syncs(video: Launches, module: Any) -> list[str]:
    """Where the host waits for the device in the passes over one chunk."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        module.set_sync_debug_mode("warn")
        try:
            for number in range(PASSES):
                video.launch(number)
        finally:
            module.set_sync_debug_mode("default")
    found = [one for one in heard if "called a synchronizing" in str(one.message)]
    return [f"{Path(one.filename).name}:{one.lineno}" for one in found]
