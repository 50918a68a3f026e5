"""Heads that attend to different numbers of keys, in one call of a varlen kernel.

A varlen kernel, as FlashAttention's, takes the rows `[T, 1, D]` of many sequences and the numbers of the rows
where they begin (`cu_seqlens`). Here every head of every sample is a sequence of its own.

Where the keys of all parts are views of one storage, the tokens of each head in neighbouring rows, and values
lie likewise, these storages are the rows and are read in place. Anything else is packed: copied into new rows
in every pass. Rows between two heads that nobody attends to, as in buffers that are not full yet, are a
sequence without queries.

The layout depends on sizes, strides and offsets alone, so it is computed once and cached.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headforcing.attention.part import Part, num_queries
from headforcing.types import OncePerStream, sent

CACHED = 1024
"""Layouts that are cached: a model has one per layer, phase and number of stored frames."""


@dataclass(frozen=True)
class Address:
    """Where a tensor `[B, M, Hr, D]` lies: storages of one call are numbered, the rest is in elements."""

    storage: int
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class PartLayout:
    """Sizes of one part, and where its keys and values lie."""

    batch: int
    heads: int
    queries: int
    keys: int
    k: Address
    v: Address

    def sequences(self) -> list[tuple[int, int]]:
        """Sample and head of each."""
        return list(itertools.product(range(self.batch), range(self.heads)))


@dataclass(frozen=True)
class CallLayout:
    """All parts of one call: everything a `RaggedLayout` depends on."""

    parts: tuple[PartLayout, ...]
    dim: int

    @classmethod
    def of(cls, parts: Sequence[Part]) -> CallLayout:
        """The layout of the parts of one call."""
        storages: dict[int, int] = {}

        def address(x: Tensor) -> Address:
            memory = x.untyped_storage().data_ptr()
            return Address(storages.setdefault(memory, len(storages)), int(x.storage_offset()), x.stride())

        def layout(part: Part) -> PartLayout:
            batch, queries, heads, _ = part.q.shape
            return PartLayout(batch, heads, queries, part.k.shape[1], address(part.k), address(part.v))

        return cls(tuple(layout(part) for part in parts), parts[0].q.shape[-1])


@dataclass(frozen=True)
class Rows:
    """The rows of one part: those of sample `b` and head `h` begin at `first + b*sample + h*head`."""

    first: int
    sample: int
    head: int

    def start(self, sequence: tuple[int, int]) -> int:
        """The first row of a sample and head."""
        return self.first + sequence[0] * self.sample + sequence[1] * self.head

    def view(self, rows: Tensor, like: Tensor) -> Tensor:
        """The part's rows of a dense `[rows, 1, D]` in the shape of `like`, `[B, L, Hr, D]`."""
        dim = rows.shape[-1]
        strides = (self.sample * dim, dim, self.head * dim, 1)
        return rows.as_strided(like.shape, strides, rows.storage_offset() + self.first * dim)


@dataclass(frozen=True, eq=False)  # equal only to itself, so that its index tensors are found quickly
class RaggedLayout:
    """The sequences of one kernel call, in the order of their keys.

    Attributes:
        cu_seqlens_q: first query row of every sequence, and the number of query rows at the end.
        cu_seqlens_k: first key row of every sequence, and the number of key rows at the end.
        max_q: queries of the longest sequence.
        max_k: keys of the longest sequence that has queries.
        q_rows: query rows by part.
        k_rows: key rows by part.
        bases: where row 0 of keys and of values lies in its storage, in elements; `None`: packed.
    """

    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]
    max_q: int
    max_k: int
    q_rows: tuple[Rows, ...]
    k_rows: tuple[Rows, ...]
    bases: tuple[int, int] | None

    @property
    def packed(self) -> bool:
        """Whether all keys and values are copied in every pass."""
        return self.bases is None

    @property
    def gaps(self) -> bool:
        """Whether there are rows that nobody attends to."""
        return any(row == after for row, after in itertools.pairwise(self.cu_seqlens_q))


@functools.lru_cache(maxsize=CACHED)
def ragged_layout(call: CallLayout, gaps: bool = True) -> RaggedLayout:
    """The layout of a call: in place where that is possible.

    Args:
        call: where parts lie.
        gaps: whether there may be rows that nobody attends to; if not, parts with such rows between them are
            packed.
    """
    keys = _in_place([(part, part.k) for part in call.parts], call.dim)
    values = _in_place([(part, part.v) for part in call.parts], call.dim)
    if keys is not None and values is not None and keys[0] == values[0]:
        layout = _layout(call, keys[0], (keys[1], values[1]))
        if layout is not None and (gaps or not layout.gaps):
            return layout
    packed = _layout(call, _packed(call), None)
    assert packed is not None
    return packed


