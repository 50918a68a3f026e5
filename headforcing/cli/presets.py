"""`headforcing presets`: how much every preset stores and attends to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headforcing.cli.amounts import in_units, model_size
from headforcing.cli.console import AsJson, clean_errors, examples, print_json, print_parts
from headforcing.errors import OptionError, WindowError
from headforcing.measure.sizes import ITEMSIZES, MODELS

if TYPE_CHECKING:
    from headforcing.measure.sizes import ModelSize
    from headforcing.roles import HeadRole
    from headforcing.roles.maps.preset import Preset

EXAMPLES = examples(
    "presets", "presets --model wan-14b --json", "presets --grid 45x80 --window 12 --dtype fp32"
)


@dataclass(frozen=True)
class Options:
    """The options of the command: the size of the model."""

    model: Annotated[str, typer.Option(help=f"Sizes to begin with: one of {', '.join(MODELS)}.")] = "wan-1.3b"
    layers: Annotated[int | None, typer.Option(help="Attention layers. [default: of the model]")] = None
    heads: Annotated[int | None, typer.Option(help="Heads per layer.")] = None
    head_dim: Annotated[int | None, typer.Option(help="Channels per head.")] = None
    window: Annotated[int | None, typer.Option(help="Frames the model was trained on.")] = None
    chunk: Annotated[int | None, typer.Option(help="Frames of a chunk.")] = None
    grid: Annotated[
        str | None, typer.Option(help="Patches of a frame, HEIGHTxWIDTH: 30x52 is 480p, 45x80 is 720p.")
    ] = None
    dtype: Annotated[str | None, typer.Option(help=f"Dtype of the cache: {', '.join(ITEMSIZES)}.")] = None
    as_json: AsJson = False


def presets(options: Options) -> None:
    """Show the frames that every preset stores and attends to, and their bytes, without a model.

    Frames are per head, current chunk included, once a video is long; counted on a real store with tensors
    without data. If heads differ, means and bytes are for the published numbers of heads; a role map of your
    model may differ. All numbers are for one stream of one video: multiply by videos, CFG branches and
    experts. The ring store also contains rotated keys.
    """
    with clean_errors():
        from headforcing.roles.maps.presets import PRESETS

        size = model_size(options)
        rows = [_row(preset, size) for preset in PRESETS.values()]
    if options.as_json:
        sums = {name: getattr(size, name) for name in ("tokens_per_frame", "frame_bytes", "window_bytes")}
        print_json({"model": {**dataclasses.asdict(size), **sums}, "presets": rows})
    else:
        print_parts(_table(rows), _notes(rows), _facts(size))


def _row(preset: Preset, size: ModelSize) -> dict[str, Any]:
    """Frames per head, and bytes; `None` means unbounded, or unknown, as `counted` says."""
    row: dict[str, Any] = {
        "name": preset.name,
        "source": preset.source,
        "published": dict(preset.published),
        "counted": preset.counted,
        "labels": list(preset.labels_needed()),
    }
    try:
        roles = preset.roles(size.window, size.chunk)
        fitted = {label: role.fit(size.window, size.chunk) for label, role in roles.items()}
    except WindowError as error:
        return {**row, "does_not_fit": str(error)}
    row["roles"] = [_role(label, role, preset, size) for label, role in fitted.items()]
    shares = preset.shares()
    for name in ("stored", "attended"):
        row[name] = None if shares is None else _mean([each[name] for each in row["roles"]], shares)
    if shares is None:
        return {**row, **dict.fromkeys(BYTES)}
    try:
        return {**row, **_bytes(preset, fitted, size)}
    except OptionError as error:
        return {**row, **dict.fromkeys(BYTES), "not_counted": str(error)}


def _role(label: str, role: HeadRole, preset: Preset, size: ModelSize) -> dict[str, Any]:
    """Stored and attended frames of one head of a role."""
    from headforcing.measure.memory import steady

    found = steady(role, size.window, size.chunk)
    return {
        "label": label,
        "role": str(role),
        "heads": preset.published.get(label),
        "stored": None if found is None else float(found.stored),
        "attended": None if found is None else float(found.attended),
        "attended_most": None if found is None else float(found.most),
    }


def _mean(frames: list[float | None], shares: Mapping[str, float]) -> float | None:
    known = [each for each in frames if each is not None]
    if len(known) < len(frames):
        return None
    return sum(each * share for each, share in zip(known, shares.values(), strict=True))


BYTES = ("bytes", "ring_bytes", "of_window")


def _bytes(preset: Preset, roles: Mapping[str, HeadRole], size: ModelSize) -> dict[str, float | int | None]:
    """Bytes for all heads of the model, in the published proportions."""
    from headforcing.measure.estimate import published_map
    from headforcing.measure.memory import kept_bytes, stored_bytes

    found = published_map(preset, roles, size)
    share = Fraction(size.count, sum(found.counts().values()))
    totals = kept_bytes(size, found), stored_bytes(size, "ring", found)
    plain, ring = (None if total is None else math.ceil(total * share) for total in totals)
    return {"bytes": plain, "ring_bytes": ring, "of_window": plain and plain / size.window_bytes}


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="presets")
    table.add_column("preset", no_wrap=True)
    for column in ("heads", "stored", "attended", "bytes", "of window", "ring store"):
        table.add_column(column, justify="right")
    for row in rows:
        if "does_not_fit" in row:
            table.add_row(row["name"], "", "does", "not fit")
            continue
        table.add_row(row["name"], "", *_cells(row))
        if row["labels"]:
            for role in row["roles"]:
                heads = "?" if role["heads"] is None else str(role["heads"])
                table.add_row(f"  {role['label']}", heads, *map(_frames, (role["stored"], role["attended"])))
    return table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Frames and bytes of a preset as a whole."""
    if row["bytes"] is None and not row["labels"]:
        return "all", "all", "grows", "", "grows"
    if row["stored"] is None:
        return ("?",) * 5
    frames = _frames(row["stored"]), _frames(row["attended"])
    if row["bytes"] is None:
        return *frames, "?", "?", "?"
    return *frames, in_units(row["bytes"]), f"{row['of_window']:.0%}", in_units(row["ring_bytes"])


def _frames(count: float | None) -> str:
    """A number of frames, without trailing zeros."""
    return "all" if count is None else f"{count:.2f}".removesuffix(".00")


def _notes(rows: list[dict[str, Any]]) -> str:
    """The sources of the numbers of heads."""
    notes = [f"{row['name']} ({row['source']}): {row['counted']}." for row in rows if row["labels"]]
    notes += [f"{row['name']}: {row['not_counted']}." for row in rows if "not_counted" in row]
    return "\n".join(["Heads are those of Wan2.1 1.3B as published, 360 in all.", *notes])


def _facts(size: ModelSize) -> str:
    return (
        f"{size.layers} layers x {size.heads} heads x {size.head_dim} channels, {size.tokens_per_frame} "
        f"tokens per frame, {size.itemsize} bytes each: {in_units(size.frame_bytes)} per frame, "
        f"{in_units(size.head_bytes)} per head.\n"
        f"The dense window of {size.window} frames takes {in_units(size.window_bytes)}. Frames are per head, "
        f"the current chunk of {size.chunk} included."
    )
