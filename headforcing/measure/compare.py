"""Compares two role maps of one model.

Agreement, kappa and Jaccard compare labels, so they need common labels. NMI and ARI compare only which heads
are grouped together, so they also work for maps of different methods: the published maps of Pyramid Forcing
(arXiv:2605.13111) and Forcing-KV (arXiv:2605.09681) for Self Forcing have an NMI of 0.276 and an
ARI of 0.334.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from headforcing.errors import RoleMapMismatchError
from headforcing.measure.classifiers import short_names
from headforcing.roles.maps.role_map import RoleMap


@dataclass(frozen=True)
class Comparison:
    """Two tables of labels, head by head. Symmetric except for the order of the cross table.

    Attributes:
        labels_a: labels that occur in the first, sorted.
        labels_b: labels that occur in the second, sorted.
        table: heads with label a in the first and b in the second, `table[a][b]`.
        agreement: share of heads with the same label; `None` if no label occurs in both.
        kappa: Cohen's kappa, agreement beyond chance; 1 if both have one single label; `None` as above.
        jaccard: heads with this label in both, over heads with it in either, per label that occurs in both.
        nmi: mutual information over the mean of the two entropies; 1 if both have one single label.
        ari: adjusted Rand index; 1 if both have one single label, or all heads have different ones.
    """

    labels_a: tuple[str, ...]
    labels_b: tuple[str, ...]
    table: tuple[tuple[int, ...], ...]
    agreement: float | None
    kappa: float | None
    jaccard: Mapping[str, float]
    nmi: float
    ari: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return dataclasses.asdict(self)


def compare_labels(a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> Comparison:
    """Compares `labels[layer][head]` of one model.

    Raises:
        RoleMapMismatchError: their layers or heads differ.
    """
    if [len(row) for row in a] != [len(row) for row in b] or not any(map(len, a)):
        raise RoleMapMismatchError(
            f"cannot compare {_shape(a)} with {_shape(b)}: expected two maps of one model, with heads"
        )
    first, second = ([label for row in labels for label in row] for labels in (a, b))
    everything = sorted({*first, *second})
    square = cross_table(
        torch.tensor([everything.index(label) for label in first]),
        torch.tensor([everything.index(label) for label in second]),
        len(everything),
    )
    rows, columns = (sorted(set(labels)) for labels in (first, second))
    common = [label for label in rows if label in columns]
    same = jaccard(square).tolist()
    return Comparison(
        tuple(rows),
        tuple(columns),
        tuple(tuple(int(square[everything.index(x), everything.index(y)]) for y in columns) for x in rows),
        float(agreement(square)) if common else None,
        float(kappa(square)) if common else None,
        {label: same[everything.index(label)] for label in common},
        _nmi(square),
        _ari(square),
    )


def compare_maps(a: RoleMap, b: RoleMap) -> Comparison:
    """Compares role maps; a label is a short name of a role with all its numbers.

    Open numbers are filled in from the window and chunk of the model in the origin of the maps; if neither
    map names a model, or they name different sizes, roles are compared as written.

    Raises:
        RoleMapMismatchError: their layers or heads differ.
        WindowError: a role of one does not fit the window named by the other.
    """
    models = [each.origin.model for each in (a, b)]
    sizes = {(model.window, model.chunk) for model in models if model is not None}
    if len(sizes) == 1:
        a, b = (each.fit(*each.shape, *next(iter(sizes))) for each in (a, b))
    names = short_names([*a.counts(), *b.counts()])
    tables = ([[names[role] for role in layer] for layer in each.layers] for each in (a, b))
    return compare_labels(*tables)


def cross_table(a: Tensor, b: Tensor, kinds: int) -> Tensor:
    """Counts of heads by label number in both, `[..., n] and [..., n] -> [..., kinds, kinds]` float64."""
    return one_hot(a, kinds).double().mT @ one_hot(b, kinds).double()


def agreement(square: Tensor) -> Tensor:
    """Share of heads on the diagonal of a cross table, `[..., k, k] -> [...]`."""
    same: Tensor = square.diagonal(dim1=-2, dim2=-1)
    return same.sum(-1) / square.sum((-2, -1))


def kappa(square: Tensor) -> Tensor:
    """Cohen's kappa of a cross table, `[..., k, k] -> [...]`; 1 where both are one and the same label."""
    total = square.sum((-2, -1))
    chance = (square.sum(-1) * square.sum(-2)).sum(-1) / total.square()
    one = chance == 1
    return torch.where(one, 1.0, (agreement(square) - chance) / torch.where(one, 1.0, 1 - chance))


def jaccard(square: Tensor) -> Tensor:
    """Overlap of every label in a cross table, `[..., k, k] -> [..., k]`; NaN where it does not occur."""
    both: Tensor = square.diagonal(dim1=-2, dim2=-1)
    return both / (square.sum(-1) + square.sum(-2) - both)


def _nmi(square: Tensor) -> float:
    joint = square / square.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    entropies = torch.special.entr(rows).sum() + torch.special.entr(columns).sum()
    if entropies == 0:
        return 1.0
    shared = entropies - torch.special.entr(joint).sum()
    return min(1.0, max(0.0, float(2 * shared / entropies)))


def _ari(square: Tensor) -> float:
    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, rows, columns = pairs(square), pairs(square.sum(1)), pairs(square.sum(0))
    everything = pairs(square.sum())
    expected = rows * columns / everything if everything else 0.0
    most = (rows + columns) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)


def _shape(labels: Sequence[Sequence[str]]) -> str:
    heads = sorted({len(row) for row in labels})
    return f"{len(labels)} layers x {' or '.join(map(str, heads)) or 'no'} heads"