def _in_place(sides: Sequence[tuple[PartLayout, Address]], dim: int) -> tuple[tuple[Rows, ...], int] | None:
    """The parts as rows of `D` elements of one storage, and the offset of row 0; `None`: they are not."""
    if len({address.storage for _, address in sides}) > 1:
        return None
    base = min(address.offset for _, address in sides)
    rows = []
    for part, address in sides:
        sample, token, head, channel = address.strides
        sample, head = sample * (part.batch > 1), head * (part.heads > 1)  # the stride of one means nothing
        in_rows = (token == dim or part.keys == 1) and (channel == 1 or dim == 1)
        if not in_rows or any(number % dim for number in (address.offset, sample, head)):
            return None
        rows.append(Rows((address.offset - base) // dim, sample // dim, head // dim))
    return tuple(rows), base


def _packed(call: CallLayout) -> tuple[Rows, ...]:
    """Key rows part by part; the longest come first, so that no long one is left for the end."""
    rows, first = {}, 0
    for number, part in sorted(enumerate(call.parts), key=lambda item: -item[1].keys):
        rows[number] = Rows(first, part.heads * part.keys, part.keys)
        first += part.batch * part.heads * part.keys
    return tuple(rows[number] for number in range(len(rows)))


def _layout(call: CallLayout, k_rows: tuple[Rows, ...], bases: tuple[int, int] | None) -> RaggedLayout | None:
    """The layout of key rows; `None`: heads share rows, or no view has the order of the query rows."""
    sequences = sorted(
        (rows.start(sequence), number, sequence)
        for number, (part, rows) in enumerate(zip(call.parts, k_rows, strict=True))
        for sequence in part.sequences()
    )
    row, cu_seqlens_q, cu_seqlens_k = 0, [0], [0]
    starts: dict[tuple[int, tuple[int, int]], int] = {}
    for start, number, sequence in sequences:
        if start < cu_seqlens_k[-1]:
            return None
        if start > cu_seqlens_k[-1]:  # a gap
            cu_seqlens_q.append(row)
            cu_seqlens_k.append(start)
        starts[number, sequence] = row
        row += call.parts[number].queries
        cu_seqlens_q.append(row)
        cu_seqlens_k.append(start + call.parts[number].keys)
    q_rows = []
    for number, part in enumerate(call.parts):
        first = starts[number, (0, 0)]
        sample, head = (starts.get((number, one), first) - first for one in ((1, 0), (0, 1)))
        q_rows.append(Rows(first, sample, head))
        if any(q_rows[-1].start(sequence) != starts[number, sequence] for sequence in part.sequences()):
            return None
    return RaggedLayout(
        cu_seqlens_q=tuple(cu_seqlens_q),
        cu_seqlens_k=tuple(cu_seqlens_k),
        max_q=max(part.queries for part in call.parts),
        max_k=max(part.keys for part in call.parts),
        q_rows=tuple(q_rows),
        k_rows=k_rows,
        bases=bases,
    )


def _index_tensors(device: torch.device, layout: RaggedLayout) -> tuple[Tensor, Tensor]:
    """`cu_seqlens_q` and `cu_seqlens_k`, int32."""
    numbers = torch.tensor([layout.cu_seqlens_q, layout.cu_seqlens_k], dtype=torch.int32, device="cpu")
    both = sent(numbers, device)
    return both[0], both[1]


index_tensors = OncePerStream(_index_tensors, CACHED)
"""`cu_seqlens_q` and `cu_seqlens_k` of a layout on a device, int32."""

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""`kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)`, rows `[T, 1, D]`; returns dense query rows."""


def attend_ragged(kernel: Kernel, parts: Sequence[Part], num_heads: int, *, gaps: bool = True) -> Tensor:
    """Attends with one call of a varlen kernel; see `headforcing.attention.backends.Attend`.

    Args:
        kernel: attends sequence by sequence.
        parts: heads and what they attend to.
        num_heads: heads of the layer, `H`.
        gaps: whether rows that nobody attends to may hold anything, also NaN.
    """
    q, layout = parts[0].q, ragged_layout(CallLayout.of(parts), gaps)
    rows = q.new_empty(layout.cu_seqlens_q[-1], 1, q.shape[-1])
    for part, q_rows in zip(parts, layout.q_rows, strict=True):
        q_rows.view(rows, part.q).copy_(part.q)
    starts = index_tensors(q.device, layout)
    attended = kernel(rows, *key_rows(parts, layout), *starts, layout.max_q, layout.max_k)
    out = q.new_empty(q.shape[0], num_queries(parts), num_heads, q.shape[-1])
    for part, q_rows in zip(parts, layout.q_rows, strict=True):
        part.heads.put(out[:, part.rows], q_rows.view(attended, part.q))
    return out


def key_rows(parts: Sequence[Part], layout: RaggedLayout) -> tuple[Tensor, Tensor]:
    """Keys and values of all parts as rows, `[Tk, 1, D]` each: in place, or packed."""
    count, dim = layout.cu_seqlens_k[-1], parts[0].k.shape[-1]
    if layout.bases is not None:
        sides = zip((parts[0].k, parts[0].v), layout.bases, strict=True)
        k, v = (x.as_strided((count, 1, dim), (dim, dim, 1), base) for x, base in sides)
        return k, v
    k, v = (parts[0].k.new_empty(count, 1, dim) for _ in range(2))
    for part, rows in zip(parts, layout.k_rows, strict=True):
        rows.view(k, part.k).copy_(part.k)
        rows.view(v, part.v).copy_(part.v)
    return k, v
