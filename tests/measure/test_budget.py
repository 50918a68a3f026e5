"""A budget is kept, spent where it saves most, and the best that its frames can buy; checks can fail."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headforcing as hf
from headforcing.errors import OptionError, ProfileError
from headforcing.measure import budget as maths
from headforcing.measure import budget as module
from headforcing.measure import labels as controls
from headforcing.measure.budget import COLUMNS, fit_budget
from headforcing.measure.classifiers import find_classifier, unrestricted
from headforcing.measure.labels import measured_map
from headforcing.measure.memory import kept_bytes, stored_bytes
from headforcing.measure.sizes import MODELS, ModelSize
from headforcing.measure.stability import stability
from headforcing.roles import Anchor, Full, Local, Memory, SlidingWindow
from headforcing.roles.maps.file import encode_role
from headforcing.roles.maps.role_map import RoleMap
from headforcing.roles.pyramid_forcing import Strided, Veil
from tests.examples import examples
from tests.profiles import permuted, profile_of, random_profile

ROLES = (Local(1), Local(3), Anchor(3, 3), Memory(3, 3, 3), Memory(3, 12, 3))
KEPT = (1, 3, 6, 9, 18)


def profile_with(errors, roles=ROLES, column="output_regret.p95"):
    """One pass over one layer of heads with these errors, `errors[head][role]`."""
    metric = column.partition(".")[0]
    values = torch.tensor(errors, dtype=torch.float64)[None, None]
    written = {metric: {"roles": [encode_role(role) for role in roles]}}
    return profile_of({column: values}, settings=written)


def size_of(profile, **changes):
    facts = profile.facts.model
    found = ModelSize(facts.layers, facts.heads, facts.head_dim, facts.window, facts.chunk, (2, 2))
    return dataclasses.replace(found, **changes)


def kept(found, profile):
    chunk = profile.facts.model.chunk
    return sum(found.roles[label].capacity(chunk) for row in found.labels for label in row)


sixteenths = st.integers(0, 64).map(lambda number: number / 16)
rows = st.lists(sixteenths, min_size=5, max_size=5)
small = st.lists(rows, min_size=1, max_size=4)
decimals = st.floats(-1, 4, width=32)
real = st.lists(st.lists(decimals, min_size=5, max_size=5), min_size=1, max_size=4)


# --- what holds for every budget ----------------------------------------------------------------------


def check_within(fit, profile, frames):
    """No more is spent than there is, and what is said of it is what the labels keep."""
    found = fit(profile, frames=frames)
    assert found.frames == kept(found, profile) <= frames
    assert found.frames + found.left == frames
    assert found.role_map().shape == profile.shape


def check_monotone(fit, profile, budgets):
    errors = [fit(profile, frames=frames).error for frames in budgets]
    assert errors == sorted(errors, reverse=True)


def best(errors, frames):
    """The smallest total error of all combinations that keep at most so many frames."""
    return min(
        float(sum((Fraction(row[choice]) for row, choice in zip(errors, chosen, strict=True)), Fraction()))
        for chosen in itertools.product(range(5), repeat=len(errors))
        if sum(KEPT[choice] for choice in chosen) <= frames
    )


def check_best(fit, errors):
    """At every point of the curve nothing else that keeps as many frames does better."""
    profile = profile_with(errors)
    curve = fit(profile, frames=18 * len(errors)).curve
    for frames, error in curve:
        found = fit(profile, frames=frames)
        assert (found.frames, found.left, found.error) == (frames, 0, error)
        assert error == best(errors, frames)


def check_equivariant(fit, profile, order, frames):
    found, moved = fit(profile, frames=frames), fit(permuted(profile, order), frames=frames)
    before = [label for row in found.labels for label in row]
    assert [label for row in moved.labels for label in row] == [before[head] for head in order]
    assert (moved.frames, moved.error, moved.curve) == (found.frames, found.error, found.curve)


@given(errors=real, frames=st.integers(4, 80))
def test_a_budget_is_never_exceeded(errors, frames):
    check_within(fit_budget, profile_with(errors), frames)


@given(errors=real, budgets=st.lists(st.integers(4, 80), min_size=2, max_size=6))
def test_more_budget_is_never_worse(errors, budgets):
    check_monotone(fit_budget, profile_with(errors), sorted(budgets))


@settings(max_examples=examples(40))
@given(errors=small)
def test_points_of_the_curve_are_the_best_of_all_combinations(errors):
    check_best(fit_budget, errors)


@settings(max_examples=examples(40))
@given(errors=real)
def test_so_are_those_of_rough_numbers(errors):
    check_best(fit_budget, errors=profile_with(errors).values["output_regret.p95"][0, 0].double().tolist())


@given(seed=st.integers(0, 10**6), frames=st.integers(12, 216))
def test_the_order_of_heads_does_not_decide(seed, frames):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    check_equivariant(fit_budget, random_profile(seed), order, frames)


@given(errors=real, frames=st.integers(4, 80))
def test_the_same_profile_gives_the_same(errors, frames):
    assert fit_budget(profile_with(errors), frames=frames) == fit_budget(profile_with(errors), frames=frames)


@given(errors=real, frames=st.integers(4, 80))
def test_the_curve_is_convex_and_ends_at_the_best_errors(errors, frames):
    found = fit_budget(profile_with(errors), frames=frames)
    (first, last), slopes = (found.curve[0], found.curve[-1]), []
    for (a, before), (b, after) in itertools.pairwise(found.curve):
        assert (b > a, after < before) == (True, True) or math.isclose(before, after)
        slopes.append((before - after) / (b - a))
    assert all(one >= other - 1e-9 for one, other in itertools.pairwise(slopes))
    assert first[0] == len(errors)
    best_errors = sum(min(row) for row in profile_with(errors)["output_regret.p95"][0, 0].tolist())
    assert math.isclose(last[1], best_errors, abs_tol=1e-12)
    assert found.error >= last[1]
    assert math.isclose(found.error, sum(map(sum, found.errors)), abs_tol=1e-12)


ERRORS = [[2.0, 1.0, 0.75, 0.5, 0.0], [2.0, 2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]]


def test_the_checks_find_planted_bugs(monkeypatch):
    def spends_one_more(profile, *, frames):
        found = fit_budget(profile, frames=frames + 1)
        return dataclasses.replace(found, left=found.left - 1)

    def first_come(profile, *, frames):
        monkeypatch.setattr(maths, "_steps", lambda hulls: sorted(steps(hulls), key=lambda step: step.group))
        found = fit_budget(profile, frames=frames)
        monkeypatch.setattr(maths, "_steps", steps)
        return found

    def no_hull(profile, *, frames):
        monkeypatch.setattr(module, "lower_envelope", sorted)
        found = fit_budget(profile, frames=frames)
        monkeypatch.setattr(module, "lower_envelope", envelope)
        return found

    def upside_down(profile, *, frames):
        return fit_budget(profile, frames=max(3, 54 - frames))

    steps, envelope = maths._steps, module.lower_envelope
    profile = profile_with(ERRORS)
    for check, planted, given_ in (
        (check_within, spends_one_more, (profile, 4)),
        (check_best, first_come, (ERRORS,)),
        (check_best, no_hull, (ERRORS,)),
        (check_monotone, upside_down, (profile, range(10, 40))),
        (check_equivariant, first_come, (profile, torch.tensor([2, 0, 1]), 20)),
    ):
        with pytest.raises(AssertionError):
            check(planted, *given_)
        check(fit_budget, *given_)


@given(errors=real, cut=st.integers(1, 3), frames=st.integers(4, 80))
def test_heads_of_one_group_get_the_same_and_single_groups_change_nothing(errors, cut, frames):
    profile = profile_with(errors)
    heads = profile.shape[1]
    labels = [["a" if head < cut else f"b{head}" for head in range(heads)]]
    kinds = {label: Local(number) for number, label in enumerate(dict.fromkeys(labels[0]))}
    groups = RoleMap.from_labels(labels, kinds)
    found = fit_budget(profile, frames=frames, groups=groups)
    assert len({label for label, group in zip(found.labels[0], labels[0], strict=True) if group == "a"}) == 1
    assert found.frames <= frames
    alone = fit_budget(profile, frames=frames)
    assert found.curve[-1][1] >= alone.curve[-1][1] - 1e-12
    if cut == 1:
        assert (found.labels, found.curve, found.error) == (alone.labels, alone.curve, alone.error)


def test_a_group_is_bought_as_a_whole():
    """Two heads that gain little each from 12 frames against one that gains more from as many in all."""
    profile = profile_with([[2.0, 1.0, 0.75, 0.5, 0.0], [2.0, 2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]])
    groups = RoleMap.from_labels([["near", "near", "far"]], {"near": Local(1), "far": Memory()})
    found = fit_budget(profile, frames=13, groups=groups)
    best = min(
        (sum(errors), frames)
        for frames, errors in (
            (a + a + b, (x, y, z))
            for a, x, y in zip(KEPT, ERRORS[0], ERRORS[1], strict=True)
            for b, z in zip(KEPT, ERRORS[2], strict=True)
        )
        if frames <= 13
    )
    assert found.error == best[0]
    assert found.found.settings["groups"] == groups.hash
    with pytest.raises(OptionError, match="groups are for"):
        fit_budget(profile, frames=13, groups=RoleMap.uniform(Local(1), 2, 3))


# --- examples -----------------------------------------------------------------------------------------


def test_a_small_example():
    found = fit_budget(profile_with(ERRORS), frames=10)
    assert found.labels == (("local3", "anchor3+3", "local1"),)
    assert (found.frames, found.left, found.error) == (10, 0, 3.0)
    assert found.errors == ((1.0, 1.0, 1.0),)
    assert found.curve == (
        (3, 5.0),
        (5, 4.0),
        (10, 3.0),
        (13, 2.75),
        (16, 2.5),
        (28, 1.5),
        (45, 0.5),
        (54, 0.0),
    )
    assert found.roles["memory3+12+3"] == Memory(3, 12, 3)


def test_equal_steps_go_to_the_lower_head_and_what_does_not_fit_is_passed_over():
    two = profile_with([[1.0, 1.0, 1.0, 1.0, 0.0], [1.0, 0.9, 0.9, 0.9, 0.9], [1.0, 1.0, 1.0, 1.0, 0.0]])
    assert fit_budget(two, frames=20).labels == (("memory3+12+3", "local1", "local1"),)
    found = fit_budget(two, frames=19)
    assert found.labels == (("local1", "local3", "local1"),)
    assert found.left == 14


def test_nothing_is_bought_that_saves_nothing():
    found = fit_budget(profile_with([[0.5] * 5, [0.5, 0.6, 0.7, 0.8, 0.5]]), frames=36)
    assert (found.frames, found.left, found.curve) == (2, 34, ((2, 1.0),))


def test_roles_past_the_window_are_left_out():
    found = fit_budget(random_profile(0), frames=216)
    assert set(found.roles) == {"local1", "local3", "anchor3+3", "memory3+12+3"}
    only = profile_with([[0.0]], roles=(Full(),))
    with pytest.raises(ProfileError, match="at most 18 frames"):
        fit_budget(only, frames=100)


def test_after_an_ablation_the_unrestricted_memory_has_no_error():
    profile = profile_with([[0.5, 0.2]] * 2, roles=(Local(1), Local(3)), column="ablation.increase")
    found = fit_budget(profile, frames=36, by="ablation.increase")
    assert found.labels == (("memory3+12+3",) * 2,)
    assert (found.error, found.found.metrics) == (0.0, ("ablation",))
    by_error = find_classifier("ablation")(profile, error=0.0)
    assert by_error.labels == found.labels
    tried = (Local(3), unrestricted(profile.facts.model))
    measured = profile_with([[0.5, 0.25]], roles=tried, column="ablation.increase")
    assert fit_budget(measured, frames=18, by="ablation.increase").error == 0.25


@pytest.mark.parametrize("held", [False, True])
@given(errors=real, extra=st.integers(0, 10**4))
def test_a_budget_in_bytes_is_one_in_frames(held, errors, extra):
    profile = profile_with(errors)
    size = size_of(profile)
    each = size.ring_head_bytes if held else size.head_bytes
    limit = 4 * len(errors) * each + extra
    found = fit_budget(profile, bytes=limit, tokens_per_frame=4, held=held)
    assert found.labels == fit_budget(profile, frames=limit // each - 3 * len(errors)).labels
    head, roles = dataclasses.replace(size, layers=1, heads=1), found.role_map()
    ones = [(hf.RoleMap.uniform(role, 1, 1), count) for role, count in roles.counts().items()]
    kept = sum(kept_bytes(head, one) * count for one, count in ones)
    assert kept == (found.frames + 3 * len(errors)) * size.head_bytes <= limit
    if held:
        assert sum(stored_bytes(head, "ring", one) * count for one, count in ones) <= limit


@pytest.mark.parametrize("dtype", [2, 4])
def test_numbers_of_four_bytes_buy_half_the_frames(dtype):
    profile = profile_with(ERRORS)
    limit = size_of(profile, itemsize=dtype).head_bytes * (10 + 9)
    found = fit_budget(profile, bytes=limit, tokens_per_frame=4, itemsize=dtype)
    assert found.frames == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either in frames or in bytes"),
        ({"frames": 9, "bytes": 9}, "either in frames or in bytes"),
        ({"frames": 2}, "give at least frames=3"),
        ({"frames": -1}, "frames is -1"),
        ({"frames": 3.5}, "frames is 3.5"),
        ({"frames": True}, "frames is True"),
        ({"frames": 9, "tokens_per_frame": 4}, "with a budget in bytes only"),
        ({"frames": 9, "held": True}, "with a budget in bytes only"),
        ({"bytes": 9000}, "requires tokens_per_frame"),
        ({"bytes": 9000, "tokens_per_frame": 0}, "tokens_per_frame is 0"),
        ({"bytes": 9000, "tokens_per_frame": 4, "itemsize": 0}, "itemsize is 0"),
        ({"bytes": 1535, "tokens_per_frame": 4}, "give at least bytes=1536"),
        ({"frames": 9, "by": "output_regret"}, "expected one of output_regret.p95"),
    ],
)
def test_impossible_budgets(options, words):
    with pytest.raises(OptionError, match=words):
        fit_budget(profile_with(ERRORS), **options)


def test_the_smallest_budget_that_a_message_names_is_enough():
    found = fit_budget(profile_with(ERRORS), bytes=1536, tokens_per_frame=4)
    assert (found.frames, found.left) == (3, 0)


@pytest.mark.parametrize("by", [column for column in COLUMNS if column != "output_regret.p95"])
def test_what_was_not_measured_is_missed(by):
    with pytest.raises(ProfileError, match=by.replace(".", "[.]")):
        fit_budget(profile_with(ERRORS), frames=10, by=by)


def test_columns_and_roles_must_be_as_many():
    profile = profile_of(
        {"output_regret.p95": torch.zeros(1, 1, 2, 3)},
        settings={"output_regret": {"roles": [encode_role(role) for role in ROLES]}},
    )
    with pytest.raises(ProfileError, match="5 roles"):
        fit_budget(profile, frames=10)


# --- what it is good for ------------------------------------------------------------------------------


def test_the_map_says_what_it_cost_and_where_it_comes_from():
    profile = random_profile(1)
    found = fit_budget(profile, frames=80, by="output_regret.mean")
    role_map = found.role_map(notes={"why": "a test"})
    measurement = role_map.origin.measurement
    assert (measurement.method, measurement.profile) == ("fit_budget", profile.hash)
    assert measurement.settings == {"by": "output_regret.mean", "frames": 80}
    assert role_map.origin.notes == {
        "why": "a test",
        "frames": found.frames,
        "frames_left": found.left,
        "error": found.error,
    }
    assert role_map.labels == found.labels
    assert hf.RoleMap.from_json(role_map.to_json()) == role_map


def test_a_budget_has_controls_and_a_stability():
    profile = random_profile(2, prompts=6)
    found = fit_budget(profile, frames=80)
    other = measured_map(controls.random(found.found, 0), profile)
    assert sum(role.capacity(3) for row in other.layers for role in row) == found.frames
    report = stability(profile, lambda half: fit_budget(half, frames=80).found, draws=5)
    assert report.method == "fit_budget"


# --- bytes --------------------------------------------------------------------------------------------

MIB, GIB = 2**20, 2**30


def test_the_memory_arithmetic_of_known_models():
    small, large = MODELS["wan-1.3b"], MODELS["wan-14b"]
    assert round(small.frame_bytes / MIB) == 274
    assert round(small.head_bytes / MIB, 2) == 0.76
    assert round(small.window_bytes / GIB, 1) == 5.6
    assert round(12 * small.frame_bytes / GIB, 1) == 3.2
    assert round(large.window_bytes / GIB, 1) == 25.0
    assert round(large.frame_bytes / GIB, 2) == 1.19


def test_the_size_of_the_demo_is_that_of_its_model():
    from headforcing.demo.model.attention import DemoConfig

    config, size = DemoConfig(), MODELS["demo"]
    assert (size.layers, size.heads, size.window, size.chunk) == (
        config.layers,
        config.heads,
        config.window,
        config.chunk,
    )
    assert (size.head_dim, size.tokens_per_frame) == (config.dim // config.heads, config.tokens_per_frame)


ROW = (Local(1), Memory(3, 12, 3), Memory(3, 12, 3), Anchor(3, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [ROW, (SlidingWindow(21),) * 4, (SlidingWindow(6, sink=1),) * 4], ids=["mixed", "window", "six"]
)
def test_what_the_ring_store_holds_is_counted_to_the_byte(row):
    from headforcing.demo.model.model import DemoModel
    from headforcing.demo.model.pipeline import DemoPipeline
    from headforcing.demo.world.words import parse_prompt

    model = DemoModel().randomize(torch.Generator().manual_seed(0)).eval()
    roles, size = hf.RoleMap((row,) * 6), MODELS["demo"]
    with torch.no_grad(), hf.apply_head_forcing(model, roles) as handle:
        words = parse_prompt("day summer balloon red car blue").expand(1, 8, -1)
        pipeline = DemoPipeline(model)  # the streams live as long as its caches
        pipeline.generate(words, generator=torch.Generator().manual_seed(0))
        assert handle.status().stored_bytes == (stored := stored_bytes(size, "ring", roles))
    assert stored <= size.ring_head_bytes * sum(role.capacity(3) + 3 for role in row) * 6


def test_a_budget_does_not_count_what_is_packed():
    roles = hf.RoleMap.uniform(Strided(), 30, 12)
    assert kept_bytes(MODELS["wan-1.3b"], roles) == 11 * MODELS["wan-1.3b"].frame_bytes
    profile = profile_with([[0.5, 0.1]], (Local(1), Strided()), "ablation.increase")
    options = {"bytes": 10**5, "tokens_per_frame": 4, "by": "ablation.increase"}
    assert fit_budget(profile, **options).frames == 18
    with pytest.raises(OptionError, match="copies of the ring store for Strided"):
        fit_budget(profile, **options, held=True)


def test_what_grows_has_no_size():
    roles = hf.RoleMap.uniform(Full(), 30, 12)
    assert kept_bytes(MODELS["wan-1.3b"], roles) is None
    assert stored_bytes(MODELS["wan-1.3b"], "ring", roles) is None


def test_roles_with_a_digest_are_refused_because_it_would_not_be_counted():
    profile = profile_with([[[0.5, 0.1]]], (Local(1), Veil()))
    with pytest.raises(OptionError, match="compressed history"):
        fit_budget(profile, frames=10)
