"""Rotary position embedding of a 3-D token grid, at any temporal position.

The base models ship a table of complex multipliers `[rows, D/2]` whose columns are split into time,
height and width. Inside the table we use its rows, so the result is the base model's, bit for bit; past its
last row the angle is computed, so there is no frame number at which it ends. Other models have tables of
cosines and sines, and in them only the frames of the call: these are computed at any position.

The device decides how: frame by frame on a CPU, all frames at once elsewhere
(`headforcing.adapters.rope_fused`).
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headforcing.adapters.rope_fused import at_once, packed
from headforcing.errors import RoleError
from headforcing.types import OncePerStream, runs, sent, stream_of

THETA = 10000
"""Wan's; only for tables of which the base model passes no more than the frames of the call."""
ROWS = 1024
"""Of Wan's table; past them the angle is computed."""
Tables = tuple[Tensor, Tensor]
"""Cosines and sines."""
RotaryCache = dict[Any, Tensor]
"""Rotation factors derived from one RoPE table, by positions."""
MOST_KEPT = 32
"""Rotation factors that are kept of a table from call to call."""


class _Kept(threading.local):
    """Rotation factors of the RoPE table that a thread used last, for all layers and passes.

    A table that is written to through `.data` is not noticed.
    """

    def __init__(self) -> None:
        self._table: Callable[[], Tensor | None] = lambda: None
        self._state: tuple[object, ...] = ()
        self._factors = RotaryCache()

    def of(self, table: Tensor) -> RotaryCache | None:
        """Those of a table, as long as it comes again unchanged, on the same stream.

        `None`: nothing is kept, because the table has no version counter, made in inference mode, or because
        a CUDA graph is captured.
        """
        if table.is_inference() or (stream := stream_of(table.device)) is None:
            return None
        state = table._version, table.data_ptr(), table.device, stream
        if self._table() is not table or self._state != state:
            self._factors = factors = RotaryCache()
            self._table, self._state = weakref.ref(table, lambda _: factors.clear()), state
        return self._factors


_kept = _Kept()


def rotate(
    x: Tensor,
    table: Tensor,
    positions: Sequence[float],
    height: int,
    width: int,
    patch: int = 1,
    cache: RotaryCache | None = None,
) -> Tensor:
    """Rotates queries or keys to temporal `positions`; space stays where it is.

    Args:
        x: queries or keys before RoPE, `[B, n, P, H, D]` with `P = height * width`.
        table: multipliers `[rows, D/2]`, complex; columns are time, height, width as in Wan:
            `D/2 - 2*(D/6) | D/6 | D/6`. Neighbouring channels are the pairs.
        positions: one temporal position per frame.
        height: patches per column.
        width: patches per row.
        patch: side of the squares of patches that are one in `x`: `P = height * width / patch**2`.
        cache: rotation factors of this table, as far as this call computed them; added to. Only for a table
            that does not tell its changes, made in inference mode.

    Returns:
        `[B, n, P, H, D]` in the dtype of `x`, and lying as `x` does, so that keys that lie head by head still
        do; computed in the precision of the table.
    """
    kept, time, whole = _kept.of(table), temporal_columns(table), in_one_kernel(x.device)
    cache = kept if kept is not None else {} if cache is None else cache

    def times() -> Tensor:
        rows = temporal_rows(table[:, :time], positions)
        return packed(rows.real, rows.imag) if whole else rows

    def spaces() -> Tensor:
        rows = _spatial_rows(table[:, time:], height, width, patch)
        return packed(rows.real, rows.imag) if whole else rows

    kind = "packed" if whole else "rows"
    found = (
        _once(cache, f"times, {kind}", positions, times),
        _once(cache, f"spaces, {kind}", (height, width, patch), spaces),
    )
    return at_once(x, *found) if whole else _by_frame(x, *found)


def _once(cache: RotaryCache, what: str, asked: Sequence[float], make: Callable[[], Tensor]) -> Tensor:
    """What was computed before for the same numbers, where 3 and 3.0 differ."""
    key = (what, *asked, *map(type, asked))
    found = cache.pop(key, None)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():  # they outlive the call
            found = make()
    cache[key] = found  # behind the others: the first one is the one that was not asked for longest
    if len(cache) > MOST_KEPT:
        del cache[next(iter(cache))]
    return found


def _by_frame(x: Tensor, times: Tensor, spaces: Tensor) -> Tensor:
    """Complex multiplication, frame by frame: on a CPU, the wide copies of a frame stay in the cache."""
    factors = times.new_empty(len(spaces), times.shape[1] + spaces.shape[1])  # [P, D/2]
    factors[:, times.shape[1] :] = spaces
    out = torch.empty_like(x)
    for frame, time in enumerate(times):
        factors[:, : times.shape[1]] = time
        wide = x[:, frame].to(times.real.dtype, memory_format=torch.contiguous_format, copy=True)
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # [B, P, H, D/2], shares memory
        pairs *= factors[:, None]
        out[:, frame] = wide
    return out


