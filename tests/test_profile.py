"""Profiling sees what the heads look at and disturbs nothing; labels follow the ranking rule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headforcing as hf
from headforcing.demo.model import DemoConfig, DemoModel
from headforcing.demo.pipeline import DemoPipeline
from headforcing.demo.world import sample_scene
from headforcing.errors import AlreadyAppliedError, HeadForcingError
from headforcing.profile import (
    HeadMass,
    attention_mass,
    bottom_ranked_roles,
    head_forcing_roles,
    shuffled,
    shuffled_within_layers,
)
from headforcing.roles import SlidingWindow

CONFIG = DemoConfig(dim=64, layers=3)
CHUNKS = 9


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> DemoModel:
    return DemoModel(CONFIG).randomize(seeded()).eval().requires_grad_(False)


def make(model: DemoModel, chunks: int = CHUNKS) -> torch.Tensor:
    prompts = sample_scene(2, seeded(1)).prompts(torch.arange(chunks))
    return DemoPipeline(model).generate(prompts, generator=seeded(2))


def expected_mass(model: DemoModel, window: int) -> torch.Tensor:
    """The definition, `[layers, 3, H]`: dense softmax over every call's keys, recorded per module."""
    role, seen = SlidingWindow(window, sink=1), {layer: [] for layer in range(CONFIG.layers)}
    tokens, calls = CONFIG.tokens_per_frame, []

    def attend(parts, num_heads):
        [part] = parts
        calls.append((part.q, part.k.clone()))  # the store goes on writing to its buffers
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (part.q, part.k, part.v))
        ).transpose(1, 2)

    with hf.apply_head_forcing(model, role, backend=attend):
        make(model)
    for number, (q, k) in enumerate(calls):
        if k.shape[1] == q.shape[1]:
            continue
        weights = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) / math.sqrt(q.shape[-1])
        weights = weights.softmax(-1).mean((0, 2))  # [H, M]
        regions = weights[:, :tokens], weights[:, tokens : -q.shape[1]], weights[:, -q.shape[1] :]
        seen[number % CONFIG.layers].append(torch.stack([region.sum(-1) for region in regions]))
    return torch.stack([torch.stack(rows).mean(0) for rows in seen.values()])


