"""Controls keep what they promise to keep and move the rest; maps know where they come from."""

from __future__ import annotations

import dataclasses
import itertools
from importlib.metadata import version

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headforcing.errors import OptionError, RoleMapError, RoleMapMismatchError, WindowError
from headforcing.measure.classifiers import Classification, head_forcing, output_regret, table
from headforcing.measure.compare import compare_labels
from headforcing.measure.labels import all_one, inverted, measured_map, random, shuffled_within_layer
from headforcing.roles import Anchor, Full, Local, Memory
from headforcing.roles.maps.role_map import RoleMap
from tests.profiles import random_profile

ROLES = {"anchor": Anchor(), "local": Local(), "memory": Memory()}


def flat(found) -> list[str]:
    return [label for row in found.labels for label in row]


def found_of(labels: list[str], heads: int, margin: list[float] | None = None, roles=None) -> Classification:
    values = torch.tensor(margin or [0.5] * len(labels), dtype=torch.float64).view(-1, heads)
    return Classification(
        "head_forcing", table(labels, heads), values, roles or ROLES, {"anchor": 0.25}, ("m",)
    )


tables = st.tuples(st.integers(1, 4), st.integers(1, 6)).flatmap(
    lambda shape: st.lists(
        st.sampled_from(list(ROLES)), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
    ).map(lambda labels: found_of(labels, shape[1]))
)


def check_same_counts(control, found):
    got = control(found)
    assert got.counts() == found.counts()
    assert [len(row) for row in got.labels] == [len(row) for row in found.labels]
    assert bool(got.margin.isnan().all())
    assert got.margin.shape == found.margin.shape
    assert got.method.endswith(" of head_forcing")
    assert got.roles == found.roles


def check_same_counts_per_layer(control, found):
    check_same_counts(control, found)
    assert [sorted(row) for row in control(found).labels] == [sorted(row) for row in found.labels]


@given(tables, st.integers(0, 100))
def test_what_a_control_keeps(found, seed):
    check_same_counts(lambda f: random(f, seed), found)
    check_same_counts_per_layer(lambda f: shuffled_within_layer(f, seed), found)
    check_same_counts(inverted, found)
    assert random(found, seed) == random(found, seed)
    assert shuffled_within_layer(found, seed) == shuffled_within_layer(found, seed)
    for label in ROLES:
        assert set(flat(all_one(found, label))) == {label}


def test_the_checks_find_planted_bugs():
    found = found_of(["anchor", "local", "memory", "memory"] * 6, 4)

    def drawn_anew(found):
        picks = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1)).tolist()
        return dataclasses.replace(random(found, 0), labels=table([list(ROLES)[i] for i in picks], 4))

    with pytest.raises(AssertionError):
        check_same_counts(drawn_anew, found)
    with pytest.raises(AssertionError):
        check_same_counts_per_layer(lambda f: random(f, 0), found)
    with pytest.raises(AssertionError):
        check_same_counts(lambda f: f, found)


def test_controls_do_move_labels():
    found = found_of(["anchor", "local", "memory", "memory"] * 30, 4)
    for control in (random, shuffled_within_layer):
        assert control(found, 0).labels != found.labels
        assert control(found, 0).labels != control(found, 1).labels
        assert abs(compare_labels(control(found, 0).labels, found.labels).kappa) < 0.3
    assert any(sorted(row) != sorted(found.labels[0]) for row in random(found, 0).labels)


def test_every_place_is_reached():
    found = found_of(["anchor"] + ["memory"] * 5, 3)
    reached = {flat(random(found, seed)).index("anchor") for seed in range(100)}
    within = {flat(shuffled_within_layer(found, seed)).index("anchor") for seed in range(100)}
    assert (reached, within) == ({0, 1, 2, 3, 4, 5}, {0, 1, 2})


