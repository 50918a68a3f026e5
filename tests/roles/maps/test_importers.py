"""Importers take the labels of a file exactly, or refuse it and say where."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import headforcing as hf
from headforcing.errors import OptionError, RoleMapError, module_names
from headforcing.roles import Full, Local
from headforcing.roles.maps import file as role_file
from headforcing.roles.maps import importers
from headforcing.roles.maps.importers import forcing_kv, import_roles, pyramid_forcing
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.pyramid_forcing import Wave

MAX_BYTES = role_file.MAX_BYTES
CSV = "-1,1,2,1\n2,-1,-1,1\n1,1,1,-1\n"
HEADER = {
    "format": "forcingkv_offline_head_custom2",
    "profile": "tiny",
    "num_layers": 3,
    "num_heads": 4,
    "description": "mass",
}
RECORDS = [
    {"layer_idx": 0, "local_head": [1, 3], "temporal_head": [0, 2]},
    {"layer_idx": 1, "local_head": [], "temporal_head": [3, 2, 1, 0]},
    {"layer_idx": 2, "local_head": [0, 1, 2, 3], "temporal_head": []},
]
PROFILE: dict[str, Any] = {**HEADER, "layers": RECORDS}
STATIC, DYNAMIC = "static", "dynamic"
LABELS = [[DYNAMIC, STATIC, DYNAMIC, STATIC], [DYNAMIC] * 4, [STATIC] * 4]


def text_of(document: Any) -> bytes:
    return json.dumps(document).encode()


def plain_csv(content: bytes) -> list[list[str]] | None:
    """The same table read another way; `None` where it is none."""
    names = {b"-1": "wave", b"1": "anchor", b"2": "veil"}
    lines = content.replace(b"\r\n", b"\n").split(b"\n")
    lines = lines[:-1] if lines[-1] == b"" else lines
    if len({line.count(b",") for line in lines}) != 1:
        return None
    table = [[names.get(cell) for cell in line.split(b",")] for line in lines]
    return None if any(None in row for row in table) else table


def plain_json(content: bytes) -> list[list[str]] | None:
    """The same profile read another way, asking for every layer and head what it is."""
    try:
        document = json.loads(content.decode())
    except ValueError:
        return None
    layers = document.get("layers", document) if isinstance(document, dict) else document
    if isinstance(layers, dict):
        layers = [{"layer_idx": int(k), **v} for k, v in layers.items() if k.isdigit()]
    records = {record.get("layer_idx", place): record for place, record in enumerate(layers)}
    if sorted(records) != list(range(len(layers))):
        return None
    table = []
    for layer in range(len(layers)):
        lists = {"static": [], "dynamic": []}
        for name, ids in records[layer].items():
            for label, words in (("static", "static local spatial"), ("dynamic", "dynamic temporal")):
                if name.removesuffix("s").removesuffix("_head") in words.split():
                    lists[label] += ids
        every = lists["static"] + lists["dynamic"]
        if sorted(map(repr, every)) != sorted(map(repr, range(len(every)))):
            return None
        table.append([DYNAMIC if head in lists["dynamic"] else STATIC for head in range(len(every))])
    return table


# What is right ------------------------------------------------------------------------------------


def test_the_folder_is_the_list():
    assert module_names("headforcing.roles.maps.importers") == ("forcing_kv", "pyramid_forcing")
    with pytest.raises(OptionError, match="expected one of forcing_kv, pyramid_forcing"):
        import_roles("x", "pyramid")


def test_a_table_of_pyramid_forcing_becomes_a_map(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(CSV)
    role_map = import_roles(path, "pyramid_forcing")
    wave, anchor, veil = (
        PRESETS["pyramid_forcing"].roles(21, 3)[name] for name in ("wave", "anchor", "veil")
    )
    assert role_map.layers == (
        (wave, anchor, veil, anchor),
        (veil, wave, wave, anchor),
        (anchor,) * 3 + (wave,),
    )
    notes = role_map.origin.notes
    assert notes["file_sha256"] == hashlib.sha256(CSV.encode()).hexdigest()
    assert (notes["imported"], notes["file"]) == ("pyramid_forcing", "labels.csv")
    assert notes["wave_became"] == f"{wave}, the role of its preset"
    assert hf.RoleMap.from_json(role_map.to_json()) == role_map
    assert role_map.fit(3, 4, 21, 3).shape == (3, 4)


def test_a_profile_of_forcing_kv_becomes_a_map(tmp_path):
    path = tmp_path / "heads.json"
    path.write_bytes(text_of(PROFILE))
    role_map = import_roles(str(path), "forcing_kv")
    preset = PRESETS["forcing_kv"]
    roles = preset.roles(21, 3)
    assert role_map == hf.RoleMap.from_labels(LABELS, roles)
    assert preset.labelled(role_map.labels).layers == ((roles[STATIC],) * 4, *role_map.layers[1:])
    given = import_roles(path, "forcing_kv", {DYNAMIC: Local(3)})
    assert given == hf.RoleMap.from_labels(LABELS, {**roles, DYNAMIC: Local(3)})
    assert role_map.origin.notes["file_says_profile"] == "tiny"
    assert role_map.origin.notes["file_says_description"] == "mass"
    assert hf.RoleMap.from_json(role_map.to_json()).origin == role_map.origin
    assert role_map.fit(3, 4, 21, 3).shape == (3, 4)


def test_the_caller_says_what_labels_mean(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(CSV)
    role_map = import_roles(path, "pyramid_forcing", {"veil": Full()})
    assert role_map.layers[0][2] == Full()
    assert isinstance(role_map.layers[0][0], Wave)
    assert role_map.origin.notes["veil_became"] == str(Full())
    with pytest.raises(OptionError, match=r"roles names \['viel'\]: pyramid_forcing has the labels wave"):
        import_roles(path, "pyramid_forcing", {"viel": Local()})


@pytest.mark.parametrize("text", [CSV, CSV.rstrip(), CSV.replace("\n", "\r\n")])
def test_line_ends_do_not_matter(text):
    assert pyramid_forcing.read(text.encode(), "x").labels == plain_csv(CSV.encode())


def _without(record: dict, *names: str) -> dict:
    return {key: value for key, value in record.items() if key not in names}


def _renamed(static: str, dynamic: str) -> list[dict]:
    names = {"local_head": static, "temporal_head": dynamic}
    return [{names.get(key, key): value for key, value in record.items()} for record in RECORDS]


LAYOUTS = {
    "list": RECORDS,
    "reversed": RECORDS[::-1],
    "places": [_without(record, "layer_idx") for record in RECORDS],
    "header": PROFILE,
    "no counts": {"layers": RECORDS},
    "keys": {**HEADER, "layers": {str(n): _without(record, "layer_idx") for n, record in enumerate(RECORDS)}},
    "keys again": {**HEADER, "layers": {str(n): record for n, record in enumerate(RECORDS)}},
    "bare keys": {str(n): record for n, record in enumerate(RECORDS)},
    "bare keys and header": {**HEADER, **{str(n): record for n, record in enumerate(RECORDS)}},
    **{
        f"{static}, {dynamic}": _renamed(static, dynamic)
        for static in forcing_kv.NAMES["static"]
        for dynamic in forcing_kv.NAMES["dynamic"]
    },
}


@pytest.mark.parametrize("document", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_in_use_is_read(document):
    assert forcing_kv.read(text_of(document), "x").labels == LABELS == plain_json(text_of(document))


@given(st.lists(st.lists(st.sampled_from(["-1", "1", "2"]), min_size=3, max_size=3), min_size=1, max_size=5))
def test_any_table_is_taken_as_it_stands(table):
    content = "\n".join(",".join(row) for row in table).encode()
    assert pyramid_forcing.read(content, "x").labels == plain_csv(content)


@given(st.lists(st.permutations(range(5)), min_size=1, max_size=4), st.data())
def test_any_profile_is_taken_as_it_stands(layers, data):
    records, labels = [], []
    for heads in layers:
        cut = data.draw(st.integers(0, 5))
        records.append({"static_heads": list(heads[:cut]), "dynamic_heads": list(heads[cut:])})
        labels.append([STATIC if head in heads[:cut] else DYNAMIC for head in range(5)])
    assert forcing_kv.read(text_of(records), "x").labels == labels


# What is wrong ------------------------------------------------------------------------------------

BAD_CSV = {
    "": "layer 0 (line 1), head 0: nothing: expected -1 (Wave)",
    "\n": "layer 0 (line 1), head 0: nothing",
    "-1,1\n\n1,1\n": "layer 1 (line 2), head 0: nothing",
    "-1,1\n1,1\n\n": "layer 2 (line 3), head 0: nothing",
    "-1,1\n1\n": "layer 1 (line 2) has 1 heads, layer 0 has 2",
    "-1,1\n1,1,\n": "layer 1 (line 2), head 2: nothing",
    "-1,1\n1,1,1\n": "layer 1 (line 2) has 3 heads",
    "-1,1\n1,0\n": "layer 1 (line 2), head 1: 0: expected -1 (Wave), 1 (Anchor) or 2 (Veil)",
    "-1,3\n": "layer 0 (line 1), head 1: 3",
    "-1,01\n": "head 1: 01",
    "-1,+1\n": "head 1: '+1' is not a plain integer",
    "-1,1.0\n": "head 1: '1.0' is not a plain integer",
    "-1, 1\n": "head 1: ' 1' is not",
    '"-1",1\n': "head 0: '\"-1\"' is not",
    "-1;1\n": "head 0: '-1;1' is not",
    "head0,head1\n-1,1\n": "head 0: 'head0' is not",
    "-1,1\r1,1": "head 1: '1\\r1' is not",
    "-1,1\x00": "head 1: '1\\x00' is not",
    "9" * 50_000: "is not a plain integer",
    "\ufeff-1,1\n": "byte 0 is not ASCII",
    "-1,１\n": "byte 3 is not ASCII",
}


@pytest.mark.parametrize(("text", "message"), BAD_CSV.items(), ids=range(len(BAD_CSV)))
def test_a_bad_table_is_refused_and_says_where(text, message, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode())
    with pytest.raises(RoleMapError) as caught:
        import_roles(path, "pyramid_forcing")
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


def _record(number: int, **changes: Any) -> dict:
    records = copy.deepcopy(RECORDS)
    records[number].update(changes)
    return {**HEADER, "layers": [{k: v for k, v in record.items() if v is not None} for record in records]}


BAD_JSON: dict[str, tuple[Any, str]] = {
    "out of range": (_record(1, temporal_head=[0, 1, 2, 4]), "layer 1: dynamic head 4: expected 0 to 3"),
    "negative": (_record(1, temporal_head=[0, 1, 2, -1]), "layer 1: dynamic head -1"),
    "twice": (_record(0, local_head=[1, 1, 3]), "layer 0: head 1 is static and again static"),
    "in both": (_record(0, local_head=[1, 2, 3]), "layer 0: head 2 is static and again dynamic"),
    "in none": (_record(0, local_head=[1]), "layer 0: head 3 is in no list: expected every head of 4 once"),
    "text id": (_record(0, local_head=["1", 3]), "layer 0: static head '1': expected 0 to 3"),
    "float id": (_record(0, local_head=[1.0, 3]), "layer 0: static head 1.0"),
    "true id": (_record(0, local_head=[True, 3]), "layer 0: static head True"),
    "list id": (_record(0, local_head=[[1], 3]), "layer 0: static head an array"),
    "null list": ({"layers": [{"local_head": None, "temporal_head": [0]}]}, "layer 0: local_head is None"),
    "no static": (
        _record(0, local_head=None),
        "layer 0 has no lists of static heads: expected one, static_head",
    ),
    "no dynamic": (_record(2, temporal_head=None), "layer 2 has no lists of dynamic heads"),
    "two names": (
        _record(0, static_head=[1, 3]),
        "layer 0 has ['static_head', 'local_head'] lists of static",
    ),
    "unknown name": (_record(0, locl_head=[]), "layer 0 has unknown entries 'locl_head'"),
    "no heads": ([{"local_head": [], "temporal_head": []}], "layer 0: head 0 is in no list"),
    "missing layer": (
        {**HEADER, "layers": RECORDS[:2]},
        "layer 2 is missing, of 3: every layer must be listed",
    ),
    "gap": ([RECORDS[0], RECORDS[2]], "layer 1 is missing, of 3"),
    "layer twice": ([RECORDS[0], RECORDS[0]], "layer 0 is there twice"),
    "layer beyond": ({**PROFILE, "num_layers": 2}, "layer 2 is there, but num_layers is 2"),
    "fewer heads": ({**PROFILE, "num_heads": 3}, "layer 0: static head 3: expected 0 to 2"),
    "more heads": ({**PROFILE, "num_heads": 5}, "layer 0: head 4 is in no list: expected every head of 5"),
    "so many heads": ({**PROFILE, "num_heads": 1 << 60}, "layer 0: head 4 is in no list"),
    "so many layers": ({**PROFILE, "num_layers": 1 << 60}, "layer 3 is missing"),
    "ragged": ([RECORDS[0], {"local_head": [0], "temporal_head": [1]}], "layer 1: head 2 is in no list"),
    "num_layers text": ({**PROFILE, "num_layers": "3"}, "/num_layers is '3': expected a number"),
    "num_heads true": ({**PROFILE, "num_heads": True}, "/num_heads is True"),
    "num_heads 0": ({**PROFILE, "num_heads": 0}, "/num_heads is 0"),
    "profile": ({**PROFILE, "profile": 3}, "/profile is not a text"),
    "surrogate": ({**PROFILE, "profile": "\ud800"}, "/profile is not a text"),
    "unknown entry": ({**PROFILE, "num_layer": 3}, "unknown entries 'num_layer'"),
    "key is no number": ({**HEADER, "layers": {"a": RECORDS[0]}}, "'a' is not the number of a layer"),
    "key is 00": ({"00": RECORDS[0]}, "'00' is not the number of a layer"),
    "key is long": ({"9" * 5000: RECORDS[0]}, "is not the number of a layer"),
    "key is Arabic": ({"\u0661": RECORDS[0]}, "is not the number of a layer"),
    "key differs": ({"1": RECORDS[0]}, "layer 1: layer_idx is 0"),
    "index is text": (_record(0, layer_idx="0"), "layer 0: layer_idx is '0'"),
    "index is true": (_record(1, layer_idx=True), "layer 1: layer_idx is True"),
    "index is negative": (_record(0, layer_idx=-1), "layer 0: layer_idx is -1"),
    "record is a list": ([[0, 1]], "layer 0 is an array: expected an object"),
    "record is null": ({**HEADER, "layers": [None]}, "layer 0 is None"),
    "layers is null": ({**HEADER, "layers": None}, "/layers is empty"),
    "layers is a number": ({**HEADER, "layers": 3}, "/layers is 3"),
    "header only": (HEADER, "/layers is empty"),
    "empty list": ([], "/layers is empty"),
    "null": (None, "expected an object with layers"),
    "text": ("x", "expected an object with layers"),
}


@pytest.mark.parametrize(("document", "message"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_a_bad_profile_is_refused_and_says_where(document, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(text_of(document))
    with pytest.raises(RoleMapError) as caught:
        import_roles(path, "forcing_kv")
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xef\xbb\xbf" + text_of(PROFILE),
        text_of(PROFILE).decode().encode("utf-16"),
        text_of(PROFILE).replace(b'"num_heads": 4', b'"num_heads": 4, "num_heads": 4'),
        text_of(PROFILE).replace(b'"layer_idx": 0', b'"layer_idx": NaN'),
        text_of(PROFILE) + b"x",
        b"[" * 100_000,
        b'{"layers":' * 900 + b"1" + b"}" * 900,
        b'[{"local_head": ' + b"[" * 900 + b"]" * 900 + b"}]",
        b'[{"layer_idx": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}]",
    ],
    ids=range(11),
)
def test_what_is_not_strict_json_is_refused(content):
    with pytest.raises(RoleMapError, match="here: "):
        forcing_kv.read(content, "here")


@pytest.mark.parametrize("name", module_names("headforcing.roles.maps.importers"))
def test_the_size_is_checked_before_anything_is_parsed(name, tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.write_bytes(b"1" * (MAX_BYTES + 1))
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(RoleMapError, match="larger than 1048576 bytes"):
        import_roles(path, name)
    with pytest.raises(RoleMapError, match="cannot be read"):
        import_roles(tmp_path / "missing", name)


def test_a_file_name_that_is_no_text_is_no_obstacle(tmp_path):
    path = tmp_path / "a\udcff.csv"
    path.write_text(CSV)
    assert import_roles(path, "pyramid_forcing").origin.notes["file"] == "a\\udcff.csv"


# Mutations ----------------------------------------------------------------------------------------


def mutated(text: str, generator: random.Random) -> bytes:
    letters = list(text)
    for _ in range(generator.randint(1, 3)):
        where = generator.randrange(len(letters))
        action = generator.random()
        if action < 0.5:
            letters[where] = generator.choice("0123456789,-\n[]{}" if action < 0.3 else string.printable)
        elif action < 0.7:
            del letters[where : where + generator.randint(1, 12)]
        elif action < 0.85:
            first, last = sorted((where, generator.randrange(len(letters))))
            letters[first:first] = letters[first : min(last, first + 40)]
        else:
            letters.insert(where, generator.choice(["-1", "1", "\r\n", ",", '"', "{", "]", "true", "é"]))
        letters = letters or ["1"]
    return "".join(letters).encode()


def fuzzed(read: Any, texts: list[str], plain: Any, count: int, seed: int = 0) -> int:
    """How many mutated files were accepted; each must be what it says."""
    generator = random.Random(seed)
    accepted = 0
    for _ in range(count):
        content = mutated(generator.choice(texts), generator)
        try:
            labels = read(content, "x").labels
        except RoleMapError:
            continue
        accepted += 1
        assert labels == plain(content), content
    return accepted


def test_a_mutated_table_is_what_it_says_or_nothing():
    assert 200 < fuzzed(pyramid_forcing.read, [CSV], plain_csv, 20_000) < 15_000


def test_a_mutated_profile_is_what_it_says_or_nothing():
    texts = [json.dumps(document) for document in (PROFILE, RECORDS, LAYOUTS["keys"], LAYOUTS["bare keys"])]
    texts += [json.dumps(RECORDS[:1]), json.dumps({"0": _without(RECORDS[0], "layer_idx")})]
    assert 200 < fuzzed(forcing_kv.read, texts, plain_json, 20_000) < 15_000


def test_a_reader_that_drops_what_it_does_not_understand_is_found():
    def careless(content: bytes, _: str) -> importers.Imported:
        try:
            document = json.loads(content.decode())
            records = document["layers"] if isinstance(document, dict) else document
            table = [[DYNAMIC] * 4 for _ in range(3)]
            for record in records:
                for head in record["local_head"]:
                    if head in range(4):
                        table[record["layer_idx"]][head] = STATIC
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RoleMapError("x") from error
        return importers.Imported(table)

    with pytest.raises(AssertionError):
        fuzzed(careless, [json.dumps(PROFILE)], plain_json, 4_000)
