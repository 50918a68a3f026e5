"""The document that a role map is kept in.

Strict JSON: data only, one schema, nothing ignored and nothing guessed. Its entries are `format`, `version`,
`model`, `measurement`, `stability`, `notes`, `roles` (what the names mean), `layers` (a row of names per
layer) and `hash`. Whoever writes one by hand may leave out all but `format`, `version`, `roles` and `layers`.

Version 2 is written. Version 1, of 0.1.0, is read: there the clean window was a role around another one.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from headforcing.errors import HeadForcingError, RoleMapError, module_names
from headforcing.roles import HeadRole
from headforcing.roles.episodic import EpisodicUpdate
from headforcing.roles.maps import strict_json
from headforcing.roles.maps.origin import Digest, Origin, Text, first_error

FORMAT = "headforcing.role-map"
VERSION = 2
MAX_BYTES = 1 << 20
"""Largest role-map file that is read, checked before anything is parsed."""


class Content(NamedTuple):
    """What a document says.

    Attributes:
        labels: names `labels[layer][head]`.
        roles: what the names mean.
        origin: where the map comes from.
    """

    labels: Sequence[Sequence[str]]
    roles: Mapping[str, HeadRole]
    origin: Origin


def _known(version: int) -> int:
    if not 1 <= version <= VERSION:
        raise ValueError(f"is {version}: expected 1 to {VERSION}; a newer file requires a newer headforcing")
    return version


class _Document(Origin):
    """The outer shape."""

    format: Literal["headforcing.role-map"]
    version: Annotated[int, AfterValidator(_known)]
    roles: Annotated[dict[Text, dict[str, Any]], Field(min_length=1, max_length=256)]
    layers: Annotated[list[list[str]], Field(min_length=1)]
    hash: Digest = ""


def document(content: Content) -> dict[str, Any]:
    """All entries as JSON values, `hash` last."""
    entries = {
        "format": FORMAT,
        "version": VERSION,
        **content.origin.model_dump(mode="json"),
        "roles": {name: encode_role(role) for name, role in content.roles.items()},
        "layers": [list(row) for row in content.labels],
    }
    return {**entries, "hash": content_hash(entries)}


def content_hash(entries: Mapping[str, Any]) -> str:
    """Hash of a document, whatever its layout; its own entry `hash` does not count."""
    return strict_json.digest(strict_json.canonical({k: v for k, v in entries.items() if k != "hash"}))


def encode(content: Content) -> str:
    """The document as text, a row of heads per line.

    Raises:
        RoleMapError: it is larger than what is read.
    """
    entries = document(content)
    rows = [json.dumps(row) for row in entries["layers"]]
    table = '"layers": [\n    ' + ",\n    ".join(rows) + "\n  ]"
    # No other entry can read like this: quotes inside of texts are escaped, and notes hold no lists.
    text = strict_json.pretty({**entries, "layers": []}).replace('\n  "layers": []', f"\n  {table}", 1)
    if len(text) > MAX_BYTES:
        raise RoleMapError(
            f"the role map takes {len(text)} bytes, but no file of more than {MAX_BYTES} is read: shorten "
            "its notes"
        )
    return text


def decode(text: str | bytes, source: str) -> Content:
    """What the document says.

    Args:
        text: UTF-8 without a byte order mark.
        source: what to call it in messages.

    Raises:
        RoleMapError: anything at all is wrong with it.
    """
    try:
        entries = strict_json.parse(text, MAX_BYTES)
        found = _Document.model_validate(entries)
    except ValidationError as error:
        raise RoleMapError(f"{source}: {first_error(error)}") from None  # which shows the file as it is
    except ValueError as error:
        raise RoleMapError(f"{source}: {error}") from error
    roles = {}
    for name, data in found.roles.items():
        where = f"{source}: /roles/{name}"
        roles[name] = decode_role(_from_version_1(data, where) if found.version == 1 else data, where)
    if unused := set(roles) - {name for layer in found.layers for name in layer}:
        raise RoleMapError(f"{source}: /roles names {sorted(unused)}, which no head has")
    if found.hash and found.hash != (actual := content_hash(entries)):
        raise RoleMapError(
            f"{source}: content hash is {actual}, but /hash says {found.hash}: the file was changed after it "
            "was written; if that was on purpose, delete the entry `hash`"
        )
    origin = Origin(
        model=found.model, measurement=found.measurement, stability=found.stability, notes=found.notes
    )
    return Content(found.layers, roles, origin)


def read_bytes(path: Path) -> bytes:
    """The content of a file of roles, at most one byte more than any such file requires.

    Raises:
        RoleMapError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RoleMapError(f"{path}: cannot be read ({error.strerror})") from error


