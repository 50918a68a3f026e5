"""From cases to files: what the benchmarks of one module and of a whole transformer do alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from accelerator import let_go
from measuring import Deadline, machine, write
from pictures import draw_ratios
from rich.console import Console


def report_cases(
    console: Console,
    args: argparse.Namespace,
    head: str,
    cases: Iterable[tuple[object, Callable[[Deadline], dict[str, Any]]]],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Measures case by case, shows each, and writes and draws anew all there are.

    Args:
        console: where it is said.
        args: `device`, `minutes` after which no case is begun, and `out`, the JSON file; the picture lies
            beside it.
        head: what all cases have in common.
        cases: what to call a case that is left out, and what measures it until a deadline.
        show: the table of one case.
    """
    deadline = Deadline(args.minutes)
    report: dict[str, Any] = {"machine": machine(args.device), "cases": [], "left_out": []}
    console.print(report["machine"])
    console.print(head)
    for name, measured in cases:
        if deadline.passed:
            report["left_out"].append(f"{name}: no time was left")
            continue
        found = measured(deadline)
        let_go(args.device)
        show(found)
        report["cases"].append(found)
        write(args.out, report)
        draw_ratios(report["cases"], args.out.with_suffix(".png"))
    write(args.out, report)  # also what was left out behind the last case, or instead of all
    console.print(*report["left_out"], f"written to {args.out}", sep="\n")
