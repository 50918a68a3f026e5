"""What the commands share: options, clean errors, JSON, progress."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from headforcing.errors import HeadForcingError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

Tell = Callable[[str, int, int | None], None]
"""Called with the name of a stage, what is done of it and how much there is, where that is known."""


def fail(message: object, code: int = 2) -> NoReturn:
    """One line on stderr and the exit code."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def clean_errors() -> Iterator[None]:
    """One message and exit code 2 instead of a traceback, for what a user can put right."""
    try:
        yield
    except (HeadForcingError, ValueError, OSError) as error:
        fail(error)


def require(libraries: Sequence[str], extra: str, what: str) -> None:
    """Exit code 2 where a library is missing, with the extra that brings it."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{what} needs {', '.join(missing)}: pip install 'headforcing[{extra}]'")


def print_json(value: Any) -> None:
    """A value as JSON, which has no NaN."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def print_parts(*parts: Any) -> None:
    """Rich tables and plain text, in order; text is printed as it is."""
    from rich.console import Console

    console = Console()
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(part)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Tell]:
    """Tells progress with a bar per stage on a terminal, as plain lines in a pipe, or not at all."""
    if quiet:
        yield lambda *_: None
    elif not sys.stderr.isatty():
        yield _plain_lines
    else:
        with _bars() as tell:
            yield tell


def _plain_lines(stage: str, done: int, total: int | None) -> None:
    """Progress as four lines per stage; every step where the end is not known."""
    if total is None:
        typer.echo(f"{stage}: {done}", err=True)
    elif done * 4 // max(total, 1) > (done - 1) * 4 // max(total, 1):
        typer.echo(f"{stage}: {done}/{total}", err=True)


@contextmanager
def _bars() -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield tell
