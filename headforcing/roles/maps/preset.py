"""What a preset is: a published memory, with what its labels mean and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from headforcing.errors import RoleMapError
from headforcing.roles.base import HeadRole
from headforcing.roles.maps.origin import Origin
from headforcing.roles.maps.role_map import RoleMap

Roles = Mapping[str, HeadRole]
"""What the labels of a preset mean; a preset that requires no labels has the one label `all`."""
ALL = "all"
WINDOW, CHUNK = 21, 3
"""Of Self Forcing, for which the sources publish their numbers."""


@dataclass(frozen=True)
class Preset:
    """A published memory.

    Attributes:
        name: its name.
        roles: its roles by label, from the window of a model and its chunk, in frames; a WindowError where
            it requires more.
        source: where it is published, as an arXiv id, or in words.
        classifier: the classifier that finds its labels; `None`: all heads are alike, or none is known.
        importer: format of its published labels for `headforcing roles import`, where we read it.
        published: heads per label on Wan2.1 1.3B, for the labels where the number is known.
        counted: where these numbers come from, or why some are missing.
        first_layer: the label of every head of layer 0, where the source does not tell them apart.
    """

    name: str
    roles: Callable[[int, int], Roles]
    source: str
    classifier: str | None = None
    importer: str | None = None
    published: Mapping[str, int] = field(default_factory=dict)
    counted: str = ""
    first_layer: str | None = None

    def labels_needed(self) -> tuple[str, ...]:
        """Its labels; none, where all heads are alike."""
        names = tuple(self.roles(WINDOW, CHUNK))
        return () if names == (ALL,) else names

    def shares(self) -> Mapping[str, float] | None:
        """Share of all heads per label, as published; `None` where it is not known for every label."""
        names = self.labels_needed()
        if not names:
            return {ALL: 1.0}
        if set(names) != set(self.published):
            return None
        heads = sum(self.published.values())
        return {name: self.published[name] / heads for name in names}

    def uniform(self, layers: int, heads: int, window: int, chunk: int) -> RoleMap:
        """The map, for a method that treats all heads alike.

        Raises:
            RoleMapError: it does not; the message says how to get its labels.
            WindowError: it requires more frames than the window.
        """
        if needed := self.labels_needed():
            raise RoleMapError(f"{self.name} has other memories for {_listed(needed)} heads: {self._how()}")
        return RoleMap.uniform(self.roles(window, chunk)[ALL], layers, heads)

    def labelled(self, labels: Sequence[Sequence[str]], window: int = WINDOW, chunk: int = CHUNK) -> RoleMap:
        """The map for given labels.

        Args:
            labels: a label for every head, `labels[layer][head]`.
            window: frames the model was trained on.
            chunk: frames of a chunk.

        Raises:
            RoleMapError: the method takes no labels, there is another one, or the table is malformed.
            WindowError: it requires more frames than the window.
        """
        if not self.labels_needed():
            raise RoleMapError(f"{self.name} gives all heads the same memory: it takes no labels")
        table = [list(row) for row in labels]
        known = self.roles(window, chunk)
        RoleMap.from_labels(table, known)  # also the labels that are replaced must be right
        if self.first_layer is not None and table:
            table[0] = [self.first_layer] * len(table[0])
        return RoleMap.from_labels(table, known, Origin(notes={"roles": f"{self.name}, {self.source}"}))

    def _how(self) -> str:
        ways = []
        if self.importer is not None:
            ways.append(f"import published ones (`headforcing roles import FILE --format {self.importer}`)")
        if self.classifier is not None:
            ways.append(
                "measure your model (`headforcing profile`, then `headforcing roles classify --method "
                f"{self.classifier}`) and apply the role-map file"
            )
        ways.append(f"pass headforcing.roles.maps.presets.PRESETS[{self.name!r}].labelled(labels)")
        return ", or ".join(ways)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
