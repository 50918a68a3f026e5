"""The command line: `headforcing demo`, `profile`, `presets`, `estimate`, `check`, `roles ...` and others.

Torch and the drawing libraries are imported inside the commands. Exit codes: 0 success, 1 a negative result
(such as an invalid file or a failed check), 2 the command could not run.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from headforcing.cli import check, contest, demo, estimate, explain, presets, profile, roles, scenes, verify
from headforcing.cli.console import command_of, say, show_error


class _App(typer.Typer):
    """The command line. Errors of a user's own code have their traceback, without ours above it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sys.excepthook = show_error  # as typer does, with a hook of its own
        return typer.main.get_command(self)(*args, **kwargs)


app = _App(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is plain text: brackets and line breaks stay as they are
)
app.command("demo", epilog=demo.EXAMPLES)(command_of(demo.demo, demo.Options))
app.command("scenes", epilog=scenes.EXAMPLES)(command_of(scenes.scenes, scenes.Options))
app.command("compare", epilog=contest.EXAMPLES)(command_of(contest.contest, contest.Options))
app.command("profile", epilog=profile.EXAMPLES)(command_of(profile.profile, profile.Options))
app.command("presets", epilog=presets.EXAMPLES)(command_of(presets.presets, presets.Options))
app.command("estimate", epilog=estimate.EXAMPLES)(command_of(estimate.estimate, estimate.Options))
app.command("check", epilog=check.EXAMPLES)(check.check)
app.command("explain", epilog=explain.EXAMPLES)(explain.explain)
app.command("verify", epilog=verify.EXAMPLES)(verify.verify)
app.add_typer(roles.app, name="roles")


def _print_version(wanted: bool) -> None:
    if wanted:
        say(version("headforcing"))
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Give every attention head of an autoregressive video model its own KV cache."""
