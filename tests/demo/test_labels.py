"""The labels of the demo model belong to its weights, and every preset whose heads differ has some."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import headforcing as hf
from benchmarks.demo_training.labelled import CLASSIFIERS, METRICS, label_heads, main
from headforcing.adapters.base import find_adapter
from headforcing.demo import DemoPipeline, demo_model, demo_preset, labels, parse_prompt
from headforcing.demo.measured import LabelFile, label_file
from headforcing.demo.profiled import profile_demo
from headforcing.errors import ForeignRolesWarning, OptionError, RoleMapError
from headforcing.roles.maps.fingerprint import fingerprint
from headforcing.roles.maps.presets import PRESETS
from tests.profiles import random_profile

LABELLED = [name for name, preset in PRESETS.items() if preset.labels_needed()]


def test_the_labels_belong_to_the_shipped_weights():
    model = demo_model()
    assert label_file().model.fingerprint == fingerprint(model, find_adapter(model))


@pytest.mark.parametrize("name", LABELLED)
def test_every_preset_whose_heads_differ_has_labels(name):
    found = labels(name)
    assert [len(row) for row in found] == [6] * 6
    assert {label for row in found for label in row} <= set(PRESETS[name].labels_needed())
    assert PRESETS[name].classifier in (None, CLASSIFIERS[name])
    with hf.apply_head_forcing(demo_model(), demo_preset(name), strict=True) as handle:
        assert handle.roles.origin.measurement.method == CLASSIFIERS[name]


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(LABELLED)))
def test_other_presets_are_the_same_for_all_heads(name):
    assert len(demo_preset(name).counts()) == 1
    with pytest.raises(OptionError, match="no labels for"):
        labels(name)


def test_the_demo_uses_the_labels():
    pytest.importorskip("imageio_ffmpeg", reason="requires the extra demo")
    from headforcing.demo.show import show

    config = demo_model().config
    for name in PRESETS:
        assert show.find_roles(show.Request(preset=name), config) == demo_preset(name)
    roles = demo_preset("dummy_forcing")
    diary = show._Diary(demo_model())
    assert {*roles.named()} == {"sink", "neighbour", "dummy"}
    with hf.apply_head_forcing(diary._model, roles):
        pipeline = DemoPipeline(diary._model)
        words, noise = parse_prompt("day summer balloon red car blue").expand(1, 2, -1), torch.Generator()
        pipeline.generate(words, generator=noise, callback=lambda *_: diary.note())
    assert sorted(held.name for held in diary.read(2, "preset"))[1:] == [
        "preset: anchor head",
        "preset: dummy head",
        "preset: neighbour head",
    ]


def test_an_unknown_preset():
    with pytest.raises(OptionError, match="expected one of full"):
        demo_preset("dense")


def test_other_weights_are_noticed():
    file = label_file()
    assert file.presets.keys() == CLASSIFIERS.keys()
    found = demo_preset("pyramid_forcing")
    foreign = found.origin.model.model_copy(update={"fingerprint": "sha256:" + "0" * 64})
    moved = dataclasses.replace(found, origin=found.origin.model_copy(update={"model": foreign}))
    with pytest.warns(ForeignRolesWarning, match="fingerprint"):
        hf.apply_head_forcing(demo_model(), moved)


def test_the_file_is_what_its_tool_writes():
    text = label_file().to_json()
    assert LabelFile.from_json(text) == label_file()
    found = label_heads(random_profile(0))
    assert LabelFile.from_json(found.to_json()) == found
    assert found.presets["forcing_kv"].measurement.method == "mass_ratio"


def without(entry):
    document = json.loads(label_file().to_json())
    del document[entry]
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "not a file of labels"), ("{", "not a file of labels"), (without("model"), "/model")],
)
def test_another_document_is_refused(text, message):
    with pytest.raises(RoleMapError, match=message):
        LabelFile.from_json(text)


def test_the_tool_writes_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.demo_training.labelled.profile_demo", lambda metrics: random_profile(1))
    monkeypatch.setattr("sys.argv", ["labelled", "--out", str(tmp_path / "mine.json")])
    main()
    assert LabelFile.from_json((tmp_path / "mine.json").read_bytes()) == label_heads(random_profile(1))


@pytest.mark.slow
def test_measured_again_the_labels_are_the_same():
    again = label_heads(profile_demo(metrics=METRICS))
    shipped = label_file()
    assert again.model == shipped.model
    for name, found in again.presets.items():
        assert found.labels == shipped.presets[name].labels
