"""The head profiles of Forcing-KV (arXiv:2605.09681): JSON, a list of static and of dynamic heads per layer.

Three layouts are in use: an object whose `layers` is a list of records or an object keyed by layer number;
such an object without a header; and a bare list of records. Every layer must be there and name every head
once: the project's own reader drops what it does not understand and makes missing layers all dynamic.

The labels get the roles of its preset (`headforcing.roles.maps.presets`). Labels of layer 0 are taken as they
stand; the project never uses them, all its heads are static there:
`PRESETS["forcing_kv"].labelled(map.labels)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from headforcing.errors import RoleMapError
from headforcing.roles.maps import strict_json
from headforcing.roles.maps.file import MAX_BYTES
from headforcing.roles.maps.importers import Imported

NAMES = {
    "static": ("static_head", "static_heads", "local_head", "local_heads", "spatial_head", "spatial_heads"),
    "dynamic": ("dynamic_head", "dynamic_heads", "temporal_head", "temporal_heads"),
}
TEXTS, COUNTS = ("format", "profile", "description"), ("num_layers", "num_heads")


def read(content: bytes, source: str) -> Imported:
    """The labels of a profile.

    Raises:
        RoleMapError: anything at all is wrong with it.
    """
    try:
        entries = strict_json.parse(content, MAX_BYTES)
    except ValueError as error:
        raise RoleMapError(f"{source}: {error}") from error
    header, layers = _split(entries, source)
    rows: dict[int, list[str]] = {}
    heads = header.get("num_heads")
    for layer, record in _numbered(layers, source):
        where = f"{source}: layer {layer}"
        if layer in rows:
            raise RoleMapError(f"{where} is there twice")
        rows[layer] = _row(record, heads, where)
        heads = len(rows[layer])
    says = {name: header[name] for name in TEXTS if name in header}
    return Imported(_table(rows, header.get("num_layers"), source), says)


def _split(entries: Any, source: str) -> tuple[dict[str, Any], Any]:
    """What stands before the layers, checked, and the layers."""
    if isinstance(entries, list):
        return {}, entries
    if not isinstance(entries, dict):
        raise RoleMapError(f"{source}: expected an object with layers, or an array of them")
    header = {name: value for name, value in entries.items() if name in (*TEXTS, *COUNTS)}
    rest = {name: value for name, value in entries.items() if name not in header}
    for name, value in header.items():
        if name in TEXTS and not (isinstance(value, str) and _is_unicode(value)):
            raise RoleMapError(f"{source}: /{name} is not a text")
        if name in COUNTS and (type(value) is not int or value < 1):
            raise RoleMapError(f"{source}: /{name} is {_shown(value)}: expected a number, at least 1")
    layers = rest.pop("layers", None) if "layers" in rest else {key: rest.pop(key) for key in list(rest)}
    if rest:
        known = ", ".join((*TEXTS, *COUNTS, "layers"))
        raise RoleMapError(f"{source}: unknown entries {_shown(', '.join(sorted(rest)))}: expected {known}")
    return header, layers


def _numbered(layers: Any, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every record with its number: its own `layer_idx`, else its key or its place."""
    if not isinstance(layers, list | dict) or not layers:
        shown = _shown(layers) if layers else "empty"
        raise RoleMapError(f"{source}: /layers is {shown}: expected an array or an object of layers")
    keyed = layers.items() if isinstance(layers, dict) else enumerate(layers)
    for key, record in keyed:
        if isinstance(key, str) and not re.fullmatch("0|[1-9][0-9]{0,5}", key):
            raise RoleMapError(f"{source}: {_shown(key)} is not the number of a layer")
        if not isinstance(record, dict):
            raise RoleMapError(f"{source}: layer {key} is {_shown(record)}: expected an object")
        own = record.get("layer_idx", int(key))
        if type(own) is not int or own < 0 or (isinstance(layers, dict) and own != int(key)):
            raise RoleMapError(f"{source}: layer {key}: layer_idx is {_shown(own)}: expected its number")
        yield own, record


def _row(record: Mapping[str, Any], heads: int | None, where: str) -> list[str]:
    """The labels of one layer; `heads` is how many it must have, where that is known."""
    lists: dict[str, list[Any]] = {}
    for label, names in NAMES.items():
        present = [name for name in names if name in record]
        if len(present) != 1:
            raise RoleMapError(
                f"{where} has {present or 'no'} lists of {label} heads: expected one, {names[0]}"
            )
        if not isinstance(record[present[0]], list):
            raise RoleMapError(f"{where}: {present[0]} is {_shown(record[present[0]])}: expected an array")
        lists[label] = record[present[0]]
    if unknown := sorted(set(record) - {"layer_idx", *NAMES["static"], *NAMES["dynamic"]}):
        raise RoleMapError(f"{where} has unknown entries {_shown(', '.join(unknown))}")
    heads = heads or sum(map(len, lists.values()))
    found: dict[int, str] = {}
    for label, ids in lists.items():
        for head in ids:
            if type(head) is not int or not 0 <= head < heads:
                raise RoleMapError(f"{where}: {label} head {_shown(head)}: expected 0 to {heads - 1}")
            if head in found:
                raise RoleMapError(f"{where}: head {head} is {found[head]} and again {label}")
            found[head] = label
    if not found or len(found) < heads:
        missing = next((head for head in range(heads) if head not in found), 0)
        raise RoleMapError(f"{where}: head {missing} is in no list: expected every head of {heads} once")
    return [found[head] for head in range(heads)]


def _table(rows: Mapping[int, list[str]], layers: int | None, source: str) -> list[list[str]]:
    """The rows in order, none missing."""
    layers = max(rows) + 1 if layers is None else layers
    if beyond := [layer for layer in rows if layer >= layers]:
        raise RoleMapError(f"{source}: layer {beyond[0]} is there, but num_layers is {layers}")
    if len(rows) < layers:
        missing = next(layer for layer in range(layers) if layer not in rows)
        raise RoleMapError(f"{source}: layer {missing} is missing, of {layers}: every layer must be listed")
    return [rows[layer] for layer in range(layers)]


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _shown(value: Any) -> str:
    """A value in a message, never long."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
