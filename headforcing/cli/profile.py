"""`headforcing profile`: measure what every head of a model attends to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from headforcing.cli.console import AsJson, clean_errors, examples, print_json, print_parts, progress, say
from headforcing.cli.early import check_out
from headforcing.cli.target import check_call, importable_here, kind, named
from headforcing.errors import HeadForcingError, OptionError

if TYPE_CHECKING:
    from torch import nn

    from headforcing.measure.meter import Progress
    from headforcing.measure.profile import HeadProfile

METRICS = "attention_mass,mass_ratio,qk_logits,output_regret"
EXAMPLES = examples(
    "profile --out demo.safetensors",
    "profile --metrics attention_mass --videos 4",
    "profile my_model:make --prompts prompts.txt --starts 9,12,18 --queries 64 --base-model ORG/NAME",
)


@dataclass(frozen=True)
class Options:
    """The options of the command."""

    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:FUNCTION]",
            show_default=False,
            help="A function without arguments that returns (model, run); run generates a video with the "
            "model, from a prompt if --prompts is given. Default: the demo model.",
        ),
    ] = None
    out: Annotated[
        Path, typer.Option(help="Where to write the profile; its facts go to NAME.profile.json.")
    ] = Path("profile.safetensors")
    metrics: Annotated[
        list[str] | None,
        typer.Option(help=f"Metrics; repeat the option, or separate by commas. [default: {METRICS}]"),
    ] = None
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt per line.")] = None
    starts: Annotated[
        str | None,
        typer.Option(help="Measure the chunks that begin at these frames, as in 9,12,18. [default: all]"),
    ] = None
    queries: Annotated[
        int | None, typer.Option(min=1, help="Queries to measure per frame. [default: all]")
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of the choice of queries, or of the demo's scenes. [default: 0, 4000]"
        ),
    ] = None
    videos: Annotated[int | None, typer.Option(min=1, help="Number of scenes of the demo. [default: 32]")] = (
        None
    )
    long: Annotated[
        bool, typer.Option("--long", help="With the demo: measure far beyond the trained length.")
    ] = False
    base_model: Annotated[
        str | None, typer.Option(help="Public name of the checkpoint, stored in the files.")
    ] = None
    as_json: AsJson = False
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False


def profile(options: Options) -> None:
    """Measure every head of a model while it generates, and write a profile.

    `headforcing roles classify` computes labels from the profile, without the model.
    """
    with clean_errors():
        request = _checked(options)
    with clean_errors(HeadForcingError):  # the model's own errors keep their traceback
        started = time.perf_counter()
        found = _measure(options, request)
        seconds = time.perf_counter() - started
    with clean_errors():
        found.save(options.out)
    summary = _summary(found, options.out, seconds)
    if options.as_json:
        print_json(summary)
    else:
        from headforcing.cli.tables import facts_table

        files, follow = summary.pop("files"), summary.pop("next")
        print_parts(facts_table("profile", summary))
        say("\n".join([*files, f"next: {follow}"]))


class _Request(NamedTuple):
    """The options, read and checked."""

    metrics: list[str]
    prompts: list[str] | None
    starts: list[int] | None


def _checked(options: Options) -> _Request:
    """Checks all options before the model runs."""
    if options.out.suffix != ".safetensors":
        raise OptionError(f"--out is {options.out}: expected a name that ends in .safetensors")
    _check_target(options)
    names = [name.strip() for part in options.metrics or [METRICS] for name in part.split(",")]
    prompts = None if options.prompts is None else _read_prompts(options.prompts)
    starts = None if options.starts is None else _numbers(options.starts)
    check_out(options.out.parent)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    from headforcing.measure.metrics import find_metric

    for name in names:
        find_metric(name)
    return _Request(names, prompts, starts)


def _measure(options: Options, request: _Request) -> HeadProfile:
    from headforcing.measure.profiler import Protocol, profile_heads

    with progress(quiet=options.quiet or options.as_json) as tell, importable_here():

        def step(done: int, total: int | None, text: str) -> None:
            tell(text, done, total)

        if options.target is None:
            return _profile_demo(options, request.metrics, step)
        model, run = load_target(options.target)
        check_call("run", run, () if request.prompts is None else request.prompts[:1])
        return profile_heads(
            model,
            run,
            request.metrics,
            prompts=request.prompts,
            protocol=Protocol(starts=request.starts, queries=options.queries, seed=options.seed or 0),
            base_model=options.base_model,
            progress=step,
        )


def _profile_demo(options: Options, metrics: list[str], progress: Progress) -> HeadProfile:
    from headforcing.demo.profiled import SEED, VIDEOS, profile_demo

    return profile_demo(
        videos=VIDEOS if options.videos is None else options.videos,
        seed=SEED if options.seed is None else options.seed,
        long=options.long,
        metrics=metrics,
        progress=progress,
    )


def load_target(target: str) -> tuple[nn.Module, Callable[..., object]]:
    """The model and the function that generates with it, from `MODULE:FUNCTION`.

    Raises:
        OptionError: there is no such module or function, or it returns something else.
    """
    from torch import nn

    made = named(target, "my_model:make", "FUNCTION")()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise OptionError(f"{target} returned {kind(made)}: expected (model, run), a torch module first")
    if not callable(made[1]):
        raise OptionError(f"{target} returned {kind(made)}: expected a function as run")
    return made[0], made[1]


def facts_file(profile: Path) -> Path:
    """The facts file of a profile."""
    return profile.with_suffix(".profile.json")


def _check_target(options: Options) -> None:
    """Checks that options of the demo are not used with another model, and the reverse.

    Raises:
        OptionError: they are.
    """
    own = options.target is not None
    names = ["videos", "long"] if own else ["prompts", "starts", "queries", "base_model"]
    other = "the demo model" if own else "MODULE:FUNCTION"
    for name in names:
        if getattr(options, name) not in (None, False):
            raise OptionError(f"--{name.replace('_', '-')} works with {other} only: leave it out")


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{path} is not UTF-8 text ({error.reason}): expected one prompt per line"
        ) from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise OptionError(f"{path} contains no prompt: expected one per line")
    return prompts


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"--starts is {text!r}: expected frames, as in 9,12,18") from error


def _summary(found: HeadProfile, out: Path, seconds: float) -> dict[str, Any]:
    facts = found.facts
    return {
        "model": facts.model.model_dump(),
        "metrics": list(facts.metrics),
        "passes": len(found),
        "videos": len(found.video.unique()),
        "starts": sorted(set(found.start.tolist())),
        "hash": found.hash,
        "seconds": round(seconds, 2),
        "files": [str(out), str(facts_file(out))],
        "next": f"headforcing roles classify {out} --out roles.json",
    }
