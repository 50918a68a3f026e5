"""`headforcing check`: does an adapter keep what it promises?"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headforcing.cli.console import AsJson, clean_errors, examples, print_json, print_parts, progress
from headforcing.cli.target import importable_here, kind, named
from headforcing.errors import HeadForcingError, OptionError

if TYPE_CHECKING:
    from headforcing.testing.conformance import Report
    from headforcing.testing.host import Host

EXAMPLES = examples(
    "check", "check self_forcing", "check my_host:MyHost --stop", "check my_host:MyHost --json"
)
COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


def check(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:HOST]",
            show_default=False,
            help="A subclass of headforcing.testing.Host, or a function that returns one; its attribute "
            "adapter says what is checked. Or the name of one of our adapters. Without it: all of them.",
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Checks to run, separated by commas. [default: all]")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Stop at the first failure.")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Run the conformance kit: what an adapter gets wrong, and what to look at.

    Exit code 1 where a check fails. Begin with the first that does: the others may be its consequences.
    """
    from headforcing.testing.conformance import check_adapter

    names = None if only is None else [name.strip() for name in only.split(",")]
    reports = []
    with clean_errors(HeadForcingError), importable_here():
        hosts, missing = _hosts(target)
        with progress(quiet=quiet or as_json) as tell:
            for host in hosts:
                kind = type(host).__name__

                def told(done: int, total: int, name: str, kind: str = kind) -> None:
                    tell(kind, done, total)

                reports.append(check_adapter(None, host, only=names, stop=stop, progress=told))
    if as_json:
        print_json([{**dataclasses.asdict(report), "ok": report.ok} for report in reports])
    else:
        for report in reports:
            print_parts(_table(report), _summary(report))
        print_parts(*(f"{name}: not checked, {reason}" for name, reason in missing.items()))
    if any(report.failed for report in reports):
        raise typer.Exit(1)


def _hosts(target: str | None) -> tuple[list[Host], dict[str, str]]:
    """What is to be checked, and which of ours cannot be here, with the reason.

    Raises:
        OptionError: there is no such adapter, it cannot be checked here, or the name stands for something
            else.
    """
    from headforcing.testing.host import Host
    from headforcing.testing.hosts import find_host, host_names

    if target is None:
        ours = {name: find_host(name) for name in host_names()}
        missing = {name: reason for name, host in ours.items() if (reason := host.missing()) is not None}
        return [host for name, host in ours.items() if name not in missing], missing
    if ":" not in target:
        if target not in host_names():
            raise OptionError(f"{target!r} is neither MODULE:HOST nor one of {', '.join(host_names())}")
        host = find_host(target)
        if (reason := host.missing()) is not None:
            raise OptionError(f"{target} cannot be checked here: {reason}")
        return [host], {}
    made = named(target, "my_host:MyHost")
    made = made() if callable(made) else made
    if not isinstance(made, Host):
        raise OptionError(f"{target} is {kind(made)}: expected a subclass of headforcing.testing.Host")
    return [made], {}


def _table(report: Report) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{report.adapter} with {report.host}", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("outcome")
    table.add_column("what it proves, or why not")
    for result in report.results:
        outcome = Text(result.outcome, style=COLOURS[result.outcome])
        table.add_row(result.name, outcome, Text(result.reason or result.proves))
    return table


def _summary(report: Report) -> str:
    counts = ", ".join(f"{report.count(name)} {name}" for name in ("passed", "failed", "skipped"))
    first = f"; begin with {report.failed[0].name}" if report.failed else ""
    return f"{report.adapter}: {counts}{first}"