for _name in module_names("headforcing.roles"):
    importlib.import_module(f"headforcing.roles.{_name}")  # so that the names of its roles are known


def decode_role(data: dict[str, Any], where: str) -> HeadRole:
    """The role that `encode_role` wrote.

    Args:
        data: the entries.
        where: what to call the place in messages.

    Raises:
        RoleMapError: anything is wrong with it.
    """
    role: HeadRole = _decode(HeadRole, data, where)
    return role


_T = TypeVar("_T")
_JSON = {list: "array", dict: "object"}


def _decode(base: Callable[..., _T], data: dict[str, Any], where: str) -> _T:
    """Builds the subclass of `base` that `data["type"]` names from the other entries."""
    for entry, value in data.items():
        update = entry == "update" and base is HeadRole  # the one entry that may be an object
        if isinstance(value, list) or (isinstance(value, dict) and not update):
            raise RoleMapError(f"{where}/{entry} is a JSON {_JSON[type(value)]}: expected a single value")
    fields = dict(data)
    name = fields.pop("type", None)
    kinds: dict[str, Any] = {}
    for cls in _concrete(base):
        if cls.__name__ == name and name in kinds:
            places = sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in (cls, kinds[name]))
            raise RoleMapError(f"{where}/type {name!r} may be {' or '.join(places)}: give one another name")
        kinds[cls.__name__] = cls
    if not isinstance(name, str) or name not in kinds:
        raise RoleMapError(f"{where}/type is {name!r}: expected one of {', '.join(sorted(kinds))}")
    known = {f.name for f in dataclasses.fields(kinds[name])}
    if unknown := sorted(set(fields) - known):
        raise RoleMapError(f"{where} has unknown entries {unknown}: {name} has {sorted(known)}")
    if isinstance(fields.get("update"), dict):
        fields["update"] = _decode(EpisodicUpdate, fields["update"], f"{where}/update")
    try:
        built: _T = kinds[name](**fields)
        return built
    except (HeadForcingError, TypeError) as error:
        raise RoleMapError(f"{where}: {error}") from error


def _from_version_1(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The entries of a role of version 1 as those of version 2.

    Raises:
        RoleMapError: it has a `clean_window`, or is a `CommitForcing` that was not right either.
    """
    if "clean_window" in data:
        raise RoleMapError(f"{where} has unknown entries ['clean_window']: it belongs to version {VERSION}")
    if data.get("type") != "CommitForcing":
        return data
    role, window = data.get("role"), data.get("window")
    if not isinstance(role, dict) or role.get("type") == "CommitForcing" or type(window) is not int:
        raise RoleMapError(f"{where}: expected a role of another kind in `role`, and a number in `window`")
    if set(data) - {"type", "positions", "role", "window"} or data.get("positions", "compact") != "compact":
        raise RoleMapError(f"{where}: expected `role` and `window` alone, positions are those of the role")
    return {**_from_version_1(role, f"{where}/role"), "clean_window": window}


def encode_role(value: HeadRole | EpisodicUpdate) -> dict[str, Any]:
    """Its class name as `type`, and every field."""
    entries: dict[str, Any] = {"type": type(value).__name__}
    for f in dataclasses.fields(value):
        entry = getattr(value, f.name)
        entries[f.name] = encode_role(entry) if isinstance(entry, EpisodicUpdate) else entry
    return entries


def _concrete(base: Any) -> list[Any]:
    """Every class below `base` that has no abstract method."""
    found = []
    for cls in base.__subclasses__():
        if not getattr(cls, "__abstractmethods__", None):
            found.append(cls)
        found += _concrete(cls)
    return found
