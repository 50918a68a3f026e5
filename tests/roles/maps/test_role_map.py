"""Role maps and their files: round trip, and nothing but RoleMapError for the rest."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headforcing import Anchor, Full, Local, Memory, RoleMap
from headforcing.errors import RoleMapError, RoleMapMismatchError
from headforcing.roles.episodic import ThresholdFifo
from headforcing.roles.maps.file import MAX_BYTES
from headforcing.roles.maps.origin import Measurement, ModelFacts, Origin
from tests.examples import examples
from tests.strategies import roles

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
    ("labels", "message"),
    [
        ((("a",),), "expected 1 rows of 2"),
        ((("a", "b"), ("a", "b")), "expected 1 rows of 2"),
        ((("a", "a"),), "layer 0, head 0: 'a' is Local.*, elsewhere Memory"),
    ],
)
def test_labels_that_do_not_fit_the_roles_are_refused(labels, message):
    with pytest.raises(RoleMapError, match=message):
        RoleMap(((Local(), Memory()),), labels=labels)


def test_what_is_no_json_is_said_to_be_none():
    for text in ("{", b"\xff", "[1,]"):
        with pytest.raises(RoleMapError, match="not strict JSON"):
            RoleMap.from_json(text)


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
    "future version": broken(version=3),
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
    "duplicate keys": GOOD.to_json().replace('"version": 2,', '"version": 2, "version": 2,'),
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
@settings(max_examples=examples(500))
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


def test_the_updates_are_part_of_the_file():
    role_map = RoleMap(((Memory(update=ThresholdFifo(novelty=0.5)),),))
    assert RoleMap.from_json(role_map.to_json()) == role_map


# Where it comes from, and the content hash --------------------------------------------------------

FACTS = ModelFacts(
    layers=2, heads=3, head_dim=8, window=21, chunk=3, model_class="M", fingerprint=f"sha256:{0:064}"
)
MEASURED = Measurement(
    method="head_forcing", settings={"top": 0.25}, metric=("attention_mass",), seeds=(1, 2)
)
ORIGIN = Origin(model=FACTS, measurement=MEASURED, stability={"kappa": 0.9}, notes={"seed": 3})


def test_the_origin_survives_the_file_and_does_not_decide_whether_maps_are_equal(tmp_path):
    role_map = RoleMap(GOOD.layers, ORIGIN)
    role_map.save(tmp_path / "roles.json")
    assert RoleMap.load(tmp_path / "roles.json").origin == ORIGIN
    assert role_map == GOOD
    assert hash(role_map) == hash(GOOD)
    assert role_map.hash != GOOD.hash
    assert role_map.fit(2, 3, 21, 3).origin is ORIGIN


def test_the_file_is_canonical_and_names_its_hash():
    text = RoleMap(GOOD.layers, ORIGIN).to_json()
    entries = json.loads(text)
    assert list(entries) == [
        *("format", "version", "model", "measurement", "stability", "notes", "roles", "layers", "hash")
    ]
    assert entries["hash"] == RoleMap(GOOD.layers, ORIGIN).hash == RoleMap.from_json(text).hash
    assert RoleMap.from_json(json.dumps(entries, sort_keys=True)).to_json() == text  # layout does not count
    text.index('    ["local1", "anchor", "memory1"],\n    ["memory2", "full", "local2"]\n  ],')


def test_a_file_that_was_changed_is_refused_until_its_hash_is_deleted():
    text = GOOD.to_json().replace('"local1", "anchor"', '"anchor", "local1"')
    with pytest.raises(
        RoleMapError, match=r"here: content hash is sha256:.*, but /hash says .* delete the entry"
    ):
        RoleMap.from_json(text, "here")
    entries = json.loads(text)
    del entries["hash"]
    assert RoleMap.from_json(json.dumps(entries)).layers[0][:2] == GOOD.layers[0][1::-1]


def test_a_map_can_be_written_by_hand():
    entries = {
        "format": "headforcing.role-map",
        "version": 1,
        "roles": {"a": {"type": "Local"}},
        "layers": [["a"]],
    }
    role_map = RoleMap.from_json(json.dumps(entries))
    assert role_map == RoleMap(((Local(),),))
    assert role_map.origin == Origin()


@pytest.mark.parametrize("change", [{"layers": 3}, {"heads": 2}])
def test_an_origin_of_another_shape_is_refused(change):
    other = ORIGIN.model_copy(update={"model": FACTS.model_copy(update=change)})
    with pytest.raises(
        RoleMapError, match="the table has 2 layers x 3 heads, but the model it was measured on"
    ):
        RoleMap(GOOD.layers, other)
    text = json.dumps(
        {**json.loads(RoleMap(GOOD.layers, ORIGIN).to_json()), "model": other.model.model_dump()}
    )
    with pytest.raises(RoleMapError, match="here: "):
        RoleMap.from_json(text.replace('"hash"', '"hush"'), "here")


def test_an_origin_is_an_origin():
    with pytest.raises(RoleMapError, match="origin is a dict: expected an Origin"):
        RoleMap(GOOD.layers, {"seed": 3})


def test_a_map_that_could_not_be_read_again_is_not_written():
    with pytest.raises(RoleMapError, match="bytes, but no file of more than 1048576 is read"):
        RoleMap(GOOD.layers, Origin(notes={"much": "x" * MAX_BYTES})).to_json()


def test_the_size_is_checked_before_anything_is_parsed(tmp_path, monkeypatch):
    path = tmp_path / "large.json"
    path.write_bytes(GOOD.to_json().encode() + b" " * MAX_BYTES)
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(RoleMapError, match="larger than 1048576 bytes"):
        RoleMap.load(path)


@pytest.mark.parametrize("depth", [10, 300, 900, 960, 980, 990, 995, 5_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth_is_no_way_out(depth, opening):
    value = opening * depth + "1" + ("]" if opening == "[" else "}") * depth
    for entry in ("recent", "positions", "type", "update"):
        text = broken(roles={"a": {"type": "Memory", entry: "HERE"}}, layers=[["a"]]).replace('"HERE"', value)
        with pytest.raises(RoleMapError, match="here: "):
            RoleMap.from_json(text, "here")
    with pytest.raises(RoleMapError, match="here: "):
        RoleMap.from_json(broken(notes={"a": "HERE"}).replace('"HERE"', value), "here")
