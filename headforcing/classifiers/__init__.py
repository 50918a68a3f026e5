"""Classifiers: from a saved profile to a role for every head, without the model.

One file each, with one function `classify(profile, **thresholds) -> Classification`; the folder is the
list. The order of heads never decides, except between heads whose scores are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from headforcing.lookup import named_module
from headforcing.origin import Scalar
from headforcing.profile import HeadProfile
from headforcing.roles import HeadRole

Labels = tuple[tuple[str, ...], ...]
"""Names `labels[layer][head]`, for `RoleMap.from_labels`."""


@dataclass(frozen=True)
class Classification:
    """What a classifier says.

    Attributes:
        method: name of the classifier.
        labels: name of the role of every head, `labels[layer][head]`.
        margin: `[layers, heads]` float64 in [0, 1]: how far the score of a head is from the nearest value at which its
            label would change, as a share of the range of that score over all heads; 0 is on the
            boundary, NaN where the method has none.
        roles: what the labels mean.
        settings: the thresholds.
        metrics: metrics that were read.
    """

    method: str
    labels: Labels
    margin: Tensor = field(compare=False)
    roles: Mapping[str, HeadRole]
    settings: Mapping[str, Scalar]
    metrics: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Heads per label, for every label that the method knows."""
        flat = [label for row in self.labels for label in row]
        return {name: flat.count(name) for name in self.roles}


Classify = Callable[..., Classification]


def find_classifier(name: str) -> Classify:
    """The `classify` of the module `headforcing.classifiers.<name>`.

    Raises:
        OptionError: there is no such module; the message lists the folder.
    """
    return cast(Classify, named_module(__name__, name).classify)


def table(flat: list[str], heads: int) -> Labels:
    """A flat list of labels as `labels[layer][head]`."""
    return tuple(tuple(flat[first : first + heads]) for first in range(0, len(flat), heads))
