"""Attention with one call of a kernel: queries are copied to rows, keys and values lie where they are.

Where the storage of the parts cannot be read in place (see `headforcing.segments`), all keys and values
are copied once in every pass, which `Plan.packed` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from headforcing.part import Part, queries
from headforcing.segments import Layout, Plan, plan_of

Kernel = Callable[[Tensor, Tensor, Tensor, Plan], Tensor]
"""Attention of query rows `[Tq, 1, D]` with keys and values `[Tk, 1, D]` by segment: `[Tq, 1, D]`, dense."""


def attend_by(
    kernel: Kernel, parts: Sequence[Part], num_heads: int, *, step: int = 1, gaps: bool = True
) -> Tensor:
    """Attends with one call of a kernel; see `headforcing.backends.Attend`.

    Args:
        kernel: attends by segment.
        parts: heads and what they see.
        num_heads: heads of the layer, `H`.
        step: query rows of every segment are filled up to a multiple of this, with anything.
        gaps: whether the kernel leaves rows between segments alone, which may hold anything.
    """
    q, plan = parts[0].q, plan_of(Layout.of(parts), step, gaps)
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
        return _packed(k, plan), _packed(v, plan)
    return _in_place(k[0], plan, plan.bases[0]), _in_place(v[0], plan, plan.bases[1])


def _in_place(x: Tensor, plan: Plan, base: int) -> Tensor:
    dim = x.shape[-1]
    return x.as_strided((plan.begins[-1], 1, dim), (dim, dim, 1), base)


def _packed(sides: Sequence[Tensor], plan: Plan) -> Tensor:
    rows = sides[0].new_empty(plan.begins[-1], 1, sides[0].shape[-1])
    for x, run in zip(sides, plan.k_runs, strict=True):
        run.view(rows, x).copy_(x)
    return rows
