"""How many bytes the keys and values of a model take, and how many frames are attended, before it is loaded.

There is one way to count: the real store runs through a long video. For bytes its chunks have the real size,
on the `meta` device where they are large: tensors there have a shape and no numbers. For frames they have one
head of one channel. Nothing is known here of any role.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from headforcing.errors import OptionError, StreamShapeError
from headforcing.measure.sizes import ModelSize
from headforcing.roles import HeadRole
from headforcing.roles.base import reads_phase
from headforcing.roles.compressed import nbytes
from headforcing.roles.maps.role_map import RoleMap
from headforcing.stores import KVStore, ReferenceStore, store_class
from headforcing.types import Chunk, Grid, Heads, Phase

DTYPES = {2: torch.bfloat16, 4: torch.float32}
"""Types by the bytes of a number."""
CHUNKS = 40
"""Chunks of a simulated video, at least; the second half is counted."""
LONGEST = 1 << 12
"""Chunks after which a video is as long as anybody wants."""
SMALL = 1 << 16
"""Largest number of elements in the keys of a chunk for which the CPU is faster than `meta`."""
GRID = (12, 12)
"""Patches where only frames are counted: squares of 2, 3, 4 and 6 divide it, and sixths of a frame."""
Counts = tuple[tuple[HeadRole, int], ...]
"""Heads per role in one layer."""


class Moment(NamedTuple):
    """One layer at the end of a chunk.

    Attributes:
        stored: bytes of the store.
        kept: bytes of the frames and compressed tokens that roles keep, and of the current chunk; no spare
            room in buffers, no copies for a view, nothing that waits to be compressed.
        attended: tokens that one query of a head of each role attends to in a noisy pass, a mean over
            queries.
    """

    stored: int
    kept: int
    attended: tuple[Fraction, ...]


@dataclass(frozen=True)
class Steady:
    """One head of a role once a video is long, current chunk included; means over whole cycles.

    Attributes:
        stored: frames stored, a part of a frame as such; see `Moment.kept`.
        attended: frames that a query attends to in a noisy pass: tokens over tokens per frame.
        most: the same in the chunk that attends to most.
        cycle: chunks after which it repeats.
    """

    stored: Fraction
    attended: Fraction
    most: Fraction
    cycle: int


@functools.lru_cache(maxsize=256)
def steady(role: HeadRole, window: int, chunk: int, grid: Grid = GRID) -> Steady | None:
    """What a head of a role stores and attends to; `None` is without bound.

    Args:
        role: fitted to the window.
        window: frames the model was trained on.
        chunk: frames of a chunk.
        grid: height and width of a frame in patches.

    Raises:
        OptionError: it does not repeat, or cannot compress frames of this grid.
    """
    if role.capacity(chunk) is None:
        return None
    compresses = role.compressed() is not None
    size = ModelSize(1, 1, 1, window, chunk, grid if compresses else GRID, itemsize=4)
    last = _one_cycle(role, size)
    attended = [moment.attended[0] / size.tokens_per_frame for moment in last]
    kept = [moment.kept for moment in last]
    if compresses:  # averages are no part of a frame: count what as many patches again add
        twice = _one_cycle(role, dataclasses.replace(size, grid=(grid[0], 2 * grid[1])))
        kept = [more.kept - moment.kept for moment, more in zip(last, twice, strict=True)]
    return Steady(_mean(kept) / size.head_bytes, _mean(attended), max(attended), len(last))


def kept_bytes(size: ModelSize, roles: RoleMap) -> int | None:
    """Most bytes that roles keep, with the current chunk; `None` is without bound.

    Raises:
        OptionError: a role cannot compress frames of this grid, or there is no type of so many bytes.
        WindowError: a role does not fit the window.
    """
    return _most(size, "ring", roles, "kept")


def stored_bytes(size: ModelSize, store: str, roles: RoleMap) -> int | None:
    """Most bytes of a full store at the end of a chunk, as in `status()`; `None` is without bound.

    Raises:
        OptionError: there is no such store, a role cannot compress frames of this grid, or there is no type
            of so many bytes.
        WindowError: a role does not fit the window.
    """
    return _most(size, store, roles, "stored")


@functools.lru_cache(maxsize=256)
def simulate(counts: Counts, size: ModelSize, store: str, chunks: int = CHUNKS) -> list[Moment]:
    """One layer of so many heads per role, chunk by chunk through the second half of a long video.

    Args:
        counts: heads per role.
        size: of the model.
        store: name of the store.
        chunks: of the video; more where the window asks for more.

    Raises:
        OptionError: there is no such store, a role cannot compress frames of this grid, or there is no type
            of so many bytes.
    """
    chunks = max(chunks, -(-4 * size.window // size.chunk))
    return list(itertools.islice(_moments(counts, size, store), chunks // 2, chunks))


def longest(roles: RoleMap, size: ModelSize, store: str, room: int, streams: int = 1) -> int | None:
    """Frames of a video until the store takes more than `room` bytes; `None`: more than `LONGEST` chunks.

    Args:
        roles: see `estimate`.
        size: of the model.
        store: name of the store.
        room: bytes for all layers and timelines.
        streams: timelines in memory.

    Raises:
        OptionError: see `estimate`.
    """
    layers, one = _by_counts(roles), dataclasses.replace(size, layers=1)
    share = Fraction(size.count, sum(roles.counts().values())) * streams
    series = [_moments(counts, one, store) for counts in layers]
    for chunk, moments in enumerate(itertools.islice(zip(*series, strict=True), LONGEST)):
        taken = sum(moment.stored * times for moment, times in zip(moments, layers.values(), strict=True))
        if taken * share > room:
            return chunk * size.chunk
    return None


def _moments(counts: Counts, size: ModelSize, store: str) -> Iterator[Moment]:
    """One layer of so many heads per role, chunk by chunk, without end."""
    if size.itemsize not in DTYPES:
        raise OptionError(f"numbers of {size.itemsize} bytes: expected 2 or 4")
    for role, _ in counts:
        _check_grid(role, size.grid)
    held = _empty(counts, size, store)
    shape = (1, size.chunk, size.tokens_per_frame, sum(count for _, count in counts), size.head_dim)
    device = "cpu" if math.prod(shape) <= SMALL else "meta"
    for start in itertools.count(0, size.chunk):
        q, k, v = (torch.zeros(shape, dtype=DTYPES[size.itemsize], device=device) for _ in "qkv")
        held.write(Chunk(start, k, v, size.grid, q))
        kept = _kept(held)
        attended = tuple(_attended(held, role, "denoise") for role, _ in counts)
        for role, _ in counts:
            if reads_phase(role):
                _attended(held, role, "clean")  # a store may hold what the last pass attended to
        yield Moment(held.nbytes(), min(kept, _kept(held)), attended)


def _check_grid(role: HeadRole, grid: Grid) -> None:
    """Raises an OptionError where a role cannot compress frames of this grid."""
    if (compressed := role.compressed()) is None:
        return
    try:
        compressed.check(grid)
    except StreamShapeError as error:
        raise OptionError(f"{role}: {error}: give a --grid of other sides, or other roles") from error


def _empty(counts: Counts, size: ModelSize, store: str) -> KVStore:
    """An empty store for so many heads per role."""
    heads, first, of = {}, 0, sum(count for _, count in counts)
    for role, count in counts:
        heads[role], first = Heads(range(first, first + count), of), first + count
    return store_class(store)(heads, window=size.window, layer=0)


def _kept(store: KVStore) -> int:
    """Bytes of the frames that roles keep, of the pending chunk, and of compressed tokens."""
    whole = 0
    for bank in store._banks.values():
        k, v = bank.staged()
        whole += (len(bank.frames) + k.shape[1]) * (k.nbytes + v.nbytes) // k.shape[1]
    buffers = nbytes([x for bank in store._banks.values() for x in bank.tensors()])
    return whole + store.nbytes() - buffers


def _attended(store: KVStore, role: HeadRole, phase: Phase) -> Fraction:
    """Tokens that a query attends to, compressed ones included, a mean over the queries of a chunk."""
    queries = list(store.pending or ()) if "query" in role.depends_on else [None]
    tokens = 0
    for query in queries:
        view = store.view(role, phase, _as_it_is, query)
        compressed = store.view_compressed(role, _as_it_is, query)
        tokens += view.k.shape[1] * view.k.shape[2] + (0 if compressed is None else compressed[0].shape[1])
    return Fraction(tokens, len(queries))


def _as_it_is(x: Tensor, *_: object) -> Tensor:
    return x


def _most(size: ModelSize, store: str, roles: RoleMap, what: str) -> int | None:
    """Most bytes of all layers at the end of one chunk, of as many as it takes for all of them to repeat."""
    if store_class(store) is ReferenceStore:
        raise OptionError("the reference store keeps lists for tests: estimate another, such as lean or ring")
    found = [steady(role, size.window, size.chunk, size.grid) for role in roles.counts()]
    bounded = [one.cycle for one in found if one is not None]
    if len(bounded) < len(found):
        return None
    layers = _by_counts(roles)
    one, chunks = dataclasses.replace(size, layers=1), max(CHUNKS, 2 * math.lcm(*bounded))
    series = [
        [getattr(moment, what) * times for moment in simulate(counts, one, store, chunks)]
        for counts, times in layers.items()
    ]
    return max(map(sum, zip(*series, strict=True)))


def _by_counts(roles: RoleMap) -> dict[Counts, int]:
    """How many layers have so many heads per role."""
    layers: dict[Counts, int] = {}
    for layer in roles.layers:
        counts = {role: layer.count(role) for role in sorted(set(layer), key=repr)}
        layers[tuple(counts.items())] = layers.get(tuple(counts.items()), 0) + 1
    return layers


def _mean(values: Sequence[Fraction | int]) -> Fraction:
    return Fraction(sum(values)) / len(values)


def _one_cycle(role: HeadRole, size: ModelSize) -> list[Moment]:
    """A layer of one role at the end of a long video, for as many chunks as it takes to repeat.

    Raises:
        OptionError: it does not, within a third of what was counted.
    """
    for chunks in (CHUNKS, 4 * CHUNKS):
        found = simulate(((role, 1),), size, "ring", chunks)
        for cycle in range(1, len(found) // 3 + 1):
            if found[cycle:] == found[:-cycle]:
                return found[-cycle:]
    raise OptionError(f"{role} does not settle: what is stored after {4 * CHUNKS} chunks still changes")
