"""Ragged heads as one row axis: every head of every sample is a segment of rows. Integers only.

Kernels for sequences of different lengths take one tensor of rows and the places where sequences begin.
Here a sequence is a segment: the queries and the keys of one head of one sample. Where the keys of all
parts are views of one storage, each head's tokens one run of rows, that storage itself is the tensor of
rows and a segment is where a run begins; likewise the values. Anything else has to be packed.

Where things lie is all that decides, so a plan is made once per layout and kept.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from headforcing.attention.part import Part, queries

KEPT = 1024
"""Plans that are kept: a model has one per layer, phase and length of its memory."""


@dataclass(frozen=True)
class Address:
    """Where a tensor `[B, M, Hr, D]` lies: storages of one call are numbered, the rest is in elements."""

    storage: int
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """What a plan knows of one part: its sizes, and where keys and values lie."""

    batch: int
    heads: int
    queries: int
    keys: int
    k: Address
    v: Address

    def members(self) -> list[tuple[int, int]]:
        """Samples and heads."""
        return list(itertools.product(range(self.batch), range(self.heads)))


@dataclass(frozen=True)
class Layout:
    """Everything a plan depends on."""

    places: tuple[Place, ...]
    dim: int

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Layout:
        """The layout of the parts of one call."""
        storages: dict[int, int] = {}

        def address(x: Tensor) -> Address:
            memory = x.untyped_storage().data_ptr()
            return Address(storages.setdefault(memory, len(storages)), int(x.storage_offset()), x.stride())

        def place(part: Part) -> Place:
            batch, asked, heads, _ = part.q.shape
            return Place(batch, heads, asked, part.k.shape[1], address(part.k), address(part.v))

        return cls(tuple(place(part) for part in parts), parts[0].q.shape[-1])


@dataclass(frozen=True)
class Run:
    """Where the segments of one part begin: sample `b`, head `h` in row `first + b*sample + h*head`."""

    first: int
    sample: int
    head: int

    def at(self, member: tuple[int, int]) -> int:
        """The first row of a sample and head."""
        return self.first + member[0] * self.sample + member[1] * self.head

    def view(self, rows: Tensor, like: Tensor) -> Tensor:
        """The part's rows of a dense `[rows, 1, D]` in the shape of `like`, `[B, L, Hr, D]`."""
        dim = rows.shape[-1]
        strides = (self.sample * dim, dim, self.head * dim, 1)
        return rows.as_strided(like.shape, strides, rows.storage_offset() + self.first * dim)


@dataclass(frozen=True, eq=False)  # equal only to itself, so that what is built from it is found quickly
class Plan:
    """The segments of one call, in the order of their keys.

    Attributes:
        asked: first query row of every segment; behind the last one where the rows end.
        queries: how many of them count.
        begins: first key row of every segment; behind the last one where the rows end.
        used: how many of them count; the rows up to the next segment are not read.
        q_runs: query rows by part.
        k_runs: key rows by part.
        bases: where row 0 of keys and of values lies in its storage, in elements; `None`: keys and values
            have to be packed.
    """

    asked: tuple[int, ...]
    queries: tuple[int, ...]
    begins: tuple[int, ...]
    used: tuple[int, ...]
    q_runs: tuple[Run, ...]
    k_runs: tuple[Run, ...]
    bases: tuple[int, int] | None

    @property
    def packed(self) -> bool:
        """Whether all keys and values are copied in every pass."""
        return self.bases is None

    @property
    def ends(self) -> tuple[int, ...]:
        """The row behind the last key of every segment."""
        return tuple(begin + used for begin, used in zip(self.begins, self.used, strict=False))


@functools.lru_cache(maxsize=KEPT)
def plan_of(layout: Layout, gaps: bool = True) -> Plan:
    """The plan of a layout: in place where that is possible.

    Args:
        layout: where parts lie.
        gaps: whether rows between segments are left alone by the kernel; where not, parts that have such
            rows between them are packed.
    """
    keys = _in_place([(place, place.k) for place in layout.places], layout.dim)
    values = _in_place([(place, place.v) for place in layout.places], layout.dim)
    if keys is not None and values is not None and keys[0] == values[0]:
        plan = _plan(layout, keys[0], (keys[1], values[1]))
        if plan is not None and (gaps or plan.ends == plan.begins[1:]):
            return plan
    packed = _plan(layout, _packed(layout), None)
    assert packed is not None
    return packed


