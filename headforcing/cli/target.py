"""Resolves `MODULE:NAME` arguments of the command line."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from headforcing.errors import OptionError


def named(target: str, example: str, what: str = "NAME") -> Any:
    """The object that `MODULE:NAME` names; with `what="FUNCTION"`, a function.

    Raises:
        OptionError: there is no such module or name.
    """
    where, _, name = target.partition(":")
    if not all(part.isidentifier() for part in (*where.split("."), name)):
        raise OptionError(f"{target!r} is not MODULE:{what}, as in {example}")
    try:
        module = importlib.import_module(where)
    except (ImportError, SyntaxError) as error:
        raise OptionError(
            f"{where} cannot be imported ({error}): install what is missing, or run in the folder that "
            "contains it"
        ) from error
    found = getattr(module, name, None)
    function = what == "FUNCTION"
    if found is None or (function and not callable(found)):
        raise OptionError(f"{where} has no {'function ' if function else ''}{name}")
    if callable(found):
        check_call(name, found, ())
    return found


def check_call(name: str, function: Callable[..., object], arguments: Sequence[str]) -> None:
    """Checks a function's signature against arguments.

    Raises:
        OptionError: it cannot be called with them.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        wanted = "with a prompt, because --prompts is given" if arguments else "without arguments"
        raise OptionError(f"{name}{signature} is called {wanted}: {error}") from error


@contextmanager
def importable_here() -> Iterator[None]:
    """Makes modules in the current folder importable, as `python -m` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def kind(made: object) -> str:
    """The type of something, for a message."""
    if isinstance(made, tuple):
        return f"({', '.join(type(part).__name__ for part in made)})"
    return type(made).__name__
