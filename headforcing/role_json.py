"""Roles as JSON: the name of the class and all its numbers, decoded without guessing."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from headforcing.episodic import EpisodicUpdate
from headforcing.errors import HeadForcingError, RoleMapError
from headforcing.lookup import module_names
from headforcing.role import HeadRole

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
_INSIDE: dict[str, Any] = {"update": EpisodicUpdate, "role": HeadRole}
"""Entries that hold an object, and what it describes."""
_JSON = {list: "array", dict: "object"}


def _decode(base: Callable[..., _T], data: dict[str, Any], where: str) -> _T:
    """Builds the subclass of `base` that `data["type"]` names from the other entries."""
    for entry, value in data.items():
        if isinstance(value, list) or (isinstance(value, dict) and entry not in _INSIDE):
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
    for entry, kind in _INSIDE.items():
        if isinstance(fields.get(entry), dict) and where.endswith(f"/{entry}"):
            raise RoleMapError(f"{where}/{entry} is an object inside another {entry}: expected one at most")
        if isinstance(fields.get(entry), dict):
            fields[entry] = _decode(kind, fields[entry], f"{where}/{entry}")
    try:
        built: _T = kinds[name](**fields)
        return built
    except (HeadForcingError, TypeError) as error:
        raise RoleMapError(f"{where}: {error}") from error


def encode_role(value: HeadRole | EpisodicUpdate) -> dict[str, Any]:
    """Its class name as `type`, and every field."""
    entries: dict[str, Any] = {"type": type(value).__name__}
    for f in dataclasses.fields(value):
        entry = getattr(value, f.name)
        entries[f.name] = encode_role(entry) if isinstance(entry, EpisodicUpdate | HeadRole) else entry
    return entries


def _concrete(base: Any) -> list[Any]:
    """Every class below `base` that has no abstract method."""
    found = []
    for cls in base.__subclasses__():
        if not getattr(cls, "__abstractmethods__", None):
            found.append(cls)
        found += _concrete(cls)
    return found
