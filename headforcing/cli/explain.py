"""`headforcing explain`: which adapter fits a model, and why the others do not."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from headforcing.cli.console import AsJson, clean_errors, examples, print_json, print_parts
from headforcing.cli.target import importable_here, kind, named
from headforcing.errors import HeadForcingError, OptionError

EXAMPLES = examples("explain headforcing.demo:demo_model", "explain my_model:make --json")


def explain(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            show_default=False,
            help="A function without arguments that returns the model, or (model, run) as for profile.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show which attention layers of a model are detected, which adapter fits, and why the others do not.

    Exit code 1 if none fits.
    """
    from headforcing.apply.explain import explain as explained

    with clean_errors(HeadForcingError), importable_here():
        found = explained(_model(named(target, "my_model:make"), target))
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        print_parts(str(found))
    if found.adapter is None:
        raise typer.Exit(1)


def _model(made: Any, target: str) -> Any:
    """The model, from the object that was named.

    Raises:
        OptionError: it is no torch module and returns none.
    """
    from torch import nn

    if callable(made) and not isinstance(made, nn.Module):
        made = made()
    model = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(model, nn.Module):
        raise OptionError(f"{target} returned {kind(made)}: expected a torch module, or (model, run)")
    return model
