"""Ablation restricts exactly one head, measures what the output loses, and leaves no trace."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch

import headforcing as hf
from benchmarks.demo_training.ablated import HeldOut, ablate_demo
from headforcing.demo.model.model import DemoConfig, DemoModel
from headforcing.demo.model.pipeline import DemoPipeline
from headforcing.demo.world.scene import sample_scene
from headforcing.errors import AlreadyAppliedError, OptionError, ProfileError
from headforcing.measure.ablation import ablate_heads, with_role
from headforcing.measure.classifiers import find_classifier
from headforcing.measure.profile import HeadProfile
from headforcing.measure.stability import stability
from headforcing.roles import Anchor, Local, Memory, SlidingWindow
from headforcing.roles.maps.role_map import RoleMap

CONFIG = DemoConfig(dim=64, heads=4, layers=2)
OWN = SlidingWindow(21, positions="absolute")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> DemoModel:
    return DemoModel(CONFIG).randomize(seeded()).eval().requires_grad_(False)


def make(model: DemoModel) -> torch.Tensor:
    prompts = sample_scene(3, seeded(1)).prompts(torch.arange(3))
    return DemoPipeline(model).generate(prompts, generator=seeded(2))


def score_of(model: DemoModel):
    """Error per video against what the unrestricted model makes, plus one: never zero."""
    truth = make(model)

    def score() -> torch.Tensor:
        return 1 + (make(model) - truth).square().flatten(1).mean(1)

    return score


@pytest.mark.parametrize(
    "heads",
    [((0, 0), (0, 3), (1, 2)), pytest.param([*product(range(2), range(4))], marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_the_increase_is_that_of_the_definition(model, heads):
    own, score = make(model), score_of(model)
    roles = (Local(0), SlidingWindow(6, positions="compact"), OWN)
    profile = ablate_heads(model, score, roles)
    found = profile["ablation.increase"]
    assert found.shape == (3, 2, 4, 3)
    for (layer, head), (number, role) in product(heads, enumerate(roles)):
        table = [[role if (at, h) == (layer, head) else OWN for h in range(4)] for at in range(2)]
        with hf.apply_head_forcing(model, table):
            expected = (score() - 1).double()
        torch.testing.assert_close(found[:, layer, head, number], expected, atol=1e-6, rtol=1e-4)
    assert float(found[..., 2].abs().max()) == 0.0  # the model's own window: not restricted at all
    assert float(found[..., 0].amin()) > 0
    assert torch.equal(make(model), own)


def test_the_rows_are_videos_and_the_profile_has_a_file(model, tmp_path):
    told = []
    profile = ablate_heads(
        model, score_of(model), [Local(0)], base_model="b", progress=lambda *what: told.append(what)
    )
    assert profile.prompt.tolist() == [0, 1, 2]
    assert len(profile.noisy) == len(profile)
    assert told == [(n, 8, "heads") for n in range(1, 9)]
    profile.save(tmp_path / "a.safetensors")
    assert HeadProfile.load(tmp_path / "a.safetensors").hash == profile.hash


def test_what_cannot_be_ablated_is_refused(model):
    score = score_of(model)
    with pytest.raises(OptionError, match="at least one role"):
        ablate_heads(model, score, [])
    with pytest.raises(ProfileError, match=r"\[3, 1\]: expected one error per video"):
        ablate_heads(model, lambda: score()[:, None], [Local(0)])
    calls = iter([3] + [2] * 99)
    with pytest.raises(ProfileError, match=r"\[2\]: expected one error per video, \[3\]"):
        ablate_heads(model, lambda: torch.ones(next(calls)), [Local(0)])
    with pytest.raises(ProfileError, match="above zero"):
        ablate_heads(model, lambda: torch.zeros(3), [Local(0)])
    with hf.apply_head_forcing(model, OWN), pytest.raises(AlreadyAppliedError):
        ablate_heads(model, score, [Local(0)])


def test_with_role_changes_one_head():
    role_map = with_role(RoleMap.uniform(OWN, 2, 3), 1, 2, Local(0))
    assert role_map.layers == ((OWN, OWN, OWN), (OWN, OWN, Local(0)))


def table_of(model: DemoModel, increase) -> HeadProfile:
    """A profile whose increases are given, `[layers, heads, R]`, the same for every video."""
    profile = ablate_heads(model, lambda: torch.ones(3), (Local(3), Anchor(3, 3)))
    values = torch.tensor(increase).expand(3, 2, 4, 2).contiguous()
    return dataclasses.replace(profile, values={"ablation.increase": values})


def test_heads_get_the_cheapest_role_that_hurts_little_or_a_memory(model):
    increase = [
        [[0.0, 0.0], [0.5, 0.01], [0.5, 0.3], [-0.2, 0.9]],
        [[0.02, 0.02], [0.021, 0.0], [0.03, 0.03], [0.0, 0.0]],
    ]
    profile = table_of(model, increase)
    found = find_classifier("ablation")(profile, error=0.02)
    assert found.labels == (
        ("local3", "anchor3+3", "memory3+12+3", "local3"),
        ("local3", "anchor3+3", "memory3+12+3", "local3"),
    )
    assert dict(found.roles) == {
        "local3": Local(3),
        "anchor3+3": Anchor(3, 3),
        "memory3+12+3": Memory(3, 12, 3),
    }
    assert found.margin.shape == (2, 4)
    assert float(found.margin[1, 0]) == pytest.approx(0, abs=1e-6)
    assert find_classifier("ablation")(profile).settings == {"error": 0.05}
    assert find_classifier("ablation")(profile, error=1.0).counts()["local3"] == 8
    report = stability(profile, find_classifier("ablation"), draws=20)
    assert report.summary()
    with pytest.raises(OptionError, match="expected a relative increase"):
        find_classifier("ablation")(profile, error=-1.0)


def test_the_order_in_which_roles_were_tried_does_not_matter(model):
    profile = table_of(model, [[[0.5, 0.01]] * 4, [[0.0, 0.0]] * 4])
    facts = profile.facts.model_copy(
        update={"metrics": {"ablation": {"roles": profile.facts.metrics["ablation"]["roles"][::-1]}}}
    )
    values = {"ablation.increase": profile.values["ablation.increase"].flip(-1)}
    other = dataclasses.replace(profile, facts=facts, values=values)
    one, two = find_classifier("ablation")(profile), find_classifier("ablation")(other)
    assert one.labels == two.labels == (("anchor3+3",) * 4, ("local3",) * 4)


def test_the_demo_videos_are_the_same_on_every_call():
    model = DemoModel(DemoConfig(dim=64, heads=4, layers=1)).randomize(seeded()).eval().requires_grad_(False)
    held_out = HeldOut(model, 6, 5)
    first, again = held_out.errors(), held_out.errors()
    for name in ("seen", "returning"):
        assert torch.equal(first[name].nan_to_num(-1), again[name].nan_to_num(-1))
    assert bool((first["seen"][~first["seen"].isnan()] > 0).all())
    profile = ablate_demo(model, videos=6, seed=5)
    assert torch.equal(profile["ablation.increase"][:, 0, 0, 0].isnan(), first["returning"].isnan())
