"""`headforcing estimate`: what one choice of memories takes on a model, before either is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headforcing.cli.amounts import in_units, model_size, parse_bytes
from headforcing.cli.console import AsJson, clean_errors, examples, print_json, print_parts
from headforcing.cli.early import check_preset
from headforcing.errors import OptionError, WindowError
from headforcing.measure.sizes import ITEMSIZES, MODELS, ModelSize

if TYPE_CHECKING:
    from headforcing.measure.estimate import MemoryEstimate
    from headforcing.roles.maps.role_map import RoleMap

EXAMPLES = examples(
    "estimate --preset head_forcing",
    "estimate --model wan-14b --grid 45x80 --preset head_forcing --branches 2",
    "estimate --model wan-1.3b --grid 30x52 --roles roles.json --json",
    "estimate --model wan-1.3b --vram 24GB --weights 16GB --preset head_forcing",
)


@dataclass(frozen=True)
class Options:
    """For which model, and which choice."""

    preset: Annotated[str | None, typer.Option(help="A preset; see `headforcing presets`.")] = None
    roles: Annotated[Path | None, typer.Option(help="Or a role-map file of the model.")] = None
    model: Annotated[str, typer.Option(help=f"Sizes to begin with: one of {', '.join(MODELS)}.")] = "wan-1.3b"
    grid: Annotated[
        str | None, typer.Option(help="Patches of a frame, HEIGHTxWIDTH: 30x52 is 480p, 45x80 is 720p.")
    ] = None
    layers: Annotated[int | None, typer.Option(help="Attention layers. [default: of the model]")] = None
    heads: Annotated[int | None, typer.Option(help="Heads per layer.")] = None
    head_dim: Annotated[int | None, typer.Option(help="Channels per head.")] = None
    window: Annotated[int | None, typer.Option(help="Frames the model was trained on.")] = None
    chunk: Annotated[int | None, typer.Option(help="Frames of a chunk.")] = None
    dtype: Annotated[str | None, typer.Option(help=f"Dtype of the cache: {', '.join(ITEMSIZES)}.")] = None
    store: Annotated[str, typer.Option(help="One of lean, ring.")] = "ring"
    vram: Annotated[
        str | None,
        typer.Option(
            metavar="24GB", help="Show what fits, in every store; without a choice, of all presets."
        ),
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(metavar="16GB", help="With --vram: all that is there beside the stores."),
    ] = None
    videos: Annotated[int, typer.Option(help="Videos in a batch.")] = 1
    branches: Annotated[int, typer.Option(help="Timelines per video, 2 with CFG.")] = 1
    as_json: AsJson = False


def estimate(options: Options) -> None:
    """Show the memory of a preset or role map, next to the dense window and StreamingLLM, without a model.

    Stored is the size of the store once a video is long; kept is the part of it with the keys and values that
    roles keep; attended are the frames that a query attends to in a noisy pass, current chunk included, mean
    over heads. Weights, activations and the rest of the model are not included. StreamingLLM has the same
    number of attended frames, rounded. With --vram: which memories fit beside --weights, in which store, and
    for how long a video.

    The cost of attention is estimated from the number of attended frames. Costs that do not depend on it,
    such as RoPE of the current chunk and the rest of the model, are not included. It is not a measurement.
    """
    with clean_errors():
        check_preset(options.preset)
        if options.vram is not None:
            _show_fitting(options, model_size(options), _streams(options))
            return
        if options.weights is not None:
            raise OptionError("--weights works with --vram only: leave it out")
        from headforcing.measure.estimate import dense, streaming_at
        from headforcing.measure.estimate import estimate as estimated

        size, streams = model_size(options), _streams(options)
        rows, choice = [dense(size, streams)], _choice(options, size)
        rows.append(estimated(*choice, size, store=options.store, streams=streams))
        if rows[1].attended is not None:
            streaming = streaming_at(rows[1].attended, size)
            rows.append(estimated(*streaming, size, store=options.store, streams=streams))
    if options.as_json:
        print_json(_facts(rows, size, options))
    else:
        print_parts(_table(rows), _notes(rows, size, options))


def _streams(options: Options) -> int:
    """Timelines in memory.

    Raises:
        OptionError: a number is less than 1.
    """
    for name in ("videos", "branches"):
        if getattr(options, name) < 1:
            raise OptionError(f"{name} is {getattr(options, name)}: expected a whole number, at least 1")
    return options.videos * options.branches


def _choice(options: Options, size: ModelSize) -> tuple[str, RoleMap]:
    from headforcing.measure.estimate import of_map, of_preset
    from headforcing.roles.maps.presets import PRESETS
    from headforcing.roles.maps.role_map import RoleMap

    if (options.preset is None) == (options.roles is None):
        raise OptionError("give one of --preset and --roles: a preset by name, or a role-map file")
    if options.roles is not None:
        return options.roles.name, of_map(options.roles.name, RoleMap.load(options.roles), size)
    assert options.preset is not None
    return options.preset, of_preset(PRESETS[options.preset], size)


def _facts(rows: list[MemoryEstimate], size: ModelSize, options: Options) -> dict[str, Any]:
    """Everything as JSON values; `None` is without bound."""
    first, *_ = rows
    sizes = {**dataclasses.asdict(size), "grid": list(size.grid), "tokens_per_frame": size.tokens_per_frame}
    return {
        "model": {"name": options.model, **sizes},
        "store": options.store,
        "videos": options.videos,
        "branches": options.branches,
        "frame_bytes": size.frame_bytes,
        "released_bytes": first.stored,
        "rows": [
            {
                "name": row.name,
                **_numbers(row),
                "of_dense": {name: _ratio(row, first, name) for name in _numbers(first)},
            }
            for row in rows
        ],
        "attention_cost_of_dense": _ratio(rows[1], first, "attended"),
    }


def _numbers(row: MemoryEstimate) -> dict[str, int | float | None]:
    return {
        "stored": row.stored,
        "kept": row.kept,
        "attended": None if row.attended is None else float(row.attended),
    }


def _ratio(row: MemoryEstimate, first: MemoryEstimate, name: str) -> float | None:
    """A number over that of the dense window."""
    ours, theirs = _numbers(row)[name], _numbers(first)[name]
    return None if ours is None or theirs is None else ours / theirs


def _table(rows: list[MemoryEstimate]) -> Any:
    from rich.table import Table

    table = Table(title="estimate", show_edge=False, pad_edge=False)
    table.add_column("memory", no_wrap=True)
    for column in _numbers(rows[0]):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, *(_cell(name, value) for name, value in _numbers(row).items()))
        if row is not rows[0] and row.stored is not None:
            shares = [_ratio(row, rows[0], name) for name in _numbers(row)]
            table.add_row("  of dense", *("" if share is None else f"{share:.0%}" for share in shares))
    return table


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "grows"
    return f"{value:.2f}".removesuffix(".00") if name == "attended" else in_units(value)


def _notes(rows: list[MemoryEstimate], size: ModelSize, options: Options) -> str:
    first, ours, *_ = rows
    streams = f"{options.videos} x {options.branches} timelines, " if _streams(options) > 1 else ""
    lines = [
        f"{size.layers} layers x {size.heads} heads x {size.head_dim} channels, {size.grid[0]}x{size.grid[1]}"
        f" = {size.tokens_per_frame} tokens per frame, {size.itemsize} bytes each, {streams}"
        f"store {options.store}."
    ]
    if ours.attended is None:
        lines.append(f"{ours.name} stores every frame: its memory grows with the video.")
    else:
        lines.append(
            f"The base model's KV cache of {in_units(first.stored or 0)} is released. Attention is expected "
            f"to cost {float(ours.attended) / size.window:.0%} of dense: attended over {size.window} frames, "
            "not measured, without constant costs."
        )
    lines.append("Weights, activations and the rest of the model are not included.")
    return "\n".join(lines)


def _show_fitting(options: Options, size: ModelSize, streams: int) -> None:
    """Shows which memories fit, in which store, and for how long a video.

    Raises:
        OptionError: --weights are missing, or take everything.
    """
    if options.weights is None:
        raise OptionError(
            "--vram requires --weights: the bytes of all that is on the device beside the stores, such as "
            "weights of the model, text encoder and VAE, and activations"
        )
    vram, weights = parse_bytes(options.vram or "", "--vram"), parse_bytes(options.weights, "--weights")
    if (room := vram - weights) <= 0:
        raise OptionError(f"--weights {options.weights} leave nothing of --vram {options.vram}")
    rows, left_out = _fitting(options, size, room, streams)
    if options.as_json:
        print_json({"room": room, "streams": streams, "rows": rows, "left_out": left_out})
        return
    from rich.table import Table

    table = Table(title=f"what fits into {in_units(room)}", show_edge=False, pad_edge=False)
    for column in ("memory", "store", "stored", "fits"):
        table.add_column(column, justify="right" if column == "stored" else "left", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], row["store"], _cell("stored", row["stored"]), _verdict(row))
    print_parts(table, *left_out)


def _fitting(
    options: Options, size: ModelSize, room: int, streams: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """What was asked for, or every preset, in every store; and why some presets are left out."""
    from headforcing.measure.estimate import of_preset
    from headforcing.roles.maps.presets import PRESETS

    if options.preset is not None or options.roles is not None:
        return _in_stores(*_choice(options, size), size, room, streams), []
    rows, left_out = [], []
    for name, preset in PRESETS.items():
        try:
            rows += _in_stores(name, of_preset(preset, size), size, room, streams)
        except (OptionError, WindowError) as error:
            left_out.append(f"left out: {name}: {str(error).removeprefix(f'{name}: ')}")
    return rows, left_out


def _in_stores(name: str, roles: RoleMap, size: ModelSize, room: int, streams: int) -> list[dict[str, Any]]:
    """What a choice takes, `None`: it grows; and for how many frames it fits, `None`: for any number."""
    from headforcing.measure.estimate import estimate as estimated
    from headforcing.measure.memory import longest
    from headforcing.stores import STORES, ReferenceStore

    rows = []
    for store in (name for name, kind in STORES.items() if kind is not ReferenceStore):
        stored = estimated(name, roles, size, store=store, streams=streams).stored
        fits = stored is not None and stored <= room
        frames = None if fits else longest(roles, size, store, room, streams)
        rows.append({"name": name, "store": store, "stored": stored, "frames": frames})
    return rows


def _verdict(row: dict[str, Any]) -> str:
    if row["frames"] is None:
        return "any length" if row["stored"] is not None else "any length that was tried"
    return f"up to {row['frames']} frames" if row["frames"] else "no"
