"""`headforcing verify`: whether a model is reproduced by the role that is its own memory."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from headforcing.cli.check import adapter_named
from headforcing.cli.console import AsJson, clean_errors, examples, print_json, print_parts, say
from headforcing.cli.profile import load_target
from headforcing.cli.target import check_call, importable_here
from headforcing.errors import HeadForcingError

EXAMPLES = examples("verify my_model:make", 'verify my_model:make --prompt "a street at night" --record')


def verify(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            show_default=False,
            help="A function without arguments that returns (model, run), as for profile. Let run generate "
            "past the first eviction, every time the same.",
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="Passed to run.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the global random numbers before every run.")] = 0,
    adapter: Annotated[
        str | None, typer.Option(metavar="MODULE:ADAPTER", help="Default: the adapter that fits the model.")
    ] = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record", help="If equal, note the code on this machine, so that it is not warned about."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Generate untouched, twice, and with the model's own memory, and compare every attention call.

    Says equal, equal to rounding, or the first layer, chunk and pass that differ. Exit code 1 if it differs.
    """
    from headforcing.adapters.base import find_adapter
    from headforcing.adapters.verified import digest
    from headforcing.adapters.verified import record as noted
    from headforcing.measure.verify import verify as verified

    with clean_errors(HeadForcingError), importable_here():
        model, run = load_target(target)
        check_call("run", run, () if prompt is None else (prompt,))
        own = find_adapter(model) if adapter is None else adapter_named(adapter)
        found = verified(model, run, prompt=prompt, seed=seed, adapter=own)
        if as_json:
            print_json({**dataclasses.asdict(dataclasses.replace(found, memory=())), "ok": found.ok})
        else:
            print_parts(str(found))
        if found.ok and record:
            codes = {code for _, module in own.attentions(model) if (code := digest(module)) is not None}
            say(f"noted {', '.join(sorted(codes))} in {noted(codes)}")
    if not found.ok:
        raise typer.Exit(1)