def _in_place(sides: Sequence[tuple[Place, Address]], dim: int) -> tuple[tuple[Run, ...], int] | None:
    """Where parts lie in rows of `D` elements of one storage, and where row 0 does; `None`: in no such."""
    if len({address.storage for _, address in sides}) > 1:
        return None
    base = min(address.offset for _, address in sides)
    runs = []
    for place, address in sides:
        sample, token, head, channel = address.strides
        sample, head = sample * (place.batch > 1), head * (place.heads > 1)  # the stride of one means nothing
        in_rows = (token == dim or place.keys == 1) and (channel == 1 or dim == 1)
        if not in_rows or any(number % dim for number in (address.offset, sample, head)):
            return None
        runs.append(Run((address.offset - base) // dim, sample // dim, head // dim))
    return tuple(runs), base


def _packed(layout: Layout) -> tuple[Run, ...]:
    """Key rows part by part; the longest come first, so that no long one is left for the end."""
    runs, row = {}, 0
    for part, place in sorted(enumerate(layout.places), key=lambda item: -item[1].keys):
        runs[part] = Run(row, place.heads * place.keys, place.keys)
        row += place.batch * place.heads * place.keys
    return tuple(runs[part] for part in range(len(runs)))


def _plan(layout: Layout, runs: tuple[Run, ...], bases: tuple[int, int] | None) -> Plan | None:
    """The plan of key rows; `None`: segments share rows, or queries would lie in an order no view has."""
    segments = sorted(
        (run.at(member), part, member)
        for part, (place, run) in enumerate(zip(layout.places, runs, strict=True))
        for member in place.members()
    )
    places = [layout.places[part] for _, part, _ in segments]
    begins = [begin for begin, _, _ in segments]
    ends = [begin + place.keys for begin, place in zip(begins, places, strict=True)]
    if any(end > after for end, after in zip(ends, begins[1:], strict=False)):
        return None
    asked = list(itertools.accumulate((place.queries for place in places), initial=0))
    rows = {(part, member): row for (_, part, member), row in zip(segments, asked, strict=False)}
    q_runs = []
    for part, place in enumerate(layout.places):
        first = rows[part, (0, 0)]
        steps = [rows.get((part, member), first) - first for member in ((1, 0), (0, 1))]
        q_runs.append(Run(first, *steps))
        if any(q_runs[-1].at(member) != rows[part, member] for member in place.members()):
            return None
    return Plan(
        asked=tuple(asked),
        queries=tuple(place.queries for place in places),
        begins=(*begins, ends[-1]),
        used=tuple(place.keys for place in places),
        q_runs=tuple(q_runs),
        k_runs=runs,
        bases=bases,
    )


Kernel = Callable[[Tensor, Tensor, Tensor, Plan], Tensor]
"""Attention of query rows `[Tq, 1, D]` with keys and values `[Tk, 1, D]` by segment: `[Tq, 1, D]`, dense."""


def attend_by(kernel: Kernel, parts: Sequence[Part], num_heads: int, *, gaps: bool = True) -> Tensor:
    """Attends with one call of a kernel; see `headforcing.attention.backends.Attend`.

    Args:
        kernel: attends by segment.
        parts: heads and what they see.
        num_heads: heads of the layer, `H`.
        gaps: whether the kernel leaves rows between segments alone, which may hold anything.
    """
    q, plan = parts[0].q, plan_of(Layout.of(parts), gaps)
    rows = q.new_empty(plan.asked[-1], 1, q.shape[-1])
    for part, run in zip(parts, plan.q_runs, strict=True):
        run.view(rows, part.q).copy_(part.q)
    answers = kernel(rows, *key_rows(parts, plan), plan)
    out = q.new_empty(q.shape[0], queries(parts), num_heads, q.shape[-1])
    for part, run in zip(parts, plan.q_runs, strict=True):
        part.heads.put(out[:, part.rows], run.view(answers, part.q))
    return out


def key_rows(parts: Sequence[Part], plan: Plan) -> tuple[Tensor, Tensor]:
    """Keys and values of all parts as rows, `[Tk, 1, D]` each: in place, or packed."""
    k, v = [part.k for part in parts], [part.v for part in parts]
    if plan.bases is None:
        return _rows_packed(k, plan), _rows_packed(v, plan)
    return _rows_in_place(k[0], plan, plan.bases[0]), _rows_in_place(v[0], plan, plan.bases[1])


def _rows_in_place(x: Tensor, plan: Plan, base: int) -> Tensor:
    dim = x.shape[-1]
    return x.as_strided((plan.begins[-1], 1, dim), (dim, dim, 1), base)


def _rows_packed(sides: Sequence[Tensor], plan: Plan) -> Tensor:
    rows = sides[0].new_empty(plan.begins[-1], 1, sides[0].shape[-1])
    for x, run in zip(sides, plan.k_runs, strict=True):
        run.view(rows, x).copy_(x)
    return rows