@pytest.mark.parametrize("window", [None, 12])
def test_the_mass_is_that_of_the_definition(model, window):
    mass = attention_mass(model, lambda: make(model), window=window)
    measured = torch.stack([mass.first, mass.middle, mass.own], 1)
    torch.testing.assert_close(measured, expected_mass(model, window or 21), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(measured.sum(1), torch.ones(3, 4, dtype=torch.float64))
    assert mass.calls == (CHUNKS - 1) * 5
    assert measured.std() > 0.01


def test_a_head_that_is_made_to_look_at_its_own_chunk_is_found(model):
    attention = model.blocks[1].self_attn
    head = slice(16, 32)  # of layer 1, head 1: equal keys everywhere, so the mass follows the lengths
    attention.k.weight[head] = 0
    attention.k.bias[head] = 0
    mass = attention_mass(model, lambda: make(model, 7))
    lengths = [3 * chunk for chunk in range(1, 7)]
    own = torch.tensor([3 / (past + 3) for past in lengths]).mean()
    first = torch.tensor([1 / (past + 3) for past in lengths]).mean()
    assert float(mass.own[1, 1]) == pytest.approx(float(own), abs=1e-6)
    assert float(mass.first[1, 1]) == pytest.approx(float(first), abs=1e-6)


def test_layers_are_told_by_module_not_by_call_order(model):
    straight = attention_mass(model, lambda: make(model))

    def with_stray_calls() -> None:
        pipeline = DemoPipeline(model)
        prompts = sample_scene(2, seeded(1)).prompts(torch.arange(CHUNKS))

        def disturb(index: int, clean: torch.Tensor) -> None:
            x = torch.zeros(2, 48, CONFIG.dim)
            grid = torch.tensor([[3, 4, 4]] * 2)
            fresh = {name: torch.zeros(2, 48, 4, 16) for name in "kv"}
            fresh |= {f"{name}_end_index": torch.zeros(1, dtype=torch.long) for name in ("global", "local")}
            model.blocks[2].self_attn(x, torch.full((2,), 48), grid, model.freqs, None, fresh, 0)

        pipeline.generate(prompts, generator=seeded(2), callback=disturb)

    disturbed = attention_mass(model, with_stray_calls)  # one layer is called alone, without history
    assert torch.equal(straight.first, disturbed.first)
    assert torch.equal(straight.own, disturbed.own)


def test_measuring_changes_no_bit_and_draws_no_random_numbers(model):
    with hf.apply_head_forcing(model, SlidingWindow(21, sink=1)):
        plain = make(model)
    own, state = make(model), torch.random.get_rng_state()
    videos = []
    attention_mass(model, lambda: videos.append(make(model)))
    assert torch.equal(videos[0], plain)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(make(model), own)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_model_is_left_as_it_was_when_the_run_fails(model):
    own = make(model)

    def fail() -> None:
        make(model, 2)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        attention_mass(model, fail)
    assert torch.equal(make(model), own)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_measured_is_refused(model):
    for run in (lambda: None, lambda: make(model, 1)):
        with pytest.raises(HeadForcingError, match="at least two chunks"):
            attention_mass(model, run)
    with hf.apply_head_forcing(model, SlidingWindow(21, sink=1)) as handle:
        with pytest.raises(AlreadyAppliedError):
            attention_mass(model, lambda: make(model))
        make(model)
        assert handle.status().active


def mass_of(first, own, heads: int) -> HeadMass:
    first, own = (torch.tensor(x, dtype=torch.float64).view(-1, heads) for x in (first, own))
    return HeadMass(first, 1 - first - own, own, 1)


def counts(labels):
    flat = [name for row in labels for name in row]
    return {name: flat.count(name) for name in ("anchor", "local", "memory")}


def test_the_rule_on_a_small_example():
    mass = mass_of(
        [0.1, 0.9, 0.1, 0.8, 0.1, 0.1, 0.1, 0.1], [0.5, 0.0, 0.6, 0.1, 0.6, 0.1, 0.2, 0.3], heads=4
    )
    assert head_forcing_roles(mass) == (
        ("memory", "anchor", "local", "anchor"),  # the own mass of 2 and 4 is equal: the lower one first
        ("local", "memory", "memory", "memory"),
    )
    assert bottom_ranked_roles(mass) == (
        ("anchor", "local", "anchor", "local"),
        ("memory", "memory", "memory", "memory"),
    )


@pytest.mark.parametrize(("layers", "heads", "expected"), [(6, 4, (6, 4, 14)), (30, 12, (90, 54, 216))])
def test_shares_are_rounded_up_over_all_heads(layers, heads, expected):
    values = torch.rand(2, layers * heads, generator=seeded(3))
    mass = mass_of(values[0].tolist(), values[1].tolist(), heads)
    for labels in (head_forcing_roles(mass), bottom_ranked_roles(mass)):
        assert tuple(counts(labels).values()) == expected


masses = st.integers(1, 6).flatmap(
    lambda heads: (
        st.lists(
            st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda pair: (pair[0] / 8, pair[1] / 8)),
            min_size=heads,
            max_size=4 * heads,
        )
        .map(lambda rows: rows[: len(rows) // heads * heads])
        .map(lambda rows: mass_of([row[0] for row in rows], [row[1] for row in rows], heads))
    )
)


@given(masses, st.floats(0, 1), st.floats(0, 1))
def test_labels_follow_the_ranking(mass, anchor_share, local_share):
    labels = [name for row in head_forcing_roles(mass, anchor_share, local_share) for name in row]
    first, own = mass.first.flatten().tolist(), mass.own.flatten().tolist()
    anchors = [head for head, name in enumerate(labels) if name == "anchor"]
    rest = [head for head, name in enumerate(labels) if name != "anchor"]
    assert len(labels) * anchor_share - 1e-6 <= len(anchors) < len(labels) * anchor_share + 1
    assert all((-first[a], a) < (-first[r], r) for a in anchors for r in rest)
    for head in rest:
        for other in rest:
            if labels[head] == "local" and labels[other] == "memory":
                assert (-own[head], head) < (-own[other], other)


@given(masses, st.integers(0, 100))
def test_controls_keep_the_counts_and_follow_their_generator(mass, seed):
    labels = head_forcing_roles(mass)
    within, anywhere = shuffled_within_layers(labels, seeded(seed)), shuffled(labels, seeded(seed))
    assert [sorted(row) for row in within] == [sorted(row) for row in labels]
    assert counts(anywhere) == counts(labels) == counts(bottom_ranked_roles(mass))
    assert [len(row) for row in anywhere] == [len(row) for row in labels]
    assert within == shuffled_within_layers(labels, seeded(seed))
    assert anywhere == shuffled(labels, seeded(seed))


def test_controls_do_move_labels():
    labels = (("anchor", "local", "memory", "memory"),) * 6
    assert shuffled_within_layers(labels, seeded()) != labels
    moved = shuffled(labels, seeded())
    assert any(sorted(row) != sorted(labels[0]) for row in moved)
