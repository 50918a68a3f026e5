"""`headforcing roles pull` and `push`: role maps on the Hugging Face Hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from headforcing.cli.console import AsJson, clean_errors, print_json, say

Repository = Annotated[
    str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hub.", show_default=False)
]


def pull(
    repository: Repository,
    revision: Annotated[str, typer.Option(help="Full hash of a commit.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where to write the role map.")] = Path("roles.json"),
    as_json: AsJson = False,
) -> None:
    """Download a role map from the Hub.

    One file is read and checked strictly; no code of the repository is run.
    """
    with clean_errors(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        from headforcing.roles.maps import hub

        role_map = hub.from_hub(repository, revision=revision)
        role_map.save(out)
    for warning in said:
        say(f"warning: {warning.message}", err=True)
    if as_json:
        print_json({"hash": role_map.hash, "files": [str(out)]})
    else:
        say(f"{out}\n{role_map.hash}\nnext: headforcing roles show {out}")


def push(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A role-map file.", show_default=False)],
    repository: Repository,
    report: Annotated[Path | None, typer.Option(help="The stability report of the map.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The checkpoint on the Hub. [default: as in the map]")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(help="Whether a new repository is private. [default: your account's setting]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a role map to the Hub, with a card and its stability report.

    You must be logged in. The repository is created if it does not exist.
    """
    with clean_errors():
        from headforcing.measure.stability_report import StabilityReport
        from headforcing.roles.maps import hub
        from headforcing.roles.maps.role_map import RoleMap

        text = None if report is None else StabilityReport.load(report).to_json()
        done = hub.push_to_hub(
            RoleMap.load(file), repository, report=text, base_model=base_model, private=private
        )
    if as_json:
        print_json({"url": done.url, "commit": done.commit})
    else:
        say(done.url)
        say(f"next: headforcing roles pull {repository} --revision {done.commit}")