def rotate_real(
    x: Tensor,
    tables: Tables,
    positions: Sequence[float],
    height: int,
    width: int,
    patch: int = 1,
    cache: RotaryCache | None = None,
) -> Tensor:
    """As `rotate`, where the base model multiplies by cosines and sines; the same steps, so the same bits.

    Args:
        x: queries or keys before RoPE, `[B, n, P, H, D]`.
        tables: cosines and sines, `[rows, D/2]` in float32 or float64, columns as for `rotate`; only the
            spatial ones of the first `height * width` rows are used.
        positions: one temporal position per frame.
        height: patches per column.
        width: patches per row.
        patch: side of the squares of patches that are one in `x`.
        cache: rotation factors of these tables, as far as they are computed; added to.

    Returns:
        `[B, n, P, H, D]` in the dtype of `x`, and lying as `x` does.
    """
    time, cache = temporal_columns(tables[0]), {} if cache is None else cache
    merged = (slice(None, None, patch),) * 2

    def spaces() -> list[Tensor]:
        whole = [table[: height * width, time:].unflatten(0, (height, width)) for table in tables]
        return [each[merged].flatten(0, 1) for each in whole]

    times = temporal_tables(tables[0].device, tuple(positions), time, tables[0].dtype)
    if in_one_kernel(x.device):
        return at_once(
            x,
            _once(cache, "times", positions, lambda: packed(*times)),
            _once(cache, "spaces", (height, width, patch), lambda: packed(*spaces())),
        )
    both = spaces()
    out = torch.empty_like(x)
    for frame in range(x.shape[1]):
        cos, sin = (
            torch.cat([time[frame].expand(len(space), -1), space], dim=1)[:, None]  # [P, 1, D/2]
            for time, space in zip(times, both, strict=True)
        )
        even, odd = (x[:, frame, ..., first::2].float() for first in (0, 1))
        out[:, frame, ..., 0::2] = even * cos - odd * sin
        out[:, frame, ..., 1::2] = odd * cos + even * sin
    return out


@functools.lru_cache(maxsize=16)
def wan_table(pairs: int, device: torch.device) -> Tensor:
    """Wan's multipliers of the first `ROWS` frames, `[ROWS, pairs]`, for base models that make them late."""
    sizes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    with torch.inference_mode(False), torch.no_grad():  # it outlives the call
        places = torch.arange(ROWS, device="cpu")
        angles = torch.cat([torch.outer(places, _rates(size, torch.float64)) for size in sizes], dim=1)
        return torch.polar(torch.ones_like(angles), angles).to(device)


def in_one_kernel(device: torch.device) -> bool:
    """Whether all frames are rotated at once."""
    return device.type != "cpu"


def temporal_columns(table: Tensor) -> int:
    """Columns of a table `[rows, D/2]` that belong to time."""
    return table.shape[1] - 2 * (table.shape[1] // 3)


def per_pair(table: Tensor, pairs: int, halves: bool = False) -> Tensor:
    """Cosines or sines with one column per pair of channels, `[rows, D/2]`, of a table that has one or two.

    The two columns of a pair stand side by side, or, with `halves`, `pairs` columns apart.
    """
    return table[:, :pairs] if halves else table[:, :: table.shape[1] // pairs]


def begins(columns: Tensor) -> list[int]:
    """Rows of `[rows, columns]` that differ from the one before. Reads the device."""
    moved = (columns[1:] != columns[:-1]).any(1)
    return [0, *(moved.nonzero()[:, 0] + 1).tolist()]


def _temporal_tables(
    device: torch.device, positions: tuple[float, ...], columns: int, dtype: torch.dtype
) -> Tables:
    angles = torch.outer(torch.tensor(positions, dtype=dtype, device="cpu"), _rates(columns, dtype))
    cos, sin = sent(torch.stack([angles.cos(), angles.sin()]), device)
    return cos, sin


def _rates(columns: int, dtype: torch.dtype) -> Tensor:
    """Angles of position 1, `[columns]`; on the CPU, whatever the default device is."""
    steps = torch.arange(0, 2 * columns, 2, dtype=dtype, device="cpu")
    return 1.0 / THETA ** (steps / (2 * columns))


temporal_tables = OncePerStream(_temporal_tables, 256)
"""Temporal columns of cosines and sines, `[n, columns]`, by device, positions, columns and dtype.

Computed on the CPU, as base models do. New positions are copied to an accelerator once, without waiting.
"""


def temporal_rows(table: Tensor, positions: Sequence[float]) -> Tensor:
    """Multipliers of the given temporal positions, `[n, columns]`, from a table `[rows, columns]`.

    Whole numbers are rows of the table; where it ends, and for floats, angles are computed.
    """
    if positions and min(positions) < 0:
        raise RoleError(f"RoPE positions {tuple(positions)}: expected none below 0")
    parts, table_dtype = [], table.real.dtype
    for whole, group in itertools.groupby(positions, lambda position: isinstance(position, int)):
        if not whole:
            angles = [torch.full((), position, dtype=table_dtype, device=table.device) for position in group]
            parts.append(_factors(table, torch.stack(angles)))  # made where they are: nothing to wait for
            continue
        for start, stop in runs([int(position) for position in group]):
            if stop <= len(table):
                parts.append(table[start:stop])
            else:
                frames = torch.arange(start, stop, dtype=table_dtype, device=table.device)
                parts.append(_factors(table, frames))
    return torch.cat(parts)


def _factors(table: Tensor, positions: Tensor) -> Tensor:
    """Multipliers at any positions `[n]`, computed as the second row of the table says."""
    angle = positions[:, None] * table[1].angle()
    return torch.polar(torch.ones_like(angle), angle)


def _spatial_rows(table: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Multipliers of every `patch`-th patch of a frame, `[height * width / patch**2, columns]`."""
    rows, columns = table.chunk(2, dim=1)
    down, across = rows[:height:patch, None], columns[None, :width:patch]
    down, across = (side.expand(down.shape[0], across.shape[1], -1) for side in (down, across))
    return torch.cat([down, across], dim=-1).flatten(0, 1)
