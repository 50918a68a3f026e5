"""Shared by the commands: options, error messages, JSON, progress."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, get_type_hints

import typer

from headforcing.errors import HeadForcingError, escaped_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

Tell = Callable[[str, int, int | None], None]
"""Called with the name of a stage, the amount done, and the total, if it is known."""


_PACKAGE = str(Path(__file__).parents[1])
_ENTRY = str(Path(__file__).with_name("__init__.py"))  # which calls typer
_BETWEEN = (contextlib.__file__, importlib.__file__)

Options = TypeVar("Options")
QUIET_SECONDS = 5.0
"""Seconds between progress lines in a pipe, for stages of unknown length."""


def choices(package: str) -> str:
    """Names of the modules in a package, for help texts, without importing them."""
    top, *folders = package.split(".")  # to find a package below would import those above it
    paths = [str(Path(place, *folders)) for place in importlib.import_module(top).__path__]
    return ", ".join(sorted(module.name for module in pkgutil.iter_modules(paths)))


def examples(*lines: str) -> str:
    """The end of a help text: one example command per line."""
    return "\b\n" + "\n".join(["Examples:", *(f"  headforcing {line}" for line in lines)])


def command_of(work: Callable[[Options], None], options: type[Options]) -> Callable[..., None]:
    """A command with one option per field of a dataclass, for commands with many options.

    Args:
        work: runs the command; its docstring is the help text.
        options: a dataclass whose fields are annotated like parameters of a typer command.
    """

    def command(**given: Any) -> None:
        work(options(**given))

    hints = get_type_hints(options, include_extras=True)
    fields = inspect.signature(options).parameters.values()
    parameters = [field.replace(annotation=hints[field.name]) for field in fields]
    command.__doc__ = work.__doc__
    command.__annotations__ = {name: hints[name] for name in (field.name for field in parameters)}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def say(text: object, *, err: bool = False) -> None:
    """Prints text: the one way to do so, because what comes from a file must not drive the terminal."""
    typer.echo(escaped_lines(str(text)), err=err)


def fail(message: object, code: int = 2) -> NoReturn:
    """Prints one line on stderr and exits with the code."""
    line = "; ".join(part.strip() for part in str(message).splitlines() if part.strip())
    say(f"error: {line}", err=True)
    raise typer.Exit(code)


def show_error(_: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints a traceback that begins where a command called the user's own code."""
    inside = False
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            inside = file != _ENTRY
        elif inside and not file.startswith(("<frozen importlib", *_BETWEEN)):
            break
        trace = trace.tb_next
    shown = error if trace is None else error.with_traceback(trace)
    say("".join(traceback.format_exception(shown)).rstrip(), err=True)


@contextmanager
def clean_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Prints a message and exits with code 2 instead of a traceback, for errors a user can correct.

    Args:
        kinds: of errors; default: ours, and those of files and values. Around the user's own code, pass only
            ours, so that its tracebacks are shown.
    """
    expected = kinds or (HeadForcingError, ValueError, OSError)
    try:
        yield
    except expected as error:
        if isinstance(error, OSError) and error.filename is not None:
            fail(f"{error.filename}: {error.strerror}: check the path, and who may use it")
        fail(error)


def require(libraries: Sequence[str], extra: str, what: str) -> None:
    """Exits with code 2 if a library is missing, and names the extra that installs it."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{what} requires {', '.join(missing)}: pip install 'headforcing[{extra}]'")


def print_json(value: Any) -> None:
    """A value as JSON, which has no NaN."""
    say(json.dumps(value, indent=2, allow_nan=False))


def print_report(report: Any, as_json: bool) -> None:
    """Prints the report of a demo command: as JSON, or as a table, a summary and the files written."""
    if as_json:
        print_json(report.to_dict())
        return
    print_parts(report.table(), report.reading())
    for file in report.files:
        say(file)


def print_parts(*parts: Any) -> None:
    """Prints rich tables and plain text, in order."""
    console = _console()
    for part in parts:
        if isinstance(part, str):
            console.print(part, highlight=False, soft_wrap=True)
        else:
            console.print(part)


def _console(**options: Any) -> Console:
    """A console of rich that shows text as `say` does; brackets are no markup."""
    from rich.console import Console

    class Escaping(Console):
        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **kwargs):
                yield segment if segment.control else segment._replace(text=escaped_lines(segment.text))

    return Escaping(markup=False, **options)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Tell]:
    """Shows progress: a bar per stage on a terminal, plain lines in a pipe, or nothing."""
    if quiet:
        yield lambda *_: None
    elif not sys.stderr.isatty():
        yield _plain_lines()
    else:
        with _bars() as tell:
            yield tell


def _plain_lines() -> Tell:
    """Four lines per stage; every few seconds if the total is unknown."""
    printed = time.monotonic()

    def tell(stage: str, done: int, total: int | None) -> None:
        nonlocal printed
        if total is not None:
            if done * 4 // max(total, 1) > (done - 1) * 4 // max(total, 1):
                say(f"{stage}: {done}/{total}", err=True)
        elif time.monotonic() - printed > QUIET_SECONDS:
            printed = time.monotonic()
            say(f"{stage}: {done}", err=True)

    return tell


@contextmanager
def _bars() -> Iterator[Tell]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    name = TextColumn("{task.description:<18}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield tell
