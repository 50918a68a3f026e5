"""Which head has which role, and the file it is kept in.

A file is strict JSON: data only, one schema, nothing ignored and nothing guessed. Whatever is wrong
with it, the error is a `RoleMapError` that says where.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headforcing import strict_json
from headforcing.errors import RoleMapError, RoleMapMismatchError
from headforcing.origin import Scalar
from headforcing.role_json import decode_role, encode_role
from headforcing.roles import Anchor, HeadRole, Local, Memory

FORMAT = "headforcing.role-map"
MAX_BYTES = 1 << 20
"""Largest role-map file that is read, checked before anything is parsed."""

@dataclass(frozen=True)
class RoleMap:
    """A role for every head: `roles[layer][head]`.

    Attributes:
        layers: one tuple of roles per layer, all of the same length.
        provenance: where the map comes from, as flat facts (model, metric, seed, date, ...).

    Raises:
        RoleMapError: a layer is empty, layers differ in length, or something is not a role.
    """

    layers: tuple[tuple[HeadRole, ...], ...]
    provenance: Mapping[str, Scalar] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(tuple(layer) for layer in self.layers))
        heads = sorted({len(layer) for layer in self.layers})
        if len(heads) != 1 or heads[0] == 0:
            raise RoleMapError(f"layers name {heads or 'no'} heads: expected the same number, at least 1")
        for index, layer in enumerate(self.layers):
            for head, role in enumerate(layer):
                if not isinstance(role, HeadRole):
                    raise RoleMapError(f"layer {index}, head {head}: {role!r} is not a HeadRole")

    @classmethod
    def uniform(cls, role: HeadRole, layers: int, heads: int) -> RoleMap:
        """The same role for every head."""
        return cls(((role,) * heads,) * layers)

    @classmethod
    def from_labels(
        cls,
        labels: Sequence[Sequence[str]],
        roles: Mapping[str, HeadRole] | None = None,
        provenance: Mapping[str, Scalar] | None = None,
    ) -> RoleMap:
        """A map from a table of names `labels[layer][head]`.

        Args:
            labels: role names.
            roles: what the names mean; default `local`, `anchor` and `memory` of Head Forcing.
            provenance: see the class.
        """
        known = roles or {"local": Local(), "anchor": Anchor(), "memory": Memory()}
        for layer, row in enumerate(labels):
            for head, label in enumerate(row):
                if label not in known:
                    raise RoleMapError(
                        f"layer {layer}, head {head}: unknown role name {label!r}, expected one of "
                        f"{', '.join(known)}"
                    )
        return cls(tuple(tuple(known[label] for label in row) for row in labels), provenance or {})

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads per layer."""
        return len(self.layers), len(self.layers[0])

    def fit(self, layers: int, heads: int, window: int, chunk: int) -> RoleMap:
        """The map with every number of every role filled in for a model.

        Raises:
            RoleMapMismatchError: the model has other layers or heads.
            WindowError: a role needs more frames than the model was trained on.
        """
        if self.shape != (layers, heads):
            raise RoleMapMismatchError(
                f"the role map is for {self.shape[0]} layers x {self.shape[1]} heads, the model has "
                f"{layers} x {heads}: use a map measured on this model"
            )
        fitted = {role: role.fit(window, chunk) for layer in self.layers for role in layer}
        return RoleMap(tuple(tuple(fitted[role] for role in layer) for layer in self.layers), self.provenance)

    def counts(self) -> dict[HeadRole, int]:
        """Heads per role, over all layers, in order of appearance."""
        counts: dict[HeadRole, int] = {}
        for layer in self.layers:
            for role in layer:
                counts[role] = counts.get(role, 0) + 1
        return counts

    def where(self, role: HeadRole) -> tuple[int, int]:
        """Layer and head of the first head with this role."""
        for layer, row in enumerate(self.layers):
            if role in row:
                return layer, row.index(role)
        raise RoleMapError(f"no head has the role {role}: the map has {len(self.counts())} roles")

    def to_json(self) -> str:
        """The map as canonical JSON text."""
        names = _names(self.counts())
        rows = [json.dumps([names[role] for role in layer]) for layer in self.layers]
        document = {
            "format": FORMAT,
            "version": 1,
            "roles": {name: encode_role(role) for role, name in names.items()},
            "layers": [],
            "provenance": dict(self.provenance),
        }
        table = '"layers": [\n    ' + ",\n    ".join(rows) + "\n  ]"  # a row of heads per line
        return json.dumps(document, indent=2, allow_nan=False).replace('"layers": []', table, 1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "role map") -> RoleMap:
        """The map that `to_json` wrote.

        Args:
            text: the document, UTF-8 without a byte order mark.
            source: what to call it in messages.

        Raises:
            RoleMapError: anything at all is wrong with the document.
        """
        document = _parse(text, source)
        roles = {}
        for name, data in document.roles.items():
            roles[name] = decode_role(data, f"{source}: /roles/{name}")
        unused = set(roles) - {name for layer in document.layers for name in layer}
        if unused:
            raise RoleMapError(f"{source}: /roles names {sorted(unused)}, which no head has")
        try:
            return cls.from_labels(document.layers, roles, document.provenance)
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
        path = Path(path)
        try:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise RoleMapError(f"{path}: cannot be read ({error.strerror})") from error
        return cls.from_json(content, str(path))


class _Document(BaseModel):
    """The outer shape of a role-map file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal["headforcing.role-map"]
    version: Annotated[int, Field(ge=1, le=1)]
    roles: Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=256)]
    layers: Annotated[list[list[str]], Field(min_length=1)]
    provenance: dict[str, Scalar]


def _parse(text: str | bytes, source: str) -> _Document:
    try:
        return _Document.model_validate(strict_json.parse(text, MAX_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        where = "/".join(str(part) for part in first["loc"])
        raise RoleMapError(f"{source}: /{where}: {first['msg']}") from error
    except ValueError as error:
        raise RoleMapError(f"{source}: {error}") from error


def _names(roles: Mapping[HeadRole, int]) -> dict[HeadRole, str]:
    """A short name per role: its type, numbered where a type appears with several numbers."""
    kinds = [type(role).__name__.lower() for role in roles]
    seen: dict[str, int] = {}
    names = {}
    for role, kind in zip(roles, kinds, strict=True):
        seen[kind] = seen.get(kind, 0) + 1
        names[role] = kind if kinds.count(kind) == 1 else f"{kind}{seen[kind]}"
    return names
