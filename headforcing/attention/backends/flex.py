"""PyTorch's FlexAttention: one compiled kernel per layer that skips the blocks no query sees.

Heads are folded into one row axis, and the block mask follows from where segments begin: it is counted
out, never found by looking at every pair of rows, and kept per layout. The first call compiles.

A block of keys that a segment covers in part is read whole and masked, and a masked `NaN` is still `NaN`.
So rows between segments have to be somebody's: where there are unused ones, as before a memory has filled
up, keys and values are packed. Queries are filled up to whole blocks, so that a block has one segment.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from headforcing.attention.backends import Part
from headforcing.attention.needs import HALF, Needs
from headforcing.attention.ragged import Plan, attend_by

BLOCK = 128
"""Rows of a block of keys; blocks of queries are multiples of it. PyTorch's default."""
KEPT = 256
"""Block masks that are kept; one holds two numbers for every pair of a block of queries and one of keys."""
NEEDS = Needs(
    devices=("cpu", "cuda"),
    dtypes=(torch.float32, *HALF),
    head_dims=range(16, 257),
    compiler=True,
    function="torch.nn.attention.flex_attention:BlockMask.from_kv_blocks",
    argument="compute_q_blocks",
    remedy="install a newer PyTorch",
)


def attend(parts: Sequence[Part], num_heads: int) -> Tensor:
    """Attends with one call of `flex_attention`, compiled; see `headforcing.attention.backends.Attend`.

    Raises:
        OptionError: these tensors are none for it, or PyTorch is too old.
    """
    NEEDS.check("flex", parts)
    return attend_with(_flex_attention, parts, num_heads)


def attend_with(flex_attention: Callable[..., Any], parts: Sequence[Part], num_heads: int) -> Tensor:
    """The same with another function of the signature of `flex_attention`."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        answers: Tensor = flex_attention(*map(_plain, (q, k, v)), block_mask=_mask(plan, q.device))
        return answers.view(q.shape)

    with torch.inference_mode(False), torch.no_grad():  # one kind of tensors, compiled once
        return attend_by(kernel, parts, num_heads, step=BLOCK, gaps=False)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any) -> Any:
    kind = (q.device.type, q.dtype, q.shape[-1], block_mask.BLOCK_SIZE)
    return _compiled(kind)(q, k, v, block_mask=block_mask)


@functools.cache
def _compiled(kind: Hashable) -> Callable[..., Any]:
    """One kernel per kind, for all lengths; whole or not at all, since what is not would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    knows = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    apart: dict[str, Any] = {"isolate_recompiles": True} if knows else {}  # kinds do not count together
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True, fullgraph=True, **apart)
    return compiled


def _plain(rows: Tensor) -> Tensor:
    """Rows `[T, 1, D]` as `[1, 1, T, D]` in the same memory, a view of nothing: views are compiled apart."""
    count, _, dim = rows.shape
    strides = (count * dim, count * dim, dim, 1)
    return rows.new_empty(0).set_(rows.untyped_storage(), rows.storage_offset(), (1, 1, count, dim), strides)


@functools.lru_cache(maxsize=KEPT)
def _mask(plan: Plan, device: torch.device) -> Any:
    """The block mask of a plan; a `BlockMask`."""
    lengths = [after - first for first, after in zip(plan.asked, plan.asked[1:], strict=False)]
    block = math.gcd(*lengths)
    rows = [
        span
        for span, length in zip(zip(plan.begins, plan.ends, strict=False), lengths, strict=True)
        for _ in range(length // block)
    ]
    with torch.inference_mode(False):
        low, high = (torch.tensor(side, dtype=torch.int32) for side in zip(*rows, strict=True))  # [n]
        blocks = max(2, -(-plan.begins[-1] // BLOCK))  # a size of 1 is compiled apart
        partial, full = _blocks(low, high, blocks)
        low, high = low.to(device), high.to(device)
        tensors = [x.to(device)[None, None] for x in (*partial, *full)]

    def sees(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query row sees a key row; asked for in blocks that a segment covers in part."""
        row = query // block
        return (key >= low[row]) & (key < high[row])

    return NEEDS.load()(
        *tensors,
        BLOCK_SIZE=(block, BLOCK),
        mask_mod=sees,
        seq_lengths=(plan.asked[-1], plan.begins[-1]),
        compute_q_blocks=False,
    )


Listed = tuple[Tensor, Tensor]
"""How many blocks of keys every block of queries lists `[n]`, and which, the rest of a row is anything."""


def _blocks(low: Tensor, high: Tensor, blocks: int) -> tuple[Listed, Listed]:
    """The blocks of keys that the rows `[low, high)` cover in part, and those they cover whole.

    Args:
        low: first key row that a block of queries sees, `[n]`.
        high: the row behind the last one, `[n]`.
        blocks: blocks of keys.
    """
    first, behind = low // BLOCK, (high + BLOCK - 1) // BLOCK
    whole = (low + BLOCK - 1) // BLOCK
    end = torch.maximum(high // BLOCK, whole)
    number = torch.arange(blocks, dtype=low.dtype)
    before, after = whole - first, behind - end  # 1 where that block is covered in part
    skipped = torch.where(number < before[:, None], 0, (end - whole)[:, None])
    partial = (first[:, None] + number + skipped) % blocks
    return (before + after, partial), (end - whole, (whole[:, None] + number) % blocks)
