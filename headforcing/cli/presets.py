"""`headforcing presets`: what every preset keeps, and how many bytes that takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from headforcing.cli.console import AsJson, clean_errors, examples, print_json, print_parts
from headforcing.errors import OptionError, WindowError
from headforcing.footprint import ITEMSIZES, MODELS, ModelSize

EXAMPLES = examples(
    "presets", "presets --model wan-14b --json", "presets --tokens-per-frame 3600 --window 12 --dtype fp32"
)


@dataclass(frozen=True)
class Options:
    """Of which size the model is."""

    model: Annotated[str, typer.Option(help=f"Sizes to begin with: one of {', '.join(MODELS)}.")] = "wan-1.3b"
    layers: Annotated[int | None, typer.Option(help="Attention layers. [default: of the model]")] = None
    heads: Annotated[int | None, typer.Option(help="Heads per layer.")] = None
    head_dim: Annotated[int | None, typer.Option(help="Channels per head.")] = None
    window: Annotated[int | None, typer.Option(help="Frames the model was trained on.")] = None
    chunk: Annotated[int | None, typer.Option(help="Frames of a chunk.")] = None
    tokens_per_frame: Annotated[int | None, typer.Option(help="Patches of one frame.")] = None
    dtype: Annotated[str | None, typer.Option(help=f"Of keys and values: {', '.join(ITEMSIZES)}.")] = None
    as_json: AsJson = False


def presets(options: Options) -> None:
    """Show what every preset keeps and how many bytes that takes, without a model.

    Counted for one stream of one video: multiply by videos, CFG branches and experts. Bytes are those of the
    frames attended, the own chunk among them; the ring store holds more, because it keeps rotated keys, too.
    """
    with clean_errors():
        size = model_size(options)
        rows = [_row(name, size) for name in _names()]
    if options.as_json:
        sums = {"frame_bytes": size.frame_bytes, "window_bytes": size.window_bytes}
        print_json({"model": {**dataclasses.asdict(size), **sums}, "presets": rows})
    else:
        print_parts(_table(rows, size), _facts(size))


def model_size(options: Options) -> ModelSize:
    """The sizes of a known model, with those that are given in place of its own.

    Raises:
        OptionError: there is no such model or type, or a number is less than 1.
    """
    if options.model not in MODELS:
        raise OptionError(f"unknown model {options.model!r}: expected one of {', '.join(MODELS)}")
    names = ("layers", "heads", "head_dim", "window", "chunk", "tokens_per_frame")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.dtype is not None:
        given["itemsize"] = itemsize(options.dtype)
    return dataclasses.replace(MODELS[options.model], **given)


def itemsize(dtype: str) -> int:
    """Bytes of one number.

    Raises:
        OptionError: there is no such type.
    """
    if dtype not in ITEMSIZES:
        raise OptionError(f"unknown dtype {dtype!r}: expected one of {', '.join(ITEMSIZES)}")
    return ITEMSIZES[dtype]


def in_units(count: float) -> str:
    """Bytes as people read them, in powers of 1024."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    digits = 0 if units[0] == "B" or count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {units[0]}"


def _names() -> list[str]:
    from headforcing.presets import PRESETS

    return list(PRESETS)


def _row(name: str, size: ModelSize) -> dict[str, Any]:
    """Frames per head, and bytes; `None` is without bound, or where the preset does not fit."""
    from headforcing.presets import PRESETS

    found = PRESETS[name](size.layers, size.heads, size.window, size.chunk)
    try:
        found = found.fit(size.layers, size.heads, size.window, size.chunk)
    except WindowError as error:
        return {"name": name, "does_not_fit": str(error)}
    kept = found.layers[0][0].capacity(size.chunk)
    total = size.kv_bytes(found)
    return {
        "name": name,
        "kept": kept,
        "attended": None if kept is None else kept + size.chunk,
        "bytes": total,
        "ring_bytes": size.ring_bytes(found),
        "of_window": None if total is None else total / size.window_bytes,
    }


def _table(rows: list[dict[str, Any]], size: ModelSize) -> Any:
    from rich.table import Table

    table = Table(title="presets")
    table.add_column("preset", no_wrap=True)
    for column in ("kept", "attended", "bytes", "of window", "ring store"):
        table.add_column(column, justify="right")
    for row in rows:
        if "does_not_fit" in row:
            table.add_row(row["name"], "does", "not fit")
        elif row["bytes"] is None:
            table.add_row(row["name"], "all", "all", f"{in_units(size.frame_bytes)} per frame", "unbounded")
        else:
            held, share = in_units(row["ring_bytes"]), f"{row['of_window']:.0%}"
            frames = str(row["kept"]), str(row["attended"])
            table.add_row(row["name"], *frames, in_units(row["bytes"]), share, held)
    return table


def _facts(size: ModelSize) -> str:
    return (
        f"{size.layers} layers x {size.heads} heads x {size.head_dim} channels, {size.tokens_per_frame} "
        f"tokens per frame, {size.itemsize} bytes each: {in_units(size.frame_bytes)} per frame, "
        f"{in_units(size.head_bytes)} of it per head.\n"
        f"The dense window of {size.window} frames takes {in_units(size.window_bytes)}. Frames are per head: "
        f"kept beside the own chunk of {size.chunk}, attended with it."
    )
