"""Classifiers follow their rules, whatever the order of heads; every property can fail."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headforcing.errors import OptionError, ProfileError, module_names
from headforcing.measure.classifiers import (
    as_margin,
    find_classifier,
    head_forcing,
    mass_ratio,
    output_regret,
    pyramid_forcing,
    short_names,
    table,
)
from headforcing.measure.classifiers.pyramid_forcing import dominant_period
from headforcing.measure.profile import HeadProfile
from headforcing.roles import Anchor, Full, Local, Memory, SlidingWindow
from headforcing.roles.episodic import ThresholdFifo, Uniform
from headforcing.roles.maps.file import encode_role
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.pyramid_forcing import Wave
from tests.examples import examples
from tests.profiles import CANDIDATES, permuted, profile_of, random_profile
from tests.strategies import roles

NAMES = ("dummy_forcing", "head_forcing", "mass_ratio", "output_regret", "pyramid_forcing")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(found) -> list[str]:
    return [label for row in found.labels for label in row]


# --- what holds for every classifier ------------------------------------------------------------------


def check_equivariant(classify, profile, order):
    found, moved = classify(profile), classify(permuted(profile, order))
    assert flat(moved) == [flat(found)[head] for head in order]
    torch.testing.assert_close(moved.margin.flatten(), found.margin.flatten()[order])


def check_reads_what_it_says(classify, profile):
    """Other metrics and the clean pass change nothing; its own metric is missed."""
    found = classify(profile)
    clean = profile.clean[:, None, None]
    values = {
        name: torch.where(clean.view(-1, *[1] * (value.dim() - 1)), -5 * value, value)
        for name, value in profile.values.items()
    }
    only = {name: value for name, value in values.items() if name.partition(".")[0] in found.metrics}
    assert classify(dataclasses.replace(profile, values=only)) == found
    others = {name: value for name, value in values.items() if name not in only}
    with pytest.raises(ProfileError, match="profile again"):
        classify(dataclasses.replace(profile, values=others))


def check_well_formed(classify, profile):
    found = classify(profile)
    assert (len(found.labels), {len(row) for row in found.labels}) == (profile.shape[0], {profile.shape[1]})
    assert set(flat(found)) <= set(found.roles)
    assert sum(found.counts().values()) == math.prod(profile.shape)
    assert found.margin.shape == profile.shape
    assert found.margin.dtype == torch.float64
    assert bool(((found.margin >= 0) & (found.margin <= 1)).all())
    for role in found.roles.values():
        role.fit(21, 3)


def test_the_list_is_the_folder():
    assert set(NAMES) <= set(module_names("headforcing.measure.classifiers"))
    assert find_classifier("head_forcing") is head_forcing.classify
    with pytest.raises(OptionError, match="unknown classifier"):
        find_classifier("k_means")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=examples(30))
@given(seed=st.integers(0, 10_000))
def test_the_order_of_heads_does_not_decide(name, seed):
    profile = random_profile(seed)
    check_equivariant(find_classifier(name), profile, torch.randperm(12, generator=seeded(seed)))
    check_well_formed(find_classifier(name), profile)


@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_reads_what_it_says(name):
    for seed in range(5):
        check_reads_what_it_says(find_classifier(name), random_profile(seed))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_profile_gives_the_same(name, tmp_path):
    profile = random_profile(1)
    found = find_classifier(name)(profile)
    profile.save(tmp_path / "p.safetensors")
    again = find_classifier(name)(HeadProfile.load(tmp_path / "p.safetensors"))
    assert again == found
    assert torch.equal(again.margin, found.margin)


def test_the_checks_find_planted_bugs():
    profile, order = random_profile(2), torch.randperm(12, generator=seeded())

    def ranked_per_layer(profile):
        rows = [
            head_forcing.classify(profile_of(values, clean=profile.clean)) for values in by_layer(profile)
        ]
        whole = head_forcing.classify(profile)
        return dataclasses.replace(whole, labels=tuple(row.labels[0] for row in rows))

    def by_layer(profile):
        for layer in range(3):
            yield {name: value[:, layer : layer + 1] for name, value in profile.values.items()}

    def with_the_clean_pass(profile):
        return head_forcing.classify(dataclasses.replace(profile, clean=torch.zeros_like(profile.clean)))

    def two_metrics(profile):
        ratio = mass_ratio.classify(profile)
        return dataclasses.replace(head_forcing.classify(profile), margin=ratio.margin)

    def wide_margin(profile):
        found = head_forcing.classify(profile)
        return dataclasses.replace(found, margin=found.margin + 1)

    check_equivariant(head_forcing.classify, profile, order)
    with pytest.raises(AssertionError):
        check_equivariant(ranked_per_layer, profile, order)
    with pytest.raises(AssertionError):
        check_reads_what_it_says(with_the_clean_pass, profile)
    with pytest.raises(ProfileError):
        check_reads_what_it_says(two_metrics, profile)
    with pytest.raises(AssertionError):
        check_well_formed(wide_margin, profile)


@pytest.mark.parametrize(
    ("name", "column", "what_to_do"),
    [
        ("head_forcing", "attention_mass.first", "history contains the first frame"),
        ("mass_ratio", "mass_ratio.ratio", "between the sink and the recent ones"),
        ("output_regret", "output_regret.p95", "measure it again, for every head"),
    ],
)
def test_a_head_that_was_never_measured_is_refused(name, column, what_to_do):
    profile = random_profile(3)
    profile.values[column][:, 1, 2] = torch.nan
    with pytest.raises(ProfileError, match=f"never measured for layer 1, head 2 .*{what_to_do}$"):
        find_classifier(name)(profile)


def test_passes_without_a_number_do_not_count():
    profile = random_profile(3)
    expected = head_forcing.classify(profile.where(profile.prompt > 0))
    profile.values["attention_mass.first"][profile.prompt == 0] = torch.nan
    profile.values["attention_mass.own"][profile.prompt == 0] = torch.nan
    assert head_forcing.classify(profile) == expected


def test_margins_of_equal_scores():
    equal = torch.full((4,), 0.3, dtype=torch.float64)
    assert as_margin(torch.zeros(4), equal).tolist() == [0] * 4
    assert as_margin(torch.ones(4), equal).tolist() == [1] * 4


# --- Head Forcing ---------------------------------------------------------------------------------------


def masses(first, own, heads: int) -> HeadProfile:
    first, own = (torch.tensor(x, dtype=torch.float64).view(1, -1, heads) for x in (first, own))
    columns = {"first": first, "middle": 1 - first - own, "own": own}
    return profile_of({f"attention_mass.{name}": value for name, value in columns.items()})


SMALL = masses([0.1, 0.9, 0.1, 0.8, 0.1, 0.1, 0.1, 0.1], [0.5, 0.0, 0.6, 0.1, 0.6, 0.1, 0.2, 0.3], heads=4)


def test_head_forcing_on_a_small_example():
    found = head_forcing.classify(SMALL)
    assert found.labels == (
        ("memory", "anchor", "local", "anchor"),  # the own mass of 2 and 4 is equal: the lower one first
        ("local", "memory", "memory", "memory"),
    )
    assert found.roles == {"anchor": Anchor(), "local": Local(), "memory": Memory()}
    assert found.settings == {"anchor": 0.25, "local": 0.2, "rule": "quantile"}
    expected = torch.tensor([[0.1 / 0.6, 1.0, 0.1 / 0.6, 0.7 / 0.8], [0.1 / 0.6, 0.5 / 0.6, 0.4 / 0.6, 0.5]])
    torch.testing.assert_close(found.margin.float(), expected, atol=1e-6, rtol=1e-5)
    assert head_forcing.classify(SMALL, local=1 / 6).labels[1][0] == "memory"  # the tie is cut


@pytest.mark.parametrize(
    ("anchor", "local", "counts", "margins"),
    [
        (0.0, 0.0, (0, 0, 8), [1.0] * 8),  # whatever the scores are, nobody is picked
        (1.0, 0.5, (8, 0, 0), [1.0] * 8),
        (1 / 8, 0.0, (1, 0, 7), [1.0, 1 / 8, 1.0, 1 / 8, 1.0, 1.0, 1.0, 1.0]),
        (0.0, 1 / 8, (0, 1, 7), [1 / 6, 1.0, 0.0, 5 / 6, 0.0, 5 / 6, 4 / 6, 3 / 6]),
        (0.0, 1.0, (0, 8, 0), [1.0] * 8),
    ],
)
def test_margins_where_no_head_one_head_or_every_head_is_picked(anchor, local, counts, margins):
    found = head_forcing.classify(SMALL, anchor=anchor, local=local)
    assert tuple(flat(found).count(name) for name in ("anchor", "local", "memory")) == counts
    assert found.margin.flatten().tolist() == pytest.approx(margins, abs=1e-6)


def test_head_forcing_by_absolute_mass():
    found = head_forcing.classify(SMALL, rule="absolute", anchor=0.85, local=0.55)
    assert found.labels == (("memory", "anchor", "local", "memory"), ("local", "memory", "memory", "memory"))
    torch.testing.assert_close(float(found.margin[0, 3]), 0.05 / 0.8, atol=1e-6, rtol=1e-5)
    exact = masses([0.5, 0.25, 0.25], [0.0, 0.5, 0.25], heads=3)
    found = head_forcing.classify(exact, rule="absolute", anchor=0.5, local=0.5)
    assert found.labels == (("anchor", "local", "memory"),)  # at least


@pytest.mark.parametrize(("layers", "heads", "expected"), [(6, 4, (6, 4, 14)), (30, 12, (90, 54, 216))])
def test_shares_are_rounded_up_over_all_heads(layers, heads, expected):
    first, own = torch.rand(2, layers * heads, generator=seeded(3)) / 2
    found = head_forcing.classify(masses(first.tolist(), own.tolist(), heads))
    assert tuple(found.counts().values()) == expected


def test_a_share_is_not_rounded_up_by_its_last_bit():
    first = torch.rand(100, generator=seeded(3)) / 2
    profile = masses(first.tolist(), first.tolist(), 10)
    assert head_forcing.classify(profile, anchor=0.07).counts()["anchor"] == 7  # 0.07 * 100 > 7


coarse = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda pair: (pair[0] / 8, pair[1] / 8))
mass_profiles = st.integers(1, 6).flatmap(
    lambda heads: (
        st.lists(coarse, min_size=heads, max_size=4 * heads)
        .map(lambda rows: rows[: len(rows) // heads * heads])
        .map(lambda rows: masses([row[0] for row in rows], [row[1] for row in rows], heads))
    )
)


def check_ranking(classify, profile, anchor, local):
    labels = flat(classify(profile, anchor=anchor, local=local))
    first = profile["attention_mass.first"].flatten().tolist()
    own = profile["attention_mass.own"].flatten().tolist()
    anchors = [head for head, name in enumerate(labels) if name == "anchor"]
    rest = [head for head, name in enumerate(labels) if name != "anchor"]
    locals_ = [head for head in rest if labels[head] == "local"]
    assert len(labels) * anchor - 1e-6 <= len(anchors) < len(labels) * anchor + 1
    assert len(rest) * local - 1e-6 <= len(locals_) < len(rest) * local + 1
    assert all((-first[a], a) < (-first[r], r) for a in anchors for r in rest)
    assert all((-own[x], x) < (-own[r], r) for x in locals_ for r in rest if labels[r] == "memory")


@given(mass_profiles, st.floats(0, 1), st.floats(0, 1))
def test_labels_follow_the_ranking(profile, anchor, local):
    check_ranking(head_forcing.classify, profile, anchor, local)


def test_the_ranking_check_finds_planted_bugs():
    def swapped(profile, **shares):
        values = dict(profile.values)
        first, own = values["attention_mass.first"], values["attention_mass.own"]
        return head_forcing.classify(
            dataclasses.replace(profile, values={"attention_mass.first": own, "attention_mass.own": first}),
            **shares,
        )

    def ties_to_the_last(profile, **shares):
        order = torch.arange(math.prod(profile.shape)).flip(0)
        found = head_forcing.classify(permuted(profile, order), **shares)
        return dataclasses.replace(found, labels=table(flat(found)[::-1], profile.shape[1]))

    for wrong in (swapped, ties_to_the_last):
        with pytest.raises(AssertionError):
            check_ranking(wrong, SMALL, 0.25, 0.2 - 0.04)


@given(mass_profiles, st.floats(0, 1), st.floats(0, 1), st.sampled_from(["quantile", "absolute"]))
def test_head_forcing_thresholds_are_monotone(profile, a, b, rule):
    low, high = sorted((a, b))
    few, many = (high, low) if rule == "absolute" else (low, high)
    fewer = head_forcing.classify(profile, anchor=few, rule=rule)
    more = head_forcing.classify(profile, anchor=many, rule=rule)
    assert all(y == "anchor" for x, y in zip(flat(fewer), flat(more), strict=True) if x == "anchor")
    fewer = head_forcing.classify(profile, local=few, rule=rule)
    more = head_forcing.classify(profile, local=many, rule=rule)
    assert all(y == "local" for x, y in zip(flat(fewer), flat(more), strict=True) if x == "local")


@given(st.integers(0, 1000), st.integers(0, 11), st.sampled_from(["quantile", "absolute"]), st.booleans())
def test_inside_its_margin_a_head_keeps_its_label(seed, head, rule, up):
    profile = random_profile(seed).noisy
    found = head_forcing.classify(profile, rule=rule)
    margin = float(found.margin.flatten()[head])
    for name in ("attention_mass.first", "attention_mass.own"):
        value = profile.values[name].clone()
        mean = profile.mean(name)
        step = margin * float(mean.max() - mean.min())
        value.flatten(1)[:, head] += (0.99 if up else -0.99) * step - (1e-6 if up else -1e-6)
        moved = dataclasses.replace(profile, values={**profile.values, name: value})
        if margin > 1e-4:
            assert flat(head_forcing.classify(moved, rule=rule))[head] == flat(found)[head]


@pytest.mark.parametrize(
    "options", [{"anchor": 1.1}, {"local": -0.1}, {"rule": "mean"}, {"anchor": math.nan}]
)
def test_impossible_options_of_head_forcing(options):
    with pytest.raises(OptionError, match=r"expected"):
        head_forcing.classify(SMALL, **options)


# --- Forcing-KV -----------------------------------------------------------------------------------------


def test_mass_ratio_on_a_small_example():
    ratio = torch.tensor([[[0.8, 0.79, 1.0]], [[0.8, 0.79, 0.4]]], dtype=torch.float64)
    found = mass_ratio.classify(profile_of({"mass_ratio.ratio": ratio}), static=0.75)
    assert found.labels == (("static", "static", "dynamic"),)
    assert found.roles == {"static": Local(recent=1, sink=1), "dynamic": Memory(sink=1, episodic=2, recent=1)}
    torch.testing.assert_close(found.margin, torch.tensor([[0.5, 0.4, 0.5]]).double(), atol=1e-6, rtol=1e-5)
    half = profile_of({"mass_ratio.ratio": torch.full((1, 1, 1), 0.5)})
    assert mass_ratio.classify(half, static=0.5).labels == (("static",),)  # at least
    with pytest.raises(OptionError):
        mass_ratio.classify(half, static=2)


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_mass_ratio_is_monotone(seed, a, b):
    profile = random_profile(seed)
    strict, lax = (flat(mass_ratio.classify(profile, static=x)) for x in (max(a, b), min(a, b)))
    assert all(y == "static" for x, y in zip(strict, lax, strict=True) if x == "static")


# --- output regret --------------------------------------------------------------------------------------


def regret(errors, candidates=CANDIDATES) -> HeadProfile:
    errors = torch.tensor(errors, dtype=torch.float64)
    return profile_of(
        {"output_regret.p95": errors, "output_regret.mean": errors / 2},
        settings={"output_regret": {"roles": [encode_role(role) for role in candidates]}},
    )


def test_output_regret_on_a_small_example():
    #          Local(3) Full Memory Anchor Local(1)
    errors = [
        [0.05, 0.0, 0.0, 0.0, 0.11],
        [0.2, 0.0, 0.1, 0.2, 0.2],
        [0.5, 0.4, 0.4, 0.6, 0.9],
        [0.2, 0, 0.2, 0.3, 0.3],
    ]
    found = output_regret.classify(regret([[errors]]), error=0.1 + 1e-6)
    assert found.labels == (("local3", "memory3+12+3", "memory3+12+3", "full"),)
    margin = torch.tensor([0.01, 0.0, 0.0, 0.1]) / 0.9
    torch.testing.assert_close(found.margin[0].float(), margin, atol=1e-5, rtol=0)
    assert list(found.roles) == ["local1", "local3", "anchor3+3", "memory3+12+3", "full"]
    assert found.roles["memory3+12+3"] == Memory(3, 12, 3)
    assert output_regret.classify(regret([[errors]]), error=0.06, by="mean").labels[0][0] == "local1"
    exact = regret([[[[0.125, 0.0, 0.125, 0.25, 0.25]]]])
    assert output_regret.classify(exact, error=0.125).labels == (("local3",),)  # at most


def check_cheapest(classify, profile, error):
    """The definition, head by head."""
    found = classify(profile, error=error)
    chunk = profile.facts.model.chunk
    means = profile.noisy.mean("output_regret.p95").flatten(0, 1).tolist()
    cost = [math.inf if role.capacity(chunk) is None else role.capacity(chunk) for role in CANDIDATES]
    for label, errors in zip(flat(found), means, strict=True):
        given = CANDIDATES.index(found.roles[label])
        if min(errors) <= error:
            assert errors[given] <= error
            assert all(cost[r] >= cost[given] for r, e in enumerate(errors) if e <= error)
        else:
            assert errors[given] == min(errors)


@given(st.integers(0, 1000), st.floats(0, 0.3))
def test_every_head_gets_the_cheapest_role_that_will_do(seed, error):
    check_cheapest(output_regret.classify, random_profile(seed), error)


def test_the_check_of_the_cheapest_role_finds_planted_bugs():
    def best(profile, error):
        return output_regret.classify(profile, error=0.0)

    def by_mean(profile, error):
        return output_regret.classify(profile, error=error, by="mean")

    for wrong in (best, by_mean):
        with pytest.raises(AssertionError):
            check_cheapest(wrong, random_profile(0), 0.12)


@given(st.integers(0, 1000), st.floats(0, 0.3), st.floats(0, 0.3))
def test_more_error_never_costs_more(seed, a, b):
    profile = random_profile(seed)
    strict, lax = (output_regret.classify(profile, error=e) for e in sorted((a, b)))
    order = list(strict.roles)
    pairs = zip(flat(strict), flat(lax), strict=True)
    assert all(order.index(y) <= order.index(x) for x, y in pairs)


def test_malformed_candidates_are_refused():
    good = regret([[[[0.1] * 5]]])

    def with_roles(written):
        facts = good.facts.model_copy(update={"metrics": {"output_regret": {"roles": written}}})
        return dataclasses.replace(good, facts=facts)

    encoded = [encode_role(role) for role in CANDIDATES]
    for written in (None, [], "local", [1], [{"type": "Lokal"}], encoded[:4], [*encoded[:4], encoded[0]]):
        with pytest.raises(ProfileError):
            output_regret.classify(with_roles(written))
    for options in ({"error": -0.1}, {"error": math.nan}, {"by": "max"}):
        with pytest.raises(OptionError, match="expected"):
            output_regret.classify(good, **options)


def test_short_names():
    names = {
        Local(3): "local3",
        Local(1, 3): "local3+1",
        Anchor(3, 3): "anchor3+3",
        Anchor(): "anchor1",
        Memory(3, 12, 3): "memory3+12+3",
        Memory(): "memory1+?+?",
        Memory(1, 2, 3, Uniform()): "memory1+2+3@uniform",
        SlidingWindow(21, 1, positions="absolute"): "slidingwindow1+21@absolute",
        Memory(1, 2, 3, ThresholdFifo(0.1)): "memory1+2+3@thresholdfifo",
        Memory(1, 2, 3, ThresholdFifo(0.2)): "memory1+2+3@thresholdfifo#2",
        Full(): "full",
    }
    assert short_names(names) == names


@given(st.lists(roles(21, 3), max_size=12))
def test_short_names_are_unique(row):
    names = short_names(row)
    assert set(names) == set(row)
    assert len(set(names.values())) == len(names)


# --- Pyramid Forcing ------------------------------------------------------------------------------------


def logits(*heads) -> torch.Tensor:
    return torch.stack([torch.as_tensor(head, dtype=torch.float64) for head in heads])[None, None]


AGE = torch.arange(18, dtype=torch.float64)


def wave(period: float, phase: float = 0.3) -> torch.Tensor:
    return (2 * math.pi * AGE / period + phase).sin()


def test_pyramid_forcing_on_planted_heads():
    heads = logits(
        AGE + 1, -AGE - 1, wave(5), wave(6) + 0.3, wave(9) + 0.3, wave(9) - 0.3, torch.zeros(18), AGE - 7
    )
    found = pyramid_forcing.classify(profile_of({"qk_logits.by_age": heads}))
    assert found.labels == (("anchor", "veil", "wave", "wave", "anchor", "veil", "anchor", "anchor"),)
    assert found.roles["wave"] == Wave()
    profile = profile_of({"qk_logits.by_age": heads})
    model = profile.facts.model.model_copy(update={"window": 12})
    small = dataclasses.replace(profile, facts=profile.facts.model_copy(update={"model": model}))
    assert pyramid_forcing.classify(small).roles == PRESETS["pyramid_forcing"].roles(12, 3) != found.roles
    step = torch.cat([torch.ones(12), torch.full((3,), -100.0), torch.full((3,), torch.nan)])
    exact = pyramid_forcing.classify(profile_of({"qk_logits.by_age": logits(wave(6.4) + 0.1, step, -step)}))
    assert exact.labels == (("wave", "anchor", "veil"),)  # 6.4 frames, and 12 of 15 logits
    slow = pyramid_forcing.classify(profile_of({"qk_logits.by_age": heads}), period=5.5)
    assert slow.labels[0][2:4] == ("wave", "anchor")


@given(st.integers(0, 1000), st.floats(0.5, 1), st.floats(0.5, 1), st.floats(2, 7), st.floats(2, 7))
@settings(max_examples=examples(30))
def test_pyramid_thresholds_are_monotone(seed, a, b, short, long):
    profile = random_profile(seed)
    strict, lax = (flat(pyramid_forcing.classify(profile, polarity=x)) for x in (max(a, b), min(a, b)))
    assert all(x == "wave" for x, y in zip(strict, lax, strict=True) if y == "wave")
    short, long = sorted((short, long))
    few, many = (flat(pyramid_forcing.classify(profile, period=x)) for x in (short, long))
    assert all(y == "wave" for x, y in zip(few, many, strict=True) if x == "wave")


def test_the_margin_is_to_the_nearest_question_that_was_asked():
    profile = random_profile(5, layers=6)
    found = pyramid_forcing.classify(profile)
    series = profile.noisy["qk_logits.by_age"][..., :17].flatten(1, 2)
    positive, mean = (series > 0).double().mean((0, 2)), series.mean((0, 2))
    scores = [positive - 0.8, 1 - positive - 0.8, dominant_period(series) - 6.4, mean]
    asked = {"anchor": (1, 4), "veil": (2, 4), "wave": (3, 3)}
    for head, label in enumerate(flat(found)):
        near = [float(score[head].abs() / (score.max() - score.min())) for score in scores]
        by_sign, otherwise = asked[label]
        count = by_sign if label != "wave" and scores[by_sign - 1][head] >= 0 else otherwise
        assert float(found.margin.flatten()[head]) == pytest.approx(min(1, *near[:count]))
    assert {"anchor", "veil", "wave"} == set(flat(found))


def test_only_passes_without_a_gap_count():
    clear, gap, short = wave(5) + 0.1, wave(9), wave(9)
    gap[4], short[12:] = torch.nan, torch.nan
    value = torch.stack([clear, gap, short])[:, None, None]
    found = pyramid_forcing.classify(profile_of({"qk_logits.by_age": value}))
    assert found == pyramid_forcing.classify(profile_of({"qk_logits.by_age": value[:1]}))
    with pytest.raises(ProfileError, match="last 13 frames or more without a gap"):
        pyramid_forcing.classify(profile_of({"qk_logits.by_age": value[1:]}))
    assert pyramid_forcing.classify(profile_of({"qk_logits.by_age": value[1:]}), period=6).labels
    with pytest.raises(OptionError, match="at least 2 frames"):
        pyramid_forcing.classify(profile_of({"qk_logits.by_age": value}), period=1.5)


def check_period(find, series, period):
    assert abs(1 / float(find(series)) - 1 / period) <= 1 / len(series)


planted = st.integers(24, 60).flatmap(
    lambda n: st.tuples(st.just(n), st.floats(3, n / 4), st.floats(0, 2 * math.pi), st.integers(0, 1000))
)


@given(planted, st.sampled_from(["sine", "square"]), st.floats(-3, 3), st.floats(-0.2, 0.2))
def test_a_planted_period_is_found(planted, shape, level, slope):
    n, period, phase, seed = planted
    time = torch.arange(n, dtype=torch.float64)
    pure = (2 * math.pi * time / period + phase).sin()
    series = pure if shape == "sine" else pure.sign()
    noise = 0.1 * 3 / period * torch.randn(n, generator=seeded(seed))  # differences grow with frequency
    check_period(dominant_period, series + level + slope * time + noise, period)


def without_folding(series):
    steps = series.diff()
    windowed = (steps - steps.mean()) * torch.hann_window(len(steps) + 1, periodic=True, dtype=torch.float64)[
        1:
    ]
    power = torch.fft.rfft(windowed, 256).abs().square()
    power[: math.ceil(256 / len(steps))] = 0
    return 256 / power.argmax()


def test_harmonics_do_not_win():
    """In differences all harmonics of a square wave are equally strong: only folding tells them apart."""
    time = torch.arange(48, dtype=torch.float64)

    def all_found(find):
        for period, phase in itertools.product((6.0, 8.0, 9.0, 10.0, 12.0), (0.1, 1.0, 2.0)):
            check_period(find, (2 * math.pi * time / period + phase).sin().sign(), period)

    all_found(dominant_period)
    with pytest.raises(AssertionError):
        all_found(without_folding)


@given(st.integers(1, 5), st.integers(13, 18), st.integers(0, 1000))
def test_the_mean_power_is_that_of_the_transform(passes, n, seed):
    waves = torch.randn(passes, 3, n, generator=seeded(seed), dtype=torch.float64)
    expected = torch.fft.rfft(waves, pyramid_forcing.GRID).abs().square().mean(0)
    torch.testing.assert_close(pyramid_forcing.mean_power(waves), expected, atol=1e-9, rtol=1e-9)


def test_the_series_are_those_of_the_description():
    """Passes of unlike lengths, against the steps done one by one."""
    series = torch.randn(2, 1, 18, generator=seeded(), dtype=torch.float64)
    series[1, 0, 14:] = torch.nan
    got = pyramid_forcing._windowed(series)
    for row, n in ((0, 18), (1, 14)):
        steps = series[row, 0, :n].diff()
        hann = torch.hann_window(n, periodic=True, dtype=torch.float64)[1:]
        expected = (steps - steps.mean()) * hann
        torch.testing.assert_close(got[row, 0, : n - 1], expected)
        assert not got[row, 0, n - 1 :].any()


@given(st.integers(13, 40), st.integers(1, 3), st.integers(0, 1000))
def test_the_period_is_that_of_the_description(n, passes, seed):
    """Every step written out, on noise, where the strongest frequency may be anywhere."""
    series = torch.randn(passes, 1, n, generator=seeded(seed), dtype=torch.float64)
    steps = series[:, 0].diff()
    hann = torch.hann_window(n, periodic=True, dtype=torch.float64)[1:]
    power = torch.fft.rfft((steps - steps.mean(1, keepdim=True)) * hann, 256).abs().square().mean(0).tolist()
    scores = {
        256 / f: sum(power[h * f] / h for h in (1, 2, 3) if h * f <= 128)
        for f in range(1, 129)
        if f / 256 >= 1 / (n - 1)
    }
    assert float(dominant_period(series)) == max(scores, key=scores.__getitem__)


@pytest.mark.parametrize("seed", range(20))
def test_ages_that_nobody_saw_change_no_period(seed):
    series = torch.randn(18, generator=seeded(seed), dtype=torch.float64).cumsum(0)
    padded = torch.nn.functional.pad(series, (0, 30), value=torch.nan)
    assert dominant_period(padded) == dominant_period(series)


def test_the_period_of_special_series():
    assert dominant_period(AGE).isnan()
    assert dominant_period(torch.zeros(18)).isnan()
    assert dominant_period(wave(6.4)) == 6.4
    assert dominant_period(wave(5).flip(0)) == dominant_period(wave(5))
    both = torch.stack([torch.stack([wave(5), wave(8)]), torch.stack([wave(5, 2.0), wave(8, 1.0)])])
    assert dominant_period(both).tolist() == pytest.approx([5, 8], abs=0.1)