def test_controls_draw_no_global_random_numbers():
    state = torch.random.get_rng_state()
    random(found_of(["anchor", "local"], 2), 3)
    shuffled_within_layer(found_of(["anchor", "local"], 2), 3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_settings_say_how():
    found = found_of(["anchor", "local"], 2)
    assert random(found, 3).settings == {"anchor": 0.25, "seed": 3}
    assert random(found, 3).method == "random of head_forcing"
    assert all_one(found, "local").method == "all local of head_forcing"
    with pytest.raises(OptionError, match="unknown label 'wave': head_forcing has anchor, local, memory"):
        all_one(found, "wave")


def test_inverted_deals_out_in_the_opposite_order():
    labels = ["local", "anchor", "memory", "memory", "memory", "memory"]
    margin = [0.9, 0.2, 0.1, 0.8, 0.3, 0.5]
    got = inverted(found_of(labels, 6, margin))
    # least need first: 1 (anchor), 0 (local), 2, 4, 5, 3 (memory, the surest last)
    assert flat(got) == ["memory", "memory", "memory", "anchor", "memory", "local"]
    sizes = {"few": Local(1), "some": Anchor(3), "most": Memory(1, 8, 9), "all": Full(), "open": Memory()}
    got = inverted(found_of(["open", "all", "most", "some", "few"], 5, roles=sizes))
    assert flat(got) == ["few", "some", "most", "all", "open"]
    few = inverted(found_of(["few", "few", "few", "all"], 4, [0.1, 0.9, 0.5, 1.0], roles=sizes))
    in_use = inverted(found_of(["some", "some", "few"], 3, [0.9, 0.1, 0.5], roles=sizes))
    assert flat(in_use) == ["few", "some", "some"]  # no head keeps more than `some`
    assert flat(few) == ["few", "all", "few", "few"]  # the surest to need little gets the most


@given(st.integers(0, 1000))
def test_inverted_takes_memory_from_those_who_need_it(seed):
    profile = random_profile(seed, layers=6, heads=4)
    found = output_regret.classify(profile, error=0.12)
    names = list(found.roles)  # fewest frames first

    def rank(x):
        return [names.index(label) for label in flat(x)]

    before, after = rank(found), rank(inverted(found))
    for head, other in itertools.permutations(range(24), 2):
        assert before[head] >= before[other] or after[head] >= after[other]


# --- maps -----------------------------------------------------------------------------------------------


def test_a_measured_map_knows_where_it_comes_from(tmp_path):
    profile = random_profile(0)
    found = head_forcing.classify(profile)
    got = measured_map(found, profile, stability={"stable": True}, notes={"why": "test"}, seeds=[1, 2])
    assert got == RoleMap.from_labels(found.labels).fit(3, 4, 21, 3)
    assert Memory(1, 8, 9) in got.counts()  # filled in for the window
    origin = got.origin
    assert origin.model == profile.facts.model
    assert (origin.measurement.method, origin.measurement.settings) == (found.method, found.settings)
    assert origin.measurement.metric == ("attention_mass",)
    assert origin.measurement.profile == profile.hash
    assert (origin.measurement.videos, origin.measurement.seeds) == (3, (1, 2))
    assert origin.measurement.library == version("headforcing")
    assert (origin.stability, origin.notes) == ({"stable": True}, {"why": "test"})
    got.save(tmp_path / "roles.json")
    again = RoleMap.load(tmp_path / "roles.json")
    assert (again, again.origin) == (got, origin)


def test_the_seed_of_the_protocol_is_kept():
    profile = random_profile(0)
    found = head_forcing.classify(profile)
    assert measured_map(found, profile).origin.measurement.seeds == ()
    for seed, kept in ((7, (7,)), (None, ()), ("7", ()), (True, ())):
        facts = profile.facts.model_copy(update={"protocol": {"seed": seed}})
        seeded = dataclasses.replace(profile, facts=facts)
        assert measured_map(found, seeded).origin.measurement.seeds == kept
        assert measured_map(found, seeded, seeds=[]).origin.measurement.seeds == ()
        assert measured_map(found, seeded, seeds=[1, 2]).origin.measurement.seeds == (1, 2)


def test_videos_are_counted_not_prompts():
    profile = random_profile(0)
    several = dataclasses.replace(profile, prompt=torch.zeros_like(profile.prompt))
    found = head_forcing.classify(several)
    assert measured_map(found, several).origin.measurement.videos == 3


def test_a_control_makes_a_map_too():
    profile = random_profile(0)
    got = measured_map(random(head_forcing.classify(profile), 7), profile)
    assert got.origin.measurement.method == "random of head_forcing"
    assert got.origin.measurement.settings["seed"] == 7


def test_other_roles_for_the_labels():
    profile = random_profile(0)
    found = head_forcing.classify(profile)
    mine = {"anchor": Anchor(3), "local": Local(0), "memory": Full()}
    assert set(measured_map(found, profile, mine).counts()) == {Anchor(3), Local(0), Full()}
    with pytest.raises(RoleMapError, match="unknown role name"):
        measured_map(found, profile, {"anchor": Anchor()})
    with pytest.raises(WindowError):
        measured_map(found, profile, {**mine, "memory": Memory(1, 20, 9)})
    with pytest.raises(RoleMapMismatchError, match="classify this profile"):
        measured_map(found, random_profile(0, layers=4, heads=3))
