"""Presets keep the frames of their sources, and say which labels they need."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import headforcing as hf
from headforcing.errors import RoleError, RoleMapError, WindowError, module_names
from headforcing.measure.classifiers import find_classifier
from headforcing.roles.maps.presets import PRESETS, dummy_forcing, head_forcing, pyramid_forcing
from headforcing.types import FrameTable
from tests.hosts.rig import Rig
from tests.profiles import random_profile

CHUNK = 3


def seen(role, start, window=21):
    """Frames and positions of the chunk that begins at `start`, current chunk last."""
    known = ()
    for begin in range(0, start + CHUNK, CHUNK):
        table = FrameTable(
            known, min(CHUNK, begin), CHUNK, keys=lambda rows: torch.ones(1, len(rows), 1, 1, 1)
        )
        frames = tuple(known[row] for row in role.retain(table))
        own = tuple(range(begin, begin + CHUNK))
        known = (*frames, *own)
    return known, role.positions_of(known, CHUNK, window)


def the_role(name):
    found = PRESETS[name].uniform(2, 4, 21, CHUNK).fit(2, 4, 21, CHUNK)
    (role,) = found.counts()
    return role


def test_infinity_rope_sees_six_frames_placed_by_their_rank():
    role = the_role("infinity_rope")
    assert seen(role, 60) == ((0, 58, 59, 60, 61, 62), (0, 1, 2, 3, 4, 5))
    assert seen(role, 3) == ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5))
    assert seen(role, 0)[0] == (0, 1, 2)


def test_the_other_presets():
    assert seen(the_role("full"), 60)[0] == tuple(range(63))
    assert seen(the_role("sliding_window"), 60)[0] == tuple(range(42, 63))
    assert seen(the_role("streaming_llm"), 60)[0] == (0, 1, 2, *range(45, 63))


def test_a_preset_that_does_not_fit_says_so():
    with pytest.raises(WindowError, match="at least 7"):
        PRESETS["infinity_rope"].uniform(2, 4, 21, 6).fit(2, 4, 21, 6)
    with pytest.raises(WindowError, match="trained on 5 frames"):
        PRESETS["infinity_rope"].uniform(2, 4, 5, 3).fit(2, 4, 5, 3)


def test_the_frames_of_dummy_forcing():
    """Our own computation from the policy of the project, at the chunk that begins at frame 60."""
    roles = dummy_forcing([["sink", "neighbour", "dummy"]]).fit(1, 3, 21, CHUNK)
    expected = {"sink": (0, 60, 61, 62), "neighbour": tuple(range(57, 63)), "dummy": (59, 60, 61, 62)}
    for label, role in roles.named().items():
        assert seen(role, 60) == (expected[label], expected[label])
    far = dummy_forcing([["neighbour"]], context=2).fit(1, 1, 21, CHUNK)
    assert seen(far.layers[0][0], 60)[0] == tuple(range(54, 63))


def test_labels_that_dummy_forcing_does_not_know():
    with pytest.raises(RoleMapError, match="sink, neighbour, dummy"):
        dummy_forcing([["sink", "local"]])
    with pytest.raises(RoleError, match="recent"):
        dummy_forcing([["sink"]], context=-1)


UNIFORM = {"full", "sliding_window", "streaming_llm", "infinity_rope"}
LABELLED = {name: preset for name, preset in PRESETS.items() if preset.labels_needed()}


def check_registered(name, preset):
    """What every entry of the registry promises."""
    assert preset.name == name
    assert preset.source
    labels = preset.labels_needed()
    assert set(preset.published) <= set(labels)
    assert bool(labels) == bool(preset.counted)
    for role in preset.roles(21, CHUNK).values():
        role.fit(21, CHUNK)
    if preset.classifier is not None:
        found = find_classifier(preset.classifier)(random_profile(0))
        assert set(found.roles) == set(labels)
    if preset.importer is not None:
        assert preset.importer in module_names("headforcing.roles.maps.importers")
    assert preset.first_layer is None or preset.first_layer in labels


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete(name):
    check_registered(name, PRESETS[name])


def test_the_check_of_the_registry_finds_planted_bugs():
    good = PRESETS["pyramid_forcing"]
    for change in (
        {"name": "other"},
        {"source": ""},
        {"published": {"wavy": 360}},
        {"counted": ""},
        {"classifier": "head_forcing"},
        {"importer": "nowhere"},
        {"first_layer": "local"},
    ):
        with pytest.raises(AssertionError):
            check_registered("pyramid_forcing", dataclasses.replace(good, **change))


def test_published_numbers_of_heads():
    assert {name for name in PRESETS if name not in LABELLED} >= UNIFORM
    for name in ("head_forcing", "pyramid_forcing"):
        assert sum(LABELLED[name].published.values()) == 360
        assert sum(LABELLED[name].shares().values()) == pytest.approx(1)
    assert PRESETS["full"].shares() == {"all": 1}
    assert LABELLED["dummy_forcing"].published == {"dummy": 180}
    assert LABELLED["dummy_forcing"].shares() is None
    assert "not published" in LABELLED["dummy_forcing"].counted


def test_the_paper_counts_of_head_forcing_are_what_its_classifier_gives():
    found = find_classifier("head_forcing")(random_profile(0, layers=30, heads=12))
    assert found.counts() == LABELLED["head_forcing"].published


@pytest.mark.parametrize("name", LABELLED)
def test_a_preset_whose_heads_differ_asks_for_labels(name):
    model = Rig(window=6).model
    with pytest.raises(RoleMapError, match=f"{name} has other memories .*labelled") as caught:
        hf.apply_head_forcing(model, name)
    preset = LABELLED[name]
    for label in preset.labels_needed():
        assert label in str(caught.value)
    if preset.classifier is not None:
        assert f"roles classify --method {preset.classifier}" in str(caught.value)
    if preset.importer is not None:
        assert f"roles import FILE --format {preset.importer}" in str(caught.value)


@pytest.mark.parametrize("name", LABELLED)
def test_labels_give_the_roles_of_the_preset(name):
    preset = LABELLED[name]
    names = preset.labels_needed()
    found = preset.labelled([names, names[::-1]])
    assert found.labels[1] == names[::-1]
    assert found.layers[1] == tuple(preset.roles(21, CHUNK)[label] for label in names[::-1])
    assert preset.source in found.origin.notes["roles"]
    with pytest.raises(RoleMapError, match="unknown role name 'nobody'"):
        preset.labelled([["nobody"]])
    with pytest.raises(RoleMapError, match="expected the same number"):
        preset.labelled([names, names[:1]])


def test_the_functions_are_the_registry():
    for function in (head_forcing, pyramid_forcing, dummy_forcing):
        preset = PRESETS[function.__name__]
        labels = [preset.labels_needed()] * 2
        assert function(labels) == preset.labelled(labels)


def test_a_first_layer_that_is_not_told_apart():
    preset = dataclasses.replace(PRESETS["pyramid_forcing"], first_layer="anchor")
    found = preset.labelled([["wave", "veil"]] * 2)
    assert found.labels == (("anchor", "anchor"), ("wave", "veil"))
    with pytest.raises(RoleMapError, match="layer 0, head 1: unknown role name"):
        preset.labelled([["wave", "nobody"]] * 2)


@pytest.mark.parametrize("name", sorted(UNIFORM))
def test_a_preset_for_all_heads_takes_no_labels(name):
    with pytest.raises(RoleMapError, match="takes no labels"):
        PRESETS[name].labelled([["all"]])
