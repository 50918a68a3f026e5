"""`headforcing roles classify`: from a profile to a role map, without the model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headforcing.cli.console import AsJson, choices, clean_errors, print_json, print_parts, say
from headforcing.cli.profile import facts_file
from headforcing.errors import OptionError

if TYPE_CHECKING:
    from headforcing.measure.classifiers import Classification
    from headforcing.measure.profile import HeadProfile
    from headforcing.measure.stability_report import StabilityReport
    from headforcing.roles.maps.role_map import RoleMap

CONTROLS = ("random", "shuffled_within_layer", "inverted", "all_one:LABEL")


@dataclass(frozen=True)
class Options:
    """The options of the command."""

    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="A profile (.safetensors).", show_default=False)
    ]
    method: Annotated[str, typer.Option(help=f"One of {choices('headforcing.measure.classifiers')}.")] = (
        "head_forcing"
    )
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A threshold of the method; may be repeated."),
    ] = None
    out: Annotated[Path | None, typer.Option(help="Where to write the role map. [default: show it only]")] = (
        None
    )
    report: Annotated[Path | None, typer.Option(help="Where to write the stability report (JSON).")] = None
    stability: Annotated[
        bool, typer.Option(help="Classify resampled prompts as well, to measure how stable the labels are.")
    ] = True
    draws: Annotated[int, typer.Option(min=1, help="Number of resamples.")] = 200
    control: Annotated[
        str | None, typer.Option(help=f"Write a control instead of the map: {', '.join(CONTROLS)}.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of the control and of the resampling.")] = 0
    as_json: AsJson = False


def classify(options: Options) -> None:
    """Label the heads of a profile and write a role map.

    The map records the model, the measurement and the stability of the labels. Stability is measured by
    resampling the prompts of the profile, so a profile of one prompt says nothing about it.
    """
    with clean_errors():
        from headforcing.measure.labels import measured_map
        from headforcing.measure.profile import HeadProfile

        check_files(options.profile, {"--out": options.out, "--report": options.report})
        profile = HeadProfile.load(options.profile)
        for file in _outputs(options):
            file.parent.mkdir(parents=True, exist_ok=True)
        found, report = _classify(options, profile)
        summary = None if report is None else report.summary()
        role_map = measured_map(found, profile, stability=summary)
        if options.out is not None:
            role_map.save(options.out)
        if report is not None and options.report is not None:
            report.save(options.report)
    if options.as_json:
        print_json(_json(options, found, role_map, report))
    else:
        _print(options, found, role_map, report)


def _outputs(options: Options) -> list[Path]:
    return [file for file in (options.out, options.report) if file is not None]


def check_files(profile: Path, written: Mapping[str, Path | None]) -> None:
    """Checks that output files do not overwrite each other or the profile.

    Raises:
        OptionError: they do, or one is a folder.
    """
    taken = {file.resolve(): "a file of the profile" for file in (profile, facts_file(profile))}
    for name, file in written.items():
        if file is None:
            continue
        if (owner := taken.setdefault(file.resolve(), name)) != name:
            raise OptionError(f"{name} is {file}, which is {owner} too: give another name")
        if file.is_dir():
            raise OptionError(f"{name} is {file}, a folder: give the name of a file in it")


def _classify(options: Options, profile: HeadProfile) -> tuple[Classification, StabilityReport | None]:
    """The labels of the method or the control, and the report; a control has none."""
    from headforcing.cli.settings import parse_settings
    from headforcing.measure.classifiers import find_classifier
    from headforcing.measure.stability import stability

    repeated = options.stability and options.control is None
    if options.report is not None and not repeated:
        raise OptionError("--report works neither with --no-stability nor with --control: leave one out")
    method = find_classifier(options.method)
    method = functools.partial(method, **parse_settings(options.settings or (), method))
    found = method(profile)
    if options.control is not None:
        return _control(found, options.control, options.seed), None
    if not repeated:
        return found, None
    if not options.as_json:
        say(f"classifying {options.draws} resamples for the stability report; change with --draws", err=True)
    return found, stability(profile, method, draws=options.draws, seed=options.seed)


def _control(found: Classification, name: str, seed: int) -> Classification:
    from headforcing.measure import labels as controls

    kind, colon, label = name.partition(":")
    if kind == "all_one" and label:
        return controls.all_one(found, label)
    if not colon and kind in ("random", "shuffled_within_layer"):
        draw = controls.random if kind == "random" else controls.shuffled_within_layer
        return draw(found, seed)
    if not colon and kind == "inverted":
        return controls.inverted(found)
    raise OptionError(f"unknown control {name!r}: expected one of {', '.join(CONTROLS)}")


def _json(
    options: Options, found: Classification, role_map: RoleMap, report: StabilityReport | None
) -> dict[str, Any]:
    margins = [[None if m != m else m for m in row] for row in found.margin.tolist()]  # JSON has no NaN
    return {
        "method": found.method,
        "settings": dict(found.settings),
        "counts": found.counts(),
        "labels": [list(row) for row in found.labels],
        "margin": margins,
        "stability": None if report is None else report.to_dict(),
        "hash": role_map.hash,
        "files": list(map(str, _outputs(options))),
    }


def _print(
    options: Options, found: Classification, role_map: RoleMap, report: StabilityReport | None
) -> None:
    from headforcing.cli.tables import facts_table, label_tables

    fitted = {
        label: role
        for row, roles in zip(found.labels, role_map.layers, strict=True)
        for label, role in zip(row, roles, strict=True)
    }
    meaning = {name: str(fitted.get(name, role)) for name, role in found.roles.items()}
    facts = {"method": found.method, "metrics": found.metrics, "settings": dict(found.settings)}
    print_parts(*label_tables(found.labels, meaning), facts_table("classification", facts))
    if report is not None:
        print_parts(str(report))
    for file in _outputs(options):
        say(file)
    if options.out is not None:
        say(f"next: headforcing roles plot {options.out} --profile {options.profile}")
