"""Malformed role-map files: a `RoleMapError`, or a map that is exactly what the file says.

Whether a document is right is decided a second time by `is_right`, which is written without the library's
parser. The two must agree on every document, of version 1 and of version 2.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import random
import re
import string
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from headforcing import Anchor, Full, HeadRole, Local, Memory, RoleMap, SlidingWindow
from headforcing.errors import RoleMapError
from headforcing.roles.episodic import ThresholdFifo, Uniform
from headforcing.roles.maps.origin import Measurement, ModelFacts, Origin
from headforcing.roles.positions import SCHEMES
from tests.examples import examples

HASH = f"sha256:{7:064}"
GOOD = RoleMap(
    (
        (Local(), Anchor(2, 1), Memory(1, 8, 9, ThresholdFifo(0.5))),
        (
            Memory(update=Uniform(), positions="clamped", clean_window=6),
            Full(clean_window=3),
            SlidingWindow(9, 1),
        ),
    ),
    Origin(
        model=ModelFacts(
            layers=2,
            heads=3,
            head_dim=8,
            window=21,
            chunk=3,
            model_class="M",
            base_model="a/b",
            fingerprint=HASH,
        ),
        measurement=Measurement(
            method="head_forcing",
            settings={"top": 0.25, "least": 2, "on": True, "none": None},
            metric=("attention_mass", "other"),
            profile=HASH,
            prompts=None,
            videos=8,
            seeds=(1, 2),
            library="0.1.0",
        ),
        stability={"kappa": 0.9, "halves": 20, "stable": True},
        notes={"seed": 3, "by": "ü"},
    ),
)
Read = Callable[[str], RoleMap]

# The second opinion -------------------------------------------------------------------------------

COUNT, MAYBE, POSITIONS = "count", "count or null", "positions"
FIELDS: dict[str, dict[str, str]] = {
    "Full": {"positions": POSITIONS},
    "Local": {"positions": POSITIONS, "recent": COUNT, "sink": COUNT},
    "Anchor": {"positions": POSITIONS, "recent": COUNT, "sink": COUNT},
    "SlidingWindow": {"positions": POSITIONS, "window": COUNT, "sink": COUNT},
    "Memory": {"positions": POSITIONS, "sink": COUNT, "episodic": MAYBE, "recent": MAYBE, "update": "update"},
}


class Wrong(Exception):
    """The document is not a role map."""


def need(condition: object) -> None:
    if not condition:
        raise Wrong


def is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_int(value: Any, least: int, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("sha256:[0-9a-f]{64}", value) is not None


def is_flat(value: Any) -> bool:
    return isinstance(value, dict) and all(
        is_text(k) and (v is None or is_text(v) or type(v) in (bool, int, float)) for k, v in value.items()
    )


def only(value: Any, rules: dict[str, Callable[[Any], bool]], required: set[str]) -> None:
    need(isinstance(value, dict) and required <= set(value) <= set(rules))
    need(all(rules[key](entry) for key, entry in value.items()))


def parsed(text: str) -> Any:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len({key for key, _ in found}) == len(found))
        return dict(found)

    def real(digits: str) -> float:
        need(math.isfinite(float(digits)))
        return float(digits)

    def constant(_: str) -> Any:
        raise Wrong

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_float=real, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Wrong from error


def check_role(role: Any, version: int) -> None:
    need(isinstance(role, dict) and isinstance(role.get("type"), str))
    if version == 1 and role["type"] == "CommitForcing":
        need({"role", "window"} <= set(role) <= {"type", "positions", "role", "window"})
        need(isinstance(role["role"], dict) and role["role"].get("type") != "CommitForcing")
        need(role.get("positions", "compact") == "compact" and is_int(role["window"], 0))
        return check_role(role["role"], version)
    need(role["type"] in FIELDS)
    fields = FIELDS[role["type"]] | ({"clean_window": MAYBE} if version == 2 else {})
    need(set(role) <= {"type", *fields})
    for name, value in role.items():
        kind = fields.get(name)
        need(kind is not COUNT or is_int(value, 0))
        need(kind is not MAYBE or value is None or is_int(value, 0))
        need(kind is not POSITIONS or value in SCHEMES)
    if role["type"] == "SlidingWindow":
        need("window" in role and role.get("sink", 0) < role["window"])
    if role["type"] == "Memory":
        update = role.get("update", {"type": "MaxMin"})
        need(isinstance(update, dict) and update.get("type") in ("MaxMin", "ThresholdFifo", "Uniform"))
        need(set(update) <= ({"type", "novelty"} if update["type"] == "ThresholdFifo" else {"type"}))
        novelty = update.get("novelty", 0.05)
        need(isinstance(novelty, float) and 0 <= novelty <= 2)
        chosen_on_device = update["type"] != "Uniform" and role.get("episodic", None) != 0
        need(role.get("positions", "compact") == "compact" or not chosen_on_device)


def hash_of(document: dict[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "hash"}
    raw = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )
    return "sha256:" + hashlib.sha256(len(raw).to_bytes(8, "little") + raw).hexdigest()


def check(document: Any) -> None:
    entries = {"format", "version", "model", "measurement", "stability", "notes", "roles", "layers", "hash"}
    need(isinstance(document, dict) and {"format", "version", "roles", "layers"} <= set(document) <= entries)
    need(document["format"] == "headforcing.role-map" and is_int(document["version"], 1, 2))
    roles, layers = document["roles"], document["layers"]
    need(isinstance(roles, dict) and 1 <= len(roles) <= 256 and all(map(is_text, roles)))
    need(isinstance(layers, list) and layers and all(isinstance(row, list) and row for row in layers))
    need(all(isinstance(name, str) for row in layers for name in row))
    need(len({len(row) for row in layers}) == 1)
    need({name for row in layers for name in row} == set(roles))
    for role in roles.values():
        check_role(role, document["version"])
    need(is_flat(document.get("stability", {})) and is_flat(document.get("notes", {})))
    if document.get("model") is not None:
        numbers = ("layers", "heads", "head_dim", "window", "chunk")
        rules = {name: lambda value: is_int(value, 1, 1 << 20) for name in numbers}
        rules["model_class"] = is_text
        rules["base_model"] = lambda value: value is None or is_text(value)
        rules["fingerprint"] = lambda value: value is None or is_digest(value)
        only(document["model"], rules, {*numbers, "model_class"})
        need((document["model"]["layers"], document["model"]["heads"]) == (len(layers), len(layers[0])))
    if document.get("measurement") is not None:
        rules = {name: lambda value: value is None or is_digest(value) for name in ("profile", "prompts")}
        rules |= {"method": is_text, "library": is_text, "settings": is_flat}
        rules["metric"] = lambda value: isinstance(value, list) and all(map(is_text, value))
        rules["videos"] = lambda value: is_int(value, 0)
        rules["seeds"] = lambda value: isinstance(value, list) and all(type(seed) is int for seed in value)
        only(document["measurement"], rules, {"method"})
    need("hash" not in document or document["hash"] == hash_of(document))


def right(text: str) -> Any:
    """The document, where it is one."""
    try:
        document = parsed(text)
        check(document)
    except Wrong:
        return None
    return document


def says(value: Any, entry: Any) -> bool:
    """Whether an object has every field that an entry of the document names, with the same value and type."""
    if isinstance(value, HeadRole) and entry["type"] == "CommitForcing":
        return says(value, entry["role"]) and says(value.clean_window, entry["window"])
    if dataclasses.is_dataclass(value) and isinstance(entry, dict):
        named = {key: item for key, item in entry.items() if key != "type"}
        return type(value).__name__ == entry["type"] and all(
            says(getattr(value, k), v) for k, v in named.items()
        )
    if isinstance(entry, dict):
        return isinstance(value, dict) and all(key in value and says(value[key], entry[key]) for key in entry)
    if isinstance(entry, list):
        return isinstance(value, list) and len(value) == len(entry) and all(map(says, value, entry))
    return type(value) is type(entry) and value == entry


def means(role_map: RoleMap, document: dict[str, Any]) -> bool:
    """Whether the map is what the document says, entry by entry."""
    table = [[document["roles"][name] for name in row] for row in document["layers"]]
    origin = role_map.origin.model_dump(mode="json")
    return (
        role_map.shape == (len(table), len(table[0]))
        and all(
            says(role, entry)
            for row, line in zip(role_map.layers, table, strict=True)
            for role, entry in zip(row, line, strict=True)
        )
        and all(says(origin[k], document[k]) for k in origin if k in document)
        and all(origin[k] in (None, {}) for k in origin if k not in document)
    )


# The mutations ------------------------------------------------------------------------------------

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 7, 21, 1.0, 0.5, -0.0, 2.5, 1e308, math.nan, math.inf),
    *(1 << 20, (1 << 20) + 1, 1 << 31, 1 << 63, 1 << 70, 10**400),
    *(
        "",
        "x",
        "1",
        "local",
        "memory1",
        "Local",
        "Full",
        "Memory",
        "HeadRole",
        "CommitForcing",
        "MaxMin",
        "Uniform",
        "compact",
    ),
    *(
        "absolute",
        "clamped",
        "headforcing.role-map",
        HASH,
        HASH.upper(),
        HASH + "\n",
        HASH[:-1],
        "\ud800",
        "\0",
    ),
    *(
        [],
        {},
        [1],
        ["local"],
        ["x", 1],
        {"a": 1},
        {"type": "Local"},
        {"type": "Uniform"},
        [[]],
        {"a": {"b": []}},
    ),
]
TEXT = [
    '"',
    "{",
    "[",
    "]",
    "}",
    "-",
    "1e9",
    "true",
    ",",
    ":",
    "null",
    "\ufeff",
    "\ud800",
    "\\ud800",
    "0",
    "9" * 20,
]


def places(value: Any, above: Any = None, key: Any = None) -> Iterator[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    if above is not None:
        yield above, key
    for inner in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[inner], value, inner)


def bent(document: Any, generator: random.Random) -> Any:
    """A document with something in it replaced, deleted, copied, renamed, swapped or moved by one."""
    document = copy.deepcopy(document)
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        found = list(places(document))
        if not found:
            return document
        (where, key), (other, place) = generator.choice(found), generator.choice(found)
        action = generator.randrange(7)
        if action == 0:
            where[key] = copy.deepcopy(generator.choice(VALUES))
        elif action == 1:
            del where[key]
        elif action == 2:
            where[key] = copy.deepcopy(other[place])
        elif action == 3 and isinstance(where, dict):
            name = generator.choice(
                [
                    *where,
                    key + "s",
                    key[:-1],
                    key.upper(),
                    "type",
                    "hash",
                    "update",
                    "role",
                    "window",
                    "clean_window",
                    "\ud800",
                ]
            )
            where[name] = where.pop(key)
        elif action == 4 and type(where[key]) in (int, float):
            where[key] += generator.choice([-1, 1, 1, 0.0, 0.5])
        elif action == 5 and isinstance(where, list):
            where.insert(key, copy.deepcopy(where[key]))
        elif isinstance(where[key], list | dict) and isinstance(where, dict):
            where[key] = dict.fromkeys(map(str, where[key]), 1) if action == 5 else [where[key]]
    return document


def text_bent(text: str, generator: random.Random) -> str:
    letters = list(text)
    for _ in range(generator.randint(1, 3)):
        where = generator.randrange(len(letters))
        action = generator.random()
        if action < 0.4:
            letters[where] = generator.choice(string.printable)
        elif action < 0.6:
            del letters[where : where + generator.randint(1, 30)]
        elif action < 0.7:
            letters[where:where] = letters[where : where + generator.randint(1, 60)]
        else:
            letters.insert(where, generator.choice(TEXT))
    return "".join(letters)


def doubled(text: str, generator: random.Random) -> str:
    """One of the lines with an entry comes twice."""
    lines = text.splitlines(keepends=True)
    where = generator.choice([i for i, line in enumerate(lines) if re.match(r'\s*"\w+": [^{\[]*,$', line)])
    return "".join([*lines[: where + 1], *lines[where:]])


TEXT_OF_GOOD = GOOD.to_json()
DOCUMENT = json.loads(TEXT_OF_GOOD)


def of_version_1(document: dict[str, Any]) -> dict[str, Any]:
    """The same, as 0.1.0 wrote it: a role with a clean window inside another one."""
    roles = {}
    for name, role in document["roles"].items():
        rest = {key: value for key, value in role.items() if key != "clean_window"}
        window = role["clean_window"]
        wrapped = {"type": "CommitForcing", "positions": "compact", "role": rest, "window": window}
        roles[name] = rest if window is None else wrapped
    document = {**document, "version": 1, "roles": roles}
    return {**document, "hash": hash_of(document)}


DOCUMENTS = (DOCUMENT, of_version_1(DOCUMENT))
TEXTS = (TEXT_OF_GOOD, json.dumps(DOCUMENTS[1], indent=2))


def by_text(generator: random.Random) -> str:
    text = generator.choice(TEXTS)
    return doubled(text, generator) if generator.random() < 0.1 else text_bent(text, generator)


def by_structure(generator: random.Random) -> str:
    return json.dumps(bent(generator.choice(DOCUMENTS), generator))


def with_a_right_hash(generator: random.Random) -> str:
    document = bent(generator.choice(DOCUMENTS), generator)
    if isinstance(document, dict) and "hash" in document:
        document["hash"] = hash_of(document)
    return json.dumps(document)


def fuzz(read: Read, make: Callable[[random.Random], str], count: int, seed: int = 0) -> int:
    """How many documents were accepted; on each, reading and the second opinion agree."""
    generator = random.Random(seed)
    accepted = 0
    for _ in range(count):
        text = make(generator)
        document = right(text)
        try:
            role_map = read(text)
        except RoleMapError:
            assert document is None, f"refused: {text}"
            continue
        accepted += 1
        assert document is not None, f"accepted: {text}"
        assert means(role_map, document), f"misread: {text}"
        again = RoleMap.from_json(role_map.to_json())
        assert again == role_map
        assert again.origin == role_map.origin
    return accepted


TRIES = {by_text: 1000, by_structure: 150, with_a_right_hash: 2000}
"""Documents of each kind: enough that every loosened parser below is found."""


@pytest.mark.parametrize(
    ("make", "accepted"), [(by_text, 0.002), (by_structure, 0.006), (with_a_right_hash, 0.1)]
)
def test_malformed_files_are_refused_or_are_what_they_say(make, accepted):
    count = examples(TRIES[make] // 2, nightly=10 * TRIES[make])
    assert int(accepted * count) <= fuzz(RoleMap.from_json, make, count) < count / 2
    assert all(right(text) is not None and RoleMap.from_json(text) == GOOD for text in TEXTS)


# A loosened parser is found -----------------------------------------------------------------------


def any_hash(text: str) -> RoleMap:
    found = strict(text)
    found.pop("hash", None)
    return RoleMap.from_json(json.dumps(found))


def last_key_wins(text: str) -> RoleMap:
    return RoleMap.from_json(json.dumps(strict(text)))


def changing(change: Callable[[dict[str, Any]], None]) -> Read:
    """A reader that mends a document before it is read."""

    def read(text: str) -> RoleMap:
        document = strict(text)
        change(document)
        if "hash" in document:
            document["hash"] = hash_of(document)
        return RoleMap.from_json(json.dumps(document))

    return read


def strict(text: str) -> dict[str, Any]:
    RoleMap.from_json("1" if "NaN" in text or "Infinity" in text else TEXT_OF_GOOD)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise RoleMapError("x") from error
    if not isinstance(document, dict):
        raise RoleMapError("x")
    return document


def unknown_entries(document: dict[str, Any]) -> None:
    for name in set(document) - set(DOCUMENT):
        del document[name]


def clamped(document: dict[str, Any]) -> None:
    model = document.get("model")
    if isinstance(model, dict) and type(model.get("window")) is int:
        model["window"] = min(max(model["window"], 1), 1 << 20)


def whole_floats(document: dict[str, Any]) -> None:
    for where, key in list(places(document)):
        if isinstance(where[key], float) and where[key].is_integer():
            where[key] = int(where[key])


def unused_roles(document: dict[str, Any]) -> None:
    if isinstance(document.get("roles"), dict):
        named = json.dumps(document.get("layers"))
        document["roles"] = {name: role for name, role in document["roles"].items() if f'"{name}"' in named}


def other_shapes(document: dict[str, Any]) -> None:
    layers = document.get("layers")
    if isinstance(document.get("model"), dict) and isinstance(layers, list) and layers and layers[0]:
        document["model"] = {**document["model"], "layers": len(layers)}


def no_versions(document: dict[str, Any]) -> None:
    """A clean window in version 1, where roles have none."""
    if document.get("version") != 1 or not isinstance(document.get("roles"), dict):
        return
    document["version"] = 2
    for name, role in document["roles"].items():
        if isinstance(role, dict) and isinstance(role.get("role"), dict):
            document["roles"][name] = {**role["role"], "clean_window": role.get("window")}


def no_stability(document: dict[str, Any]) -> None:
    document["stability"] = {}


LOOSE: list[tuple[Read, Callable[[random.Random], str]]] = [
    (any_hash, by_structure),
    (last_key_wins, by_text),
    *((changing(f), with_a_right_hash) for f in (unknown_entries, clamped, whole_floats, no_stability)),
    *((changing(f), with_a_right_hash) for f in (unused_roles, other_shapes, no_versions)),
]


LATE = (3, 6, 7)
"""Found after hundreds of documents."""


@pytest.mark.parametrize(
    ("read", "make"),
    [
        pytest.param(*loose, id=str(number), marks=pytest.mark.slow if number in LATE else ())
        for number, loose in enumerate(LOOSE)
    ],
)
def test_a_loosened_parser_is_found(read, make):
    with pytest.raises(AssertionError, match=r"^(accepted|misread|refused): "):
        fuzz(read, make, TRIES[make])
