"""The classifier of Dummy Forcing gives the labels that keep the most attention, and says how sure it is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headforcing.errors import OptionError
from headforcing.measure.classifiers import dummy_forcing
from headforcing.roles.maps.presets import PRESETS
from tests.profiles import profile_of, random_profile

KEEPS = {"sink": 0, "neighbour": 1, "dummy": None}


def masses(pairs, heads=None):
    """A profile of one pass with masses on the first frame and on the middle, head by head."""
    first, middle = torch.tensor(pairs, dtype=torch.float64).T.reshape(2, 1, -1, heads or len(pairs))
    columns = {"first": first, "middle": middle, "own": 1 - first - middle}
    return profile_of({f"attention_mass.{name}": value for name, value in columns.items()})


def flat(found):
    return [label for row in found.labels for label in row]


def kept(labels, profile):
    """Shares of all heads' mass that stay in view."""
    shares = []
    for name in ("first", "middle"):
        mass = profile["attention_mass." + name].flatten().tolist()
        total = sum(mass)
        shares.append([value / total if total else 0.0 for value in mass])
    return sum(shares[KEEPS[label]][head] for head, label in enumerate(labels) if label != "dummy")


def check_optimal(classify, profile, count):
    """As good as the best of all assignments with that many dummies."""
    labels = flat(classify(profile, num_dummy=count))
    assert labels.count("dummy") == count
    every = itertools.product(KEEPS, repeat=len(labels))
    best = max(kept(other, profile) for other in every if other.count("dummy") == count)
    assert kept(labels, profile) >= best - 1e-9


pairs = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda pair: (pair[0] / 16, pair[1] / 16))
small = st.lists(pairs, min_size=1, max_size=6).flatmap(
    lambda rows: st.tuples(st.just(rows), st.integers(0, len(rows)))
)


@given(small)
def test_no_assignment_keeps_more(case):
    rows, count = case
    check_optimal(dummy_forcing.classify, masses(rows), count)


def test_the_check_finds_planted_bugs():
    profile = masses([(0.4, 0.1), (0.1, 0.3), (0.2, 0.2), (0.05, 0.1)])

    def fixed(labels):
        return lambda profile, num_dummy: dummy_forcing.Classification("", labels, torch.zeros(1), {}, {}, ())

    check_optimal(dummy_forcing.classify, profile, 2)
    for wrong in (
        ("dummy", "neighbour", "sink", "dummy"),  # drops the wrong head
        ("sink", "sink", "dummy", "dummy"),  # keeps the wrong frames
        ("sink", "neighbour", "sink", "dummy"),  # too few
    ):
        with pytest.raises(AssertionError):
            check_optimal(fixed((wrong,)), profile, 2)


def test_a_small_example():
    profile = masses([(0.4, 0.1), (0.1, 0.3), (0.2, 0.2), (0.1, 0.2)], heads=2)
    found = dummy_forcing.classify(profile)
    # Shares of the first frame 4, 1, 2, 1 of 8; of the middle 1, 3, 2, 2 of 8.
    assert found.labels == (("sink", "neighbour"), ("dummy", "dummy"))
    assert found.settings == {"num_dummy": 2}
    assert found.counts() == {"sink": 1, "neighbour": 1, "dummy": 2}
    # Stakes 4, 3, 2, 2 with a range of 2; the first share leads by 3, -2, 0, -1, a range of 5.
    expected = torch.tensor([[3 / 5, 2 / 5], [0.5, 0.5]]).double()
    torch.testing.assert_close(found.margin, expected, atol=1e-6, rtol=0)
    assert found.roles == PRESETS["dummy_forcing"].roles(21, 3)


def test_shares_are_of_all_heads_together():
    """The first frame has little mass everywhere, but this head has most of it."""
    found = dummy_forcing.classify(masses([(0.02, 0.3), (0.001, 0.3), (0.001, 0.4)]), num_dummy=1)
    assert found.labels == (("sink", "dummy", "neighbour"),)


def test_ties():
    equal = masses([(0.25, 0.25)] * 4)
    assert flat(dummy_forcing.classify(equal)) == ["dummy", "dummy", "sink", "sink"]
    assert dummy_forcing.classify(equal).margin.max() == 0
    no_middle = masses([(0.5, 0.0), (0.25, 0.0)])
    assert flat(dummy_forcing.classify(no_middle, num_dummy=0)) == ["sink", "sink"]


@pytest.mark.parametrize(("heads", "count"), [(12, 6), (5, 2), (1, 0)])
def test_half_of_the_heads_are_dummies(heads, count):
    found = dummy_forcing.classify(random_profile(0, layers=1, heads=heads))
    assert found.counts()["dummy"] == count


@pytest.mark.parametrize("wrong", [-1, 13, 1.5, True, "half"])
def test_impossible_numbers_of_dummies(wrong):
    with pytest.raises(OptionError, match="expected a number of heads, at most all 12"):
        dummy_forcing.classify(random_profile(0), num_dummy=wrong)


@given(st.integers(0, 1000), st.integers(0, 12), st.integers(0, 12))
def test_more_dummies_take_the_next_heads(seed, a, b):
    profile = random_profile(seed)
    fewer, more = (flat(dummy_forcing.classify(profile, num_dummy=n)) for n in sorted((a, b)))
    assert all(y in (x, "dummy") for x, y in zip(fewer, more, strict=True))
    assert math.prod(profile.shape) == 12
