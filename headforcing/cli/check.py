"""`headforcing check`: run the conformance kit on an adapter."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headforcing.cli.console import AsJson, clean_errors, examples, print_json, print_parts, progress
from headforcing.cli.target import importable_here, kind, named
from headforcing.errors import HeadForcingError, OptionError

if TYPE_CHECKING:
    from headforcing.adapters.base import Adapter
    from headforcing.testing.conformance import Report
    from headforcing.testing.host import Host

EXAMPLES = examples(
    "check my_adapter:MyAdapter --stop",
    "check my_adapter:MyAdapter --host my_host:MyHost",
    "check my_host:MyHost --adapter my_adapter:MyAdapter --json",
)
COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:ADAPTER|MODULE:HOST",
            show_default=False,
            help="An adapter; its host is --host, or else the only host in its module. Or a subclass of "
            "headforcing.testing.Host; its adapter is --adapter, or else its attribute adapter, or else the "
            "one that fits. Classes, instances, or functions that return one.",
        ),
    ],
    host: Annotated[
        str | None, typer.Option(metavar="MODULE:HOST", help="The host to run the adapter with.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="MODULE:ADAPTER", help="The adapter to check with a host.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Checks to run, separated by commas. [default: all]")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Stop at the first failure.")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Run the conformance kit on an adapter: what is wrong, and what to check.

    Exit code 1 if a check fails. Fix the first failure first: later ones may be consequences of it.
    """
    from headforcing.testing.conformance import check_adapter

    names = None if only is None else [name.strip() for name in only.split(",")]
    with clean_errors(HeadForcingError), importable_here():
        what, driver = _pair(target, host, adapter)
        with progress(quiet=quiet or as_json) as tell:

            def step(done: int, total: int, name: str) -> None:
                tell(type(driver).__name__, done, total)

            report = check_adapter(what, driver, only=names, stop=stop, progress=step)
    if as_json:
        print_json({**dataclasses.asdict(report), "ok": report.ok})
    else:
        print_parts(_table(report), _summary(report))
    if report.failed:
        raise typer.Exit(1)


def _pair(target: str, host: str | None, adapter: str | None) -> tuple[Adapter | None, Host]:
    """The adapter and the host: one is the target, the other is given or found.

    Raises:
        OptionError: a name is neither, there is no host, or the host cannot run here.
    """
    from headforcing.adapters.base import Adapter
    from headforcing.testing.host import Host

    found = _made(target)
    what = found if isinstance(found, Adapter) else None if adapter is None else adapter_named(adapter)
    driver = found if isinstance(found, Host) else None if host is None else _made(host)
    if isinstance(found, Host) and host is not None:
        raise OptionError(f"{target} is a host itself: leave out --host, or name an adapter instead")
    if isinstance(found, Adapter) and adapter is not None:
        raise OptionError(f"{target} is an adapter itself: leave out --adapter, or name a host instead")
    if not isinstance(found, Adapter | Host):
        wanted = "headforcing.Adapter or headforcing.testing.Host"
        raise OptionError(f"{target} is {kind(found)}: expected a subclass of {wanted}")
    driver = _only_host(target) if driver is None else driver
    if not isinstance(driver, Host):
        raise OptionError(f"{host} is {kind(driver)}: expected a subclass of headforcing.testing.Host")
    if (reason := driver.missing()) is not None:
        raise OptionError(f"{target} cannot be checked here: {reason}")
    return what, driver


def adapter_named(target: str) -> Adapter:
    """The adapter that `MODULE:ADAPTER` names.

    Raises:
        OptionError: there is none.
    """
    from headforcing.adapters.base import Adapter

    found = _made(target)
    if not isinstance(found, Adapter):
        raise OptionError(f"{target} is {kind(found)}: expected a subclass of headforcing.Adapter")
    return found


def _made(target: str) -> Any:
    """The object that `MODULE:NAME` names; a class or a function is called."""
    found = named(target, "my_adapter:MyAdapter")
    return found() if callable(found) else found


def _only_host(target: str) -> Host:
    """The host that the module of an adapter defines.

    Raises:
        OptionError: it defines none, or several.
    """
    from headforcing.testing.host import Host

    where = target.partition(":")[0]
    hosts = [
        value
        for value in vars(sys.modules[where]).values()
        if isinstance(value, type) and issubclass(value, Host) and not inspect.isabstract(value)
    ]
    own = list(dict.fromkeys(one for one in hosts if one.__module__ == where))
    if len(own) != 1:
        names = f" ({', '.join(one.__name__ for one in own)})" if own else ""
        raise OptionError(
            f"{where} defines {len(own) or 'no'} subclass{'es' * (len(own) > 1)} of headforcing.testing.Host"
            f"{names}: say which host to use, as in check {target} --host my_host:MyHost"
        )
    return own[0]()


def _table(report: Report) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{report.adapter} with {report.host}", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("outcome")
    table.add_column("what it proves, or the reason")
    for result in report.results:
        outcome = Text(result.outcome, style=COLOURS[result.outcome])
        told = " ".join([result.proves, *([f"Measured: {result.measured}"] if result.measured else [])])
        table.add_row(result.name, outcome, Text(result.reason or told))
    return table


def _summary(report: Report) -> str:
    first = f"; begin with {report.failed[0].name}" if report.failed else ""
    return f"{report.adapter}: {report.summary}{first}"
