"""Where the time of an attention call goes, with clocks around its parts. For a CPU: nothing waits for it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table
from torch import nn

from headforcing.demo.model import attention as demo
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.stores import store_class

SDPA = "scaled_dot_product_attention"


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
    "_commit_before": "move history",
    "_begin": "move history",
    "check": "check for NaN",
    "_stage": "write chunk",
    "view": "view",
}


def phases(make: Callable[[dict[str, Any]], Sequence[Any]], repeats: int, store: str) -> list[dict[str, Any]]:
    """Milliseconds per phase, of the first pass over a chunk and of a later one.

    Args:
        make: makes variants whose memory is full, with options for head forcing.
        repeats: chunks of which the best counts.
        store: where keys and values live, by name.
    """
    clock, own = Clock(), store_class(store)
    timed = type(
        "Timed", (own,), {name: clock.wrap(getattr(own, name), phase) for name, phase in PHASES.items()}
    )
    rotate = clock.wrap(SelfForcing.rotate, "rotate queries")
    adapter = type("Rotating", (SelfForcing,), {"rotate": rotate})()
    chosen = make({"store": timed, "adapter": adapter})
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


def show_phases(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Phases of every variant, in milliseconds."""
    for row in rows:
        table = Table("phase", "first pass, ms", "later pass, ms", title=row["variant"])
        for phase, cost in sorted(row["phases"].items(), key=lambda item: -item[1].get("first", 0.0)):
            table.add_row(phase, f"{cost.get('first', 0.0):.2f}", f"{cost.get('later', 0.0):.2f}")
        console.print(table)
