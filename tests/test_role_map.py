"""Role maps and their files: round trip, and nothing but RoleMapError for the rest."""

from __future__ import annotations

import json
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headforcing import Anchor, Full, Local, Memory, RoleMap
from headforcing.episodic import ThresholdFifo
from headforcing.errors import RoleMapError, RoleMapMismatchError
from headforcing.origin import Origin
from headforcing.role_file import MAX_BYTES
from headforcing.testing.strategies import roles

GOOD = RoleMap(
    ((Local(), Anchor(), Memory(1, 8, 9)), (Memory(), Full(), Local(0))),
    Origin(notes={"seed": 3, "model": "demo"}),
)


@given(st.lists(roles(21, 3), min_size=6, max_size=6))
def test_a_map_survives_its_file(row):
    role_map = RoleMap(
        (row[:3], row[3:]), Origin(notes={"seed": 1, "share": 0.25, "note": "ü", "date": None})
    )
    again = RoleMap.from_json(role_map.to_json())
    assert again == role_map
    assert again.origin == role_map.origin
    assert again.to_json() == role_map.to_json()


def test_save_and_load(tmp_path):
    GOOD.save(tmp_path / "roles.json")
    assert RoleMap.load(tmp_path / "roles.json") == GOOD
    assert (
        '["local", "anchor", "memory1"]'.replace("local", "local1") in (tmp_path / "roles.json").read_text()
    )


def test_labels_make_a_map():
    assert RoleMap.from_labels([["local", "memory"]]) == RoleMap(((Local(), Memory()),))
    with pytest.raises(
        RoleMapError, match="layer 0, head 1: unknown role name 'anhcor', expected one of local"
    ):
        RoleMap.from_labels([["local", "anhcor"]])


@pytest.mark.parametrize(
    "layers", [(), ((),), ((Local(),), ()), ((Local(),), (Local(), Local())), (("local",),)]
)
def test_a_table_that_is_no_table_of_roles_is_refused(layers):
    with pytest.raises(RoleMapError):
        RoleMap(layers)


def test_a_map_for_another_model_is_refused():
    with pytest.raises(RoleMapMismatchError, match="2 layers x 3 heads, the model has 30 x 12"):
        GOOD.fit(30, 12, 21, 3)


def broken(**changes) -> str:
    entries = {**json.loads(GOOD.to_json()), **changes}
    del entries["hash"]
    return json.dumps(entries)


BAD = {
    "empty": "",
    "not json": "{",
    "a list": "[]",
    "null": "null",
    "wrong format": broken(format="other"),
    "version is text": broken(version="1"),
    "version is true": broken(version=True),
    "future version": broken(version=2),
    "extra entry": broken(extra=1),
    "no roles": broken(roles={}),
    "unused role": broken(roles={**json.loads(GOOD.to_json())["roles"], "spare": {"type": "Local"}}),
    "unknown type": broken(roles={"a": {"type": "Lokal"}}, layers=[["a"]]),
    "abstract type": broken(roles={"a": {"type": "HeadRole"}}, layers=[["a"]]),
    "no type": broken(roles={"a": {}}, layers=[["a"]]),
    "type is a list": broken(roles={"a": {"type": []}}, layers=[["a"]]),
    "negative": broken(roles={"a": {"type": "Local", "recent": -1}}, layers=[["a"]]),
    "bool for int": broken(roles={"a": {"type": "Local", "recent": True}}, layers=[["a"]]),
    "float for int": broken(roles={"a": {"type": "Local", "recent": 1.0}}, layers=[["a"]]),
    "text for int": broken(roles={"a": {"type": "Local", "recent": "1"}}, layers=[["a"]]),
    "unknown entry": broken(roles={"a": {"type": "Local", "recnt": 1}}, layers=[["a"]]),
    "missing entry": broken(roles={"a": {"type": "SlidingWindow"}}, layers=[["a"]]),
    "positions is a list": broken(roles={"a": {"type": "Local", "positions": ["compact"]}}, layers=[["a"]]),
    "update is a name": broken(roles={"a": {"type": "Memory", "update": "MaxMin"}}, layers=[["a"]]),
    "update is a role": broken(roles={"a": {"type": "Memory", "update": {"type": "Local"}}}, layers=[["a"]]),
    "novelty is huge": broken(
        roles={"a": {"type": "Memory", "update": {"type": "ThresholdFifo", "novelty": 9.0}}}, layers=[["a"]]
    ),
    "unknown name": broken(layers=[["local9"]]),
    "ragged": broken(layers=[["memory1", "memory2"], ["memory1"]]),
    "a number for a name": broken(layers=[[1]]),
    "duplicate keys": GOOD.to_json().replace('"version": 1,', '"version": 1, "version": 1,'),
    "NaN": GOOD.to_json().replace('"seed": 3', '"seed": NaN'),
    "infinite": GOOD.to_json().replace('"seed": 3', '"seed": 1e999'),
    "endless integer": GOOD.to_json().replace('"seed": 3', '"seed": ' + "9" * 10_000),
    "deep": "[" * 100_000,
    "byte order mark": "\ufeff" + GOOD.to_json(),
    "utf-16": GOOD.to_json().encode("utf-16"),
    "bad utf-8": b"\xff\xfe{}",
    "trailing": GOOD.to_json() + "x",
    "too large": " " * (MAX_BYTES + 1),
    "nested notes": broken(notes={"a": {"b": 1}}),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_a_malformed_document_raises_role_map_error_with_its_source(text, tmp_path):
    with pytest.raises(RoleMapError, match="here"):
        RoleMap.from_json(text, "here")
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RoleMapError, match=r"bad\.json"):
        RoleMap.load(path)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_file_that_cannot_be_read_raises_role_map_error(name, tmp_path):
    with pytest.raises(RoleMapError, match="cannot be read"):
        RoleMap.load(tmp_path / name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(["format", "version", "roles", "layers", "notes", "stability", "other"]), JSON)
@settings(max_examples=500)
def test_a_document_with_one_entry_replaced_is_accepted_only_when_it_is_right(entry, value):
    document = json.loads(GOOD.to_json())
    document[entry] = value
    del document["hash"]
    try:
        role_map = RoleMap.from_json(json.dumps(document))
    except RoleMapError:
        return
    assert role_map.layers == GOOD.layers
    assert entry in ("notes", "stability", "version", "format")


def test_ten_thousand_mutated_files_raise_role_map_error_or_say_what_they_say():
    generator = random.Random(0)
    text = GOOD.to_json()
    accepted = 0
    for _ in range(10_000):
        letters = list(text)
        for _ in range(generator.randint(1, 3)):
            where = generator.randrange(len(letters))
            action = generator.random()
            if action < 0.4:
                letters[where] = generator.choice(string.printable)
            elif action < 0.7:
                del letters[where : where + generator.randint(1, 30)]
            else:
                letters.insert(where, generator.choice(['"', "{", "[", "]", "-", "1e9", "true", ","]))
        try:
            role_map = RoleMap.from_json("".join(letters))
        except RoleMapError:
            continue
        accepted += 1
        assert RoleMap.from_json(role_map.to_json()) == role_map
    assert accepted < 5_000


def test_the_updates_are_part_of_the_file():
    role_map = RoleMap(((Memory(update=ThresholdFifo(novelty=0.5)),),))
    assert RoleMap.from_json(role_map.to_json()) == role_map
