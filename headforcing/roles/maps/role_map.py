"""Which head has which role, and where that was measured; saved as one JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headforcing.errors import RoleMapError, RoleMapMismatchError
from headforcing.roles import Anchor, HeadRole, Local, Memory
from headforcing.roles.maps import file as role_file
from headforcing.roles.maps.origin import Origin


@dataclass(frozen=True)
class RoleMap:
    """A role for every head: `roles[layer][head]`.

    Attributes:
        layers: one tuple of roles per layer, all of the same length.
        origin: where the map comes from; maps with the same roles are equal, whatever it says.
        labels: what the roles are called, `labels[layer][head]`; default: their types, numbered where a
            type appears with several numbers. Maps with the same roles are equal, whatever they are called.

    Raises:
        RoleMapError: a layer is empty, layers differ in length, something is not a role, the origin
            speaks of another number of layers or heads, or one label stands for two roles.
    """

    layers: tuple[tuple[HeadRole, ...], ...]
    origin: Origin = field(default_factory=Origin, compare=False)
    labels: tuple[tuple[str, ...], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(tuple(layer) for layer in self.layers))
        heads = sorted({len(layer) for layer in self.layers})
        if len(heads) != 1 or heads[0] == 0:
            raise RoleMapError(f"layers name {heads or 'no'} heads: expected the same number, at least 1")
        for index, layer in enumerate(self.layers):
            for head, role in enumerate(layer):
                if not isinstance(role, HeadRole):
                    raise RoleMapError(f"layer {index}, head {head}: {role!r} is not a HeadRole")
        if not isinstance(self.origin, Origin):
            raise RoleMapError(f"origin is a {type(self.origin).__name__}: expected an Origin")
        model = self.origin.model
        if model is not None and (model.layers, model.heads) != self.shape:
            raise RoleMapError(
                f"the table has {self.shape[0]} layers x {self.shape[1]} heads, but the model it was "
                f"measured on {model.layers} x {model.heads}: one of them is wrong"
            )
        if self.labels:
            object.__setattr__(self, "labels", tuple(tuple(row) for row in self.labels))
            self._check_labels()
        else:
            names = _names(self.counts())
            labels = tuple(tuple(names[role] for role in layer) for layer in self.layers)
            object.__setattr__(self, "labels", labels)

    @classmethod
    def uniform(cls, role: HeadRole, layers: int, heads: int) -> RoleMap:
        """The same role for every head."""
        return cls(((role,) * heads,) * layers)

    @classmethod
    def from_labels(
        cls,
        labels: Sequence[Sequence[str]],
        roles: Mapping[str, HeadRole] | None = None,
        origin: Origin | None = None,
    ) -> RoleMap:
        """A map from a table of names `labels[layer][head]`.

        Args:
            labels: role names.
            roles: what the names mean; default `local`, `anchor` and `memory` of Head Forcing.
            origin: where they come from; default: unknown.

        Raises:
            RoleMapError: a name has no meaning, or see the class.
        """
        known = roles or {"local": Local(), "anchor": Anchor(), "memory": Memory()}
        for layer, row in enumerate(labels):
            for head, label in enumerate(row):
                if label not in known:
                    raise RoleMapError(
                        f"layer {layer}, head {head}: unknown role name {label!r}, expected one of "
                        f"{', '.join(known)}"
                    )
        layers = tuple(tuple(known[label] for label in row) for row in labels)
        return cls(layers, origin or Origin(), tuple(tuple(row) for row in labels))

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads per layer."""
        return len(self.layers), len(self.layers[0])

    def fit(self, layers: int, heads: int, window: int, chunk: int) -> RoleMap:
        """The map with every number of every role filled in for a model.

        Raises:
            RoleMapMismatchError: the model has other layers or heads.
            WindowError: a role requires more frames than the model was trained on.
        """
        if self.shape != (layers, heads):
            raise RoleMapMismatchError(
                f"the role map is for {self.shape[0]} layers x {self.shape[1]} heads, the model has "
                f"{layers} x {heads}: use a map measured on this model"
            )
        fitted = {role: role.fit(window, chunk) for layer in self.layers for role in layer}
        roles = tuple(tuple(fitted[role] for role in layer) for layer in self.layers)
        return RoleMap(roles, self.origin, self.labels)

    def counts(self) -> dict[HeadRole, int]:
        """Heads per role, over all layers, in order of appearance."""
        counts: dict[HeadRole, int] = {}
        for layer in self.layers:
            for role in layer:
                counts[role] = counts.get(role, 0) + 1
        return counts

    def named(self) -> dict[str, HeadRole]:
        """What every label means, in order of appearance."""
        pairs = (zip(*rows, strict=True) for rows in zip(self.labels, self.layers, strict=True))
        return {label: role for row in pairs for label, role in row}

    def where(self, role: HeadRole) -> tuple[int, int]:
        """Layer and head of the first head with this role."""
        for layer, row in enumerate(self.layers):
            if role in row:
                return layer, row.index(role)
        raise RoleMapError(f"no head has the role {role}: the map has {len(self.counts())} roles")

    @property
    def hash(self) -> str:
        """Content hash, over roles and origin: the one that `to_json` writes."""
        return str(role_file.document(self._content())["hash"])

    def to_json(self) -> str:
        """The map as canonical JSON text, with its content hash."""
        return role_file.encode(self._content())

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "role map") -> RoleMap:
        """The map that `to_json` wrote, or a person.

        A content hash must be right; a file without one is taken as it is, so maps can be written by
        hand, and changed on purpose by deleting the entry `hash`.

        Args:
            text: the document, UTF-8 without a byte order mark; see `headforcing.roles.maps.file`.
            source: what to call it in messages.

        Raises:
            RoleMapError: anything at all is wrong with the document.
        """
        content = role_file.decode(text, source)
        try:
            return cls.from_labels(*content)
        except RoleMapError as error:
            raise RoleMapError(f"{source}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the map to a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> RoleMap:
        """Reads a map from a JSON file.

        Raises:
            RoleMapError: the file is missing, too large, or not a role map.
        """
        return cls.from_json(role_file.read_bytes(Path(path)), str(path))

    def _content(self) -> role_file.Content:
        return role_file.Content([list(row) for row in self.labels], self.named(), self.origin)

    def _check_labels(self) -> None:
        if [len(row) for row in self.labels] != [len(row) for row in self.layers]:
            raise RoleMapError(f"labels are {self.labels}: expected {self.shape[0]} rows of {self.shape[1]}")
        named = self.named()
        for layer, (labels, roles) in enumerate(zip(self.labels, self.layers, strict=True)):
            for head, (label, role) in enumerate(zip(labels, roles, strict=True)):
                if named[label] != role:
                    raise RoleMapError(
                        f"layer {layer}, head {head}: {label!r} is {role}, elsewhere {named[label]}"
                    )


def _names(roles: Mapping[HeadRole, int]) -> dict[HeadRole, str]:
    """A short name per role: its type, numbered where a type appears with several numbers."""
    kinds = [type(role).__name__.lower() for role in roles]
    seen: dict[str, int] = {}
    names = {}
    for role, kind in zip(roles, kinds, strict=True):
        seen[kind] = seen.get(kind, 0) + 1
        names[role] = kind if kinds.count(kind) == 1 else f"{kind}{seen[kind]}"
    return names
