"""The fingerprint names the attention weights: it sees every change of them, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.roles import Local
from headforcing.roles.maps import fingerprint as module
from headforcing.roles.maps.fingerprint import fingerprint
from tests.hosts.rig import Rig

RIG = Rig(window=6)
PLAIN = fingerprint(RIG.model, find_adapter(RIG.model))
NAMES = [name for name, _ in RIG.model.blocks[0].self_attn.named_parameters()]


def of(model: nn.Module) -> str | None:
    return fingerprint(model, find_adapter(model))


def attention(model: nn.Module, layer: int) -> nn.Module:
    return model.blocks[layer].self_attn


@pytest.fixture(scope="module")
def twin() -> nn.Module:
    return copy.deepcopy(RIG.model)


# What it sees -------------------------------------------------------------------------------------


@given(st.integers(0, 1), st.sampled_from(NAMES), st.integers(0, 1 << 30), st.integers(0, 15))
def test_every_element_of_every_parameter_counts(twin, layer, name, place, bit):
    tensor = attention(twin, layer).get_parameter(name).data.view(-1)
    place %= len(tensor)
    before = tensor[place].clone()
    bits = (
        tensor[place].bfloat16().view(torch.int16) ^ torch.tensor(-(2**15) if bit == 15 else 1 << bit).short()
    )
    tensor[place] = bits.view(torch.bfloat16).float()
    changed = of(twin)
    tensor[place] = before
    assert changed != PLAIN
    assert of(twin) == PLAIN


@given(st.integers(0, 1), st.sampled_from(NAMES), st.integers(0, 1 << 30), st.integers(0, 1 << 30))
def test_two_elements_that_change_places_count(twin, layer, name, first, second):
    tensor = attention(twin, layer).get_parameter(name).data.view(-1)
    first, second = first % len(tensor), second % len(tensor)
    before = tensor.clone()
    tensor[[first, second]] = tensor[[second, first]]
    same = torch.equal(tensor.bfloat16(), before.bfloat16())
    changed = of(twin)
    tensor.copy_(before)
    assert (changed == PLAIN) == same


@pytest.mark.parametrize("distance", [1, 3, 4, 65520, 65521, 65522, 1 << 16, 1 << 22, (1 << 22) + 1])
def test_places_far_apart_are_different_places(distance):
    tensor = torch.zeros((1 << 22) + 8)
    tensor[2] = 1.0
    moved = torch.zeros_like(tensor)
    moved[2 + distance] = 1.0
    assert module._mixed(tensor) != module._mixed(moved)


def test_a_sum_that_ignores_places_would_be_noticed(monkeypatch):
    monkeypatch.setattr(module, "_STEP", 0)
    with pytest.raises(AssertionError):
        test_places_far_apart_are_different_places(4)


def test_heads_that_change_places_and_layers_that_do_count(twin):
    model = copy.deepcopy(twin)
    weight = attention(model, 0).q.weight.data
    weight.copy_(weight.unflatten(0, (RIG.model.config.heads, -1)).flip(0).flatten(0, 1))
    assert of(model) != PLAIN
    model = copy.deepcopy(twin)
    model.blocks[0].self_attn, model.blocks[1].self_attn = (
        model.blocks[1].self_attn,
        model.blocks[0].self_attn,
    )
    assert of(model) != PLAIN


def test_names_and_shapes_count():
    seen = set()
    for shape in [(4, 4), (2, 8), (16,)]:
        part = nn.Module()
        part.w = nn.Parameter(torch.zeros(shape))
        seen.add(fingerprint(part, _Alone()))
    part.v = part.w
    del part.w
    seen.add(fingerprint(part, _Alone()))
    assert len(seen) == 4


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9])
def test_pieces_leave_nothing_out(length, monkeypatch):
    tensor = torch.randn(length)
    whole = module._mixed(tensor)
    monkeypatch.setattr(module, "_PIECE", 4)
    assert module._mixed(tensor) == whole
    for place in range(length):
        other = tensor.clone()
        other[place] *= -1
        assert module._mixed(other) != whole


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex64, torch.float64])
def test_tensors_of_every_kind_can_be_read(dtype):
    tensor = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    assert module._mixed(tensor) != module._mixed(tensor.flip(0).roll(1))


# What it does not ---------------------------------------------------------------------------------


def test_the_bfloat16_copy_of_a_checkpoint_is_the_same_checkpoint(twin):
    assert of(copy.deepcopy(twin).bfloat16()) == PLAIN


def test_rounding_below_bfloat16_does_not_count(twin):
    model = copy.deepcopy(twin)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert of(model) == PLAIN


def test_head_forcing_does_not_count(twin):
    model = copy.deepcopy(twin)
    handle = hf.apply_head_forcing(model, Local())
    assert of(model) == PLAIN
    handle.remove()
    assert of(model) == PLAIN


def test_wrappers_and_the_rest_of_the_model_do_not_count(twin):
    model = copy.deepcopy(twin)
    model.head.weight.data.add_(1)
    assert of(nn.Sequential(nn.Sequential(model))) == PLAIN
    assert of(torch.compile(model)) == PLAIN
    attention(model, 0).q = torch.compile(attention(model, 0).q)
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert of(model) == PLAIN


def test_a_cache_that_the_host_registers_does_not_count(twin):
    model = copy.deepcopy(twin)
    attention(model, 0).register_buffer("cache", torch.zeros(4), persistent=False)
    assert of(model) == PLAIN
    attention(model, 0).register_buffer("scale", torch.zeros(4))
    assert of(model) != PLAIN


def test_memory_layout_does_not_count(twin):
    model = copy.deepcopy(twin)
    weight = attention(model, 1).k.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert of(model) == PLAIN


def test_weights_that_are_elsewhere_have_no_fingerprint(twin):
    model = copy.deepcopy(twin)
    assert of(model.to("meta")) is None
    model = copy.deepcopy(twin)
    attention(model, 1).q.weight = nn.Parameter(torch.empty_like(attention(model, 1).q.weight, device="meta"))
    assert of(model) is None


def test_it_is_the_same_tomorrow(twin):
    model = copy.deepcopy(twin)
    for parameter in model.parameters():
        count = parameter.numel()
        parameter.data.copy_((torch.arange(count, dtype=torch.float64) % 127 - 63).div(64).view_as(parameter))
    assert of(model) == "sha256:406793046823a76760586ab5deab39c1e3cf6747951ee51e9da4aa7569669435"


class _Alone:
    """An adapter for a module that is its own attention."""

    def attentions(self, model):
        yield "", model


def test_parts_without_weights_are_nothing_to_read() -> None:
    rig = Rig()
    expected = fingerprint(rig.model, find_adapter(rig.model))
    for block in rig.model.blocks:
        block.self_attn.norm = nn.Identity()
    assert fingerprint(rig.model, find_adapter(rig.model)) == expected
    assert module.unreadable(rig.model, find_adapter(rig.model)) is None
