"""Roles belong to weights: a map that says on which it was measured is compared with the model."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.demo import demo_model, demo_roles
from headforcing.errors import ForeignRolesWarning, RoleMapMismatchError
from headforcing.roles import Local
from headforcing.roles.maps.fingerprint import fingerprint
from headforcing.roles.maps.origin import ModelFacts, Origin
from headforcing.testing import snapshot
from tests.hosts.rig import Rig

LABELS = [["local", "anchor", "memory", "local"]] * 2


@pytest.fixture
def rig() -> Rig:
    return Rig(window=6)


def measured_on(rig: Rig, **changes) -> hf.RoleMap:
    adapter = find_adapter(rig.model)
    facts = ModelFacts(
        layers=2,
        heads=4,
        head_dim=16,
        window=6,
        chunk=3,
        model_class="DemoModel",
        fingerprint=fingerprint(rig.model, adapter),
    )
    return hf.RoleMap.from_labels(LABELS, None, Origin(model=facts.model_copy(update=changes)))


def changed(rig: Rig) -> Rig:
    rig.model.blocks[1].self_attn.k.weight.data[0, 0] += 1
    return rig


def applied(rig: Rig, roles, **options) -> list[str]:
    """The warnings of an apply, which is taken out again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hf.apply_head_forcing(rig.model, roles, **options).remove()
    assert all(warning.category is ForeignRolesWarning for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("strict", [False, True])
def test_the_model_it_was_measured_on_is_not_foreign(rig, strict):
    assert applied(rig, measured_on(rig), strict=strict) == []
    again = Rig(window=6, dtype=torch.bfloat16)
    assert applied(again, measured_on(rig), strict=strict) == []


def test_it_is_checked_again_on_an_applied_model(rig):
    roles = measured_on(rig)
    handle = hf.apply_head_forcing(rig.model, roles, strict=True)
    assert hf.apply_head_forcing(rig.model, roles, strict=True) is handle
    changed(rig)
    with pytest.raises(RoleMapMismatchError, match="fingerprint"):
        hf.apply_head_forcing(rig.model, roles, strict=True)
    handle.remove()


def test_other_weights_are_one_warning_that_says_what_to_do(rig, tmp_path):
    roles = measured_on(rig, base_model="org/name")
    roles.save(tmp_path / "roles.json")
    own = roles.origin.model.fingerprint.removeprefix("sha256:")[:12]
    other = fingerprint(changed(rig).model, find_adapter(rig.model)).removeprefix("sha256:")[:12]
    for given in (roles, tmp_path / "roles.json", str(tmp_path / "roles.json")):
        (message,) = applied(rig, given)
        assert (
            f"measured on org/name (DemoModel): its attention weights have the fingerprint {own}" in message
        )
        assert message.endswith(
            f"those of this DemoModel {other}. Profile this model again, or know that its heads may differ"
        )


def test_strict_refuses_other_weights_and_leaves_the_model_alone(rig):
    roles = measured_on(rig)
    before = snapshot(changed(rig).model)
    with pytest.raises(RoleMapMismatchError, match=r"DemoModel: its attention weights .* Profile this model"):
        hf.apply_head_forcing(rig.model, roles, strict=True)
    assert before.diff(snapshot(rig.model)) == []


def test_a_warning_that_is_an_error_leaves_the_model_alone(rig):
    roles = measured_on(rig)
    before = snapshot(changed(rig).model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ForeignRolesWarning):
            hf.apply_head_forcing(rig.model, roles)
    assert before.diff(snapshot(rig.model)) == []


def test_another_window_is_part_of_the_warning(rig):
    roles = measured_on(rig, window=21)
    (message,) = applied(rig, roles)
    assert "its window was 21 frames, here it is 6" in message
    assert "fingerprint" not in message
    (message,) = applied(changed(rig), roles)
    assert "its window was 21 frames, here it is 6; its attention weights" in message
    assert len(applied(rig, measured_on(rig), window=7)) == 1
    assert len(applied(rig, measured_on(rig, fingerprint=None), window=7)) == 1
    with pytest.raises(RoleMapMismatchError, match="its window was 21"):
        hf.apply_head_forcing(rig.model, roles, strict=True)


@pytest.mark.parametrize("strict", [False, True])
def test_heads_of_another_size_are_refused(rig, strict):
    with pytest.raises(RoleMapMismatchError, match="128 channels per head, the model has 16"):
        hf.apply_head_forcing(rig.model, measured_on(rig, head_dim=128), strict=strict)
    with pytest.raises(RoleMapMismatchError, match="no origin" if strict else "128 channels"):
        hf.apply_head_forcing(rig.model, measured_on(rig, head_dim=128, fingerprint=None), strict=strict)


@pytest.mark.parametrize("known", [False, True])
def test_a_map_without_a_fingerprint_is_silent_unless_strict(rig, known, monkeypatch):
    roles = measured_on(rig, fingerprint=None) if known else hf.RoleMap.from_labels(LABELS)
    monkeypatch.setattr("headforcing.apply.fingerprint", lambda *_: pytest.fail("computed"))
    assert applied(rig, roles) == []
    with pytest.raises(RoleMapMismatchError, match=r"no origin\.model\.fingerprint"):
        hf.apply_head_forcing(rig.model, roles, strict=True)


def test_what_was_never_measured_is_never_foreign(rig):
    for roles in (Local(), [[Local()] * 4] * 2, "streaming_llm", "full"):
        assert applied(rig, roles, strict=True) == []


def test_weights_that_cannot_be_read_are_said(rig):
    roles = measured_on(rig)
    weight = rig.model.blocks[0].self_attn.q.weight
    rig.model.blocks[0].self_attn.q.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
    (message,) = applied(rig, roles)
    assert "cannot be checked, some of them are meta tensors" in message
    with pytest.raises(RoleMapMismatchError, match="meta tensors"):
        hf.apply_head_forcing(rig.model, roles, strict=True)


def test_the_origin_stays_with_the_roles_in_force(rig):
    roles = measured_on(rig)
    with hf.apply_head_forcing(rig.model, roles) as handle:
        assert handle.roles.origin == roles.origin


def test_the_shipped_map_belongs_to_the_shipped_weights():
    model = demo_model()
    hf.apply_head_forcing(model, demo_roles(), strict=True).remove()
    hf.apply_head_forcing(nn.Sequential(copy.deepcopy(model)), demo_roles(), strict=True)
