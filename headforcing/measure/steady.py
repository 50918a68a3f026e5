"""What a head holds and sees once a long video has settled, found by running a real store on small tensors.

Nothing is known here of any role: a store is given some hundred frames of a tiny head, and what it holds
and shows is counted chunk by chunk. Some roles never come to rest, such as those that merge blocks of
four frames while chunks have three, but what they do repeats.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from headforcing.errors import OptionError, StreamShapeError
from headforcing.roles import HeadRole
from headforcing.roles.base import needs_phase
from headforcing.stores import KVStore, store_class
from headforcing.types import Chunk, Grid, Heads, Phase

FRAMES = 300
"""Frames of a simulated video, at least; the second half is counted."""
GRID = (12, 12)
"""Patches of a frame of the tiny head: squares of 2, 3, 4 and 6 divide it, and sixths of a frame."""
DTYPES = {2: torch.bfloat16, 4: torch.float32}
"""Types by the bytes of a number."""


@dataclass(frozen=True)
class Steady:
    """One head of a role in steady state, own chunk included; means over whole cycles.

    Attributes:
        stored: frames held, a part of a frame as such; without copies that a store makes for looking, what
            waits to be cut, and numbers that do not grow with a frame.
        attended: frames seen by a query in a noisy pass: tokens seen over tokens per frame.
        most: the same in the chunk that sees most.
        cycle: chunks after which it repeats.
    """

    stored: Fraction
    attended: Fraction
    most: Fraction
    cycle: int


@dataclass(frozen=True)
class Bytes:
    """What one role holds in one layer after every chunk of the second half of a video, for one video.

    Attributes:
        each: bytes per head for one number per token, chunk by chunk: multiply by heads, tokens per frame
            and channels per head.
        flat: bytes per head and channel whatever the tokens, such as those of averages, likewise.
        once: bytes that do not depend on any of these, likewise.
    """

    each: tuple[Fraction, ...]
    flat: tuple[int, ...]
    once: tuple[int, ...]

    def of(self, heads: int, tokens_per_frame: int, head_dim: int) -> list[Fraction]:
        """Bytes held, chunk by chunk."""
        size, channels = heads * tokens_per_frame * head_dim, heads * head_dim
        parts = zip(self.each, self.flat, self.once, strict=True)
        return [size * each + channels * flat + once for each, flat, once in parts]


@dataclass(frozen=True)
class _Tiny:
    """The size of what is simulated."""

    heads: int = 1
    grid: Grid = GRID
    head_dim: int = 1
    itemsize: int = 4

    @property
    def tokens(self) -> int:
        """Of one frame."""
        return self.grid[0] * self.grid[1]

    @property
    def size(self) -> int:
        """Numbers of one frame in all heads."""
        return self.heads * self.tokens * self.head_dim


@functools.lru_cache(maxsize=256)
def steady(role: HeadRole, window: int, chunk: int) -> Steady | None:
    """What a head of a role holds and sees, counted on the `reference` store; `None` is without bound.

    Args:
        role: fitted to the window.
        window: frames the model was trained on.
        chunk: frames of a chunk.

    Raises:
        OptionError: it does not repeat, or cannot be simulated.
    """
    if role.capacity(chunk) is None:
        return None
    tiny = _Tiny()
    rows = _run("reference", role, window, chunk, tiny)
    cycle = _cycle(rows, role)
    last = rows[-cycle:]
    if keeps_beside(role):
        kept = held_bytes(None, role, window, chunk, tiny.itemsize).each[-cycle:]
    else:
        kept = tuple(Fraction(row.kept, tiny.size) for row in last)
    stored = [each / (2 * tiny.itemsize) for each in kept]
    attended = [row.seen for row in last]
    return Steady(_mean(stored), _mean(attended), max(attended), cycle)


@functools.lru_cache(maxsize=256)
def held_bytes(store: str | None, role: HeadRole, window: int, chunk: int, itemsize: int) -> Bytes:
    """What a store holds for a role that keeps a bounded number of frames.

    Args:
        store: name of the store, at the end of a chunk; `None`: the `reference` store without what it
            copied for looking and what waits to be cut, which is what the role keeps.
        role: fitted to the window.
        window: frames the model was trained on.
        chunk: frames of a chunk.
        itemsize: bytes of one number, 2 or 4.

    Raises:
        OptionError: it does not repeat, does not grow with the size of a head as bytes should, or cannot
            be simulated.
    """
    if itemsize not in DTYPES:
        raise OptionError(f"numbers of {itemsize} bytes: what {role} holds is known for 2 and 4 only")
    small = _Tiny(itemsize=itemsize)
    wide, tall = _Tiny(itemsize=itemsize, head_dim=2), _Tiny(grid=(12, 24), itemsize=itemsize)
    large = _Tiny(2, (24, 12), 3, itemsize)
    runs = [_run(store or "reference", role, window, chunk, tiny) for tiny in (small, wide, tall, large)]
    one, two, more, check = ([row.held if store else row.kept for row in run] for run in runs)
    each = tuple(Fraction(b - a, tall.size - small.size) for a, b in zip(one, more, strict=True))
    flat = tuple(int(b - a - small.size * e) for a, b, e in zip(one, two, each, strict=True))
    once = tuple(int(a - small.size * e - f) for a, e, f in zip(one, each, flat, strict=True))
    found = Bytes(each, flat, once)
    if found.of(large.heads, large.tokens, large.head_dim) != check:
        raise OptionError(f"{role}: what a store holds for it cannot be told from its size alone")
    _cycle(one, role)
    return found


def _mean(frames: Sequence[Fraction]) -> Fraction:
    return sum(frames, Fraction()) / len(frames)


class _Row(NamedTuple):
    """One chunk: bytes kept, bytes held after looking, and frames seen.

    Kept are those held before anybody looked or after, whichever are less: a store copies for looking, and
    a role may only know then what it does not need.
    """

    kept: int
    held: int
    seen: Fraction


def _run(name: str, role: HeadRole, window: int, chunk: int, tiny: _Tiny) -> list[_Row]:
    """Every chunk of the second half of a video."""
    store = store_class(name)({role: Heads(range(tiny.heads), tiny.heads)}, window=window, layer=0)
    chunks = -(-max(FRAMES, 4 * window) // chunk)
    generator = torch.Generator().manual_seed(0)
    shape = (1, chunk, tiny.tokens, tiny.heads, tiny.head_dim)
    rows = []
    for index in range(chunks):
        k, v = torch.randn(2, *shape, generator=generator).to(DTYPES[tiny.itemsize])
        try:
            store.write(Chunk(index * chunk, k, v, tiny.grid, k.clone()))  # in memory of their own
        except StreamShapeError as error:
            raise OptionError(f"{role} cannot be simulated on {tiny.grid} patches: {error}") from error
        kept = store.nbytes()
        queries = range(index * chunk, (index + 1) * chunk) if "query" in role.depends_on else [None]
        seen = [_tokens(store, role, query, "denoise") for query in queries]
        if needs_phase(role):  # a store may keep what the last pass looked at
            for query in queries:
                _tokens(store, role, query, "clean")
        held = store.nbytes()
        rows.append(_Row(min(kept, held), held, Fraction(sum(seen), len(seen) * tiny.tokens)))
    return rows[chunks // 2 :]


def _tokens(store: KVStore, role: HeadRole, query: int | None, phase: Phase) -> int:
    """Tokens that one query sees, whole frames and what the role keeps beside them."""
    asked = () if query is None else (query,)
    view = store.view(role, phase, _as_it_is, *asked)
    beside = store.view_digest(role, _as_it_is, *asked)
    return view.k.shape[1] * view.k.shape[2] + (0 if beside is None else beside[0].shape[1])


def _as_it_is(x: Tensor, *_: object) -> Tensor:
    return x


def keeps_beside(role: HeadRole) -> bool:
    """Whether a role keeps anything beside whole frames, which `capacity` does not count."""
    return role.compressed() is not None


def _cycle(rows: Sequence[object], role: HeadRole) -> int:
    """Chunks after which what was counted repeats.

    Raises:
        OptionError: it does not, within a third of what was counted.
    """
    for cycle in range(1, len(rows) // 3 + 1):
        if all(rows[i] == rows[i - cycle] for i in range(cycle, len(rows))):
            return cycle
    raise OptionError(f"{role} does not settle: what it holds after {len(rows)} chunks still changes")
