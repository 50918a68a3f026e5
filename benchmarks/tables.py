"""What the benchmarks found, as the tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from headforcing.cli.amounts import in_units


def about(row: dict[str, Any]) -> str:
    """What a table is about, from one of its head-forced rows."""
    return (
        f"Scope: {row['scope']}. Warm-up: {row['warm_up']}. Backend {row['backend']}, store {row['store']}, "
        f"{row['dtype']}, {row['device']}."
    )


def attention(found: dict[str, Any]) -> str:
    """One case of `attention.py`."""
    rows = [
        (
            row["variant"],
            f"{row['frames']:.1f}",
            seconds(row["best_wall"]),
            f"{row['best_wall_ratio']:.3f}",
            f"{row['ideal']:.3f}",
            f"{row['best_wall_over_ideal']:.2f}",
            f"{row['best_cpu_over_ideal']:.2f}",
        )
        for row in found["rows"]
    ]
    columns = ("heads", "frames", "s per chunk", "time ratio", "ideal", "quotient", "by CPU")
    return "\n\n".join(
        [
            f"### {found['case']}",
            f"Best of {found['chunks']} chunks. {about(found['rows'][-1])}",
            markdown(columns, rows),
            f"The last row differs from dense by {found['identity_differs_by']:g}.",
        ]
    )


def transformer(found: dict[str, Any]) -> str:
    """One case of `transformer.py`."""
    rows = [
        (
            row["variant"],
            f"{row['frames']:.1f}",
            seconds(row["best_wall"]),
            seconds(row["per_layer"]),
            f"{row['best_wall_ratio']:.3f}",
            f"{row['ideal']:.3f}",
            f"{row['attention_share']:.0%}",
            in_units(row["stored_bytes"]),
            told(row["allocated_bytes"]),
            told(row["pass_bytes"]),
            told(row["growth_bytes"]),
            "-" if row["host_syncs"] is None else f"{row['host_syncs']:g}",
        )
        for row in found["rows"]
    ]
    columns = (
        *("heads", "frames", "s per chunk", "per layer", "time ratio", "attended", "attention", "stored"),
        *("allocated", "in a pass", "growth", "host waits"),
    )
    notes = [
        f"* {row['variant']}: as many {', as many '.join(row['equals'])}."
        for row in found["rows"]
        if row["equals"]
    ]
    notes += [
        f"* {row['variant']}: the host waits at {', '.join(row['sync_places'])}."
        for row in found["rows"]
        if row["sync_places"]
    ]
    notes += [f"* Not run: {reason}." for reason in found["left_out"]]
    return "\n\n".join(
        [
            f"### {found['case']}",
            f"Best of {found['chunks']} chunks. {about(found['rows'][-1])}",
            markdown(columns, rows),
            f"The last row differs from dense by {found['identity_differs_by']:g}; the largest value is "
            f"{found['largest_value']:.2g}.",
            "\n".join(notes),
        ]
    ).rstrip()


def length(report: dict[str, Any]) -> str:
    """What `length.py` found."""
    flat = [
        (
            row["variant"],
            f"{row['frames']:.1f}",
            f"{1e3 * row['wall']['median']:.2f}",
            *(trend(row[clock]) for clock in ("wall", "cpu")),
        )
        for row in report["flat"]
    ]
    linear = [
        (f"{row['frames']:.0f}", f"{1e3 * row['best_wall']:.2f}", f"{1e3 * row['fitted']:.2f}")
        for row in report["linear"]
    ]
    last = report["linear"][-1]
    return "\n\n".join(
        [
            f"### {report['case']}, {report['flat'][0]['chunks']} chunks",
            about(report["flat"][-1]),
            markdown(("heads", "frames", "ms per chunk", "1,000 chunks more", "by CPU"), flat),
            markdown(("frames", "ms per chunk", "on the line"), linear),
            f"The line: {1e3 * last['fixed']:.2f} ms, and {1e3 * last['per_frame']:.3f} ms per frame; no "
            f"size is further from it than {last['largest_residual']:.1%}.",
        ]
    )


def calls(report: dict[str, Any]) -> str:
    """What `calls.py` found."""
    rows = [
        (
            f"{row['heads']} heads, {row['frames']} frames, {row['dtype']}",
            f"{1e3 * row['one']:.2f}",
            f"{1e3 * row['per_frame']:.2f}",
            f"{row['per_frame'] / row['one']:.2f}",
        )
        for row in report["rows"]
    ]
    columns = ("attended", "one call, ms", "one per query frame, ms", "ratio")
    return "\n\n".join([about(report["rows"][0]), markdown(columns, rows)])


def machine(facts: dict[str, Any]) -> str:
    """What the numbers depend on, as a list."""
    return "\n".join(f"* {name}: {value}" for name, value in facts.items())


def trend(found: dict[str, Any]) -> str:
    """What a thousand chunks more cost, with its interval."""
    if found["per_1000_chunks"] is None:
        return "too few chunks"
    return f"{found['per_1000_chunks']:+.2%} [{found['low']:+.2%}, {found['high']:+.2%}]"


def seconds(count: float) -> str:
    """Four digits."""
    return f"{count:.4g}"


def told(count: int | None) -> str:
    """Bytes, where they are known."""
    return "-" if count is None else in_units(count)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))
