"""Comparing maps: values by hand and published ones, and what must hold for any two maps."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from headforcing.errors import RoleMapMismatchError, WindowError
from headforcing.measure.classifiers import table
from headforcing.measure.compare import Comparison, compare_labels, compare_maps, cross_table, jaccard, kappa
from headforcing.roles import Anchor, Local, Memory
from headforcing.roles.maps.origin import ModelFacts, Origin
from headforcing.roles.maps.role_map import RoleMap


def counted(cross: dict[str, dict[str, int]], heads: int = 12):
    """Two tables of labels with this cross table."""
    pairs = [(a, b) for a, row in cross.items() for b, count in row.items() for _ in range(count)]
    return table([a for a, _ in pairs], heads), table([b for _, b in pairs], heads)


def test_the_published_maps_of_self_forcing():
    """Pyramid Forcing against Forcing-KV: NMI .276 and ARI .334."""
    pyramid, forcing_kv = counted(
        {
            "anchor": {"static": 10, "dynamic": 162},
            "wave": {"static": 102, "dynamic": 54},
            "veil": {"static": 22, "dynamic": 10},
        }
    )
    found = compare_labels(pyramid, forcing_kv)
    assert (round(found.nmi, 3), round(found.ari, 3)) == (0.276, 0.334)
    assert found.labels_a == ("anchor", "veil", "wave")
    assert found.labels_b == ("dynamic", "static")
    assert found.table == ((162, 10), (10, 22), (54, 102))
    assert (found.agreement, found.kappa, dict(found.jaccard)) == (None, None, {})


def test_the_published_maps_of_forcing_kv():
    """Self Forcing against LongLive: 30 of 360 heads differ, kappa 0.83."""
    found = compare_labels(*counted({"s": {"s": 129, "d": 5}, "d": {"s": 25, "d": 201}}))
    assert found.agreement == pytest.approx(330 / 360)
    assert round(found.kappa, 2) == 0.83
    assert found.jaccard == {"s": pytest.approx(129 / 159), "d": pytest.approx(201 / 231)}


def test_values_by_hand():
    found = compare_labels([["x", "x", "y", "y"]], [["x", "y", "y", "z"]])
    assert found.labels_b == ("x", "y", "z")
    assert found.table == ((1, 1, 0), (0, 1, 1))
    assert found.agreement == 0.5
    assert found.kappa == pytest.approx((0.5 - 0.375) / (1 - 0.375))  # chance: 1/2·1/4 + 1/2·1/2
    assert found.jaccard == {"x": 0.5, "y": pytest.approx(1 / 3)}
    assert found.nmi == pytest.approx(0.5 / 1.25)  # 1 bit and 1.5 bits, half a bit shared
    assert found.ari == pytest.approx((0 - 2 * 1 / 6) / (1.5 - 2 * 1 / 6))
    assert json.loads(json.dumps(found.to_dict()))["table"] == [[1, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize("labels", [[["x", "x"]], [["x"]], [["x", "y"], ["z", "w"]]])
def test_a_map_is_like_itself_even_where_it_says_nothing(labels):
    found = compare_labels(labels, labels)
    assert (found.agreement, found.kappa, found.nmi, found.ari) == (1, 1, 1, 1)


def test_one_label_against_another():
    found = compare_labels([["x", "x"]], [["y", "y"]])
    assert (found.kappa, found.nmi, found.ari) == (None, 1, 1)
    found = compare_labels([["x", "x", "x"]], [["x", "x", "y"]])
    assert (found.kappa, found.nmi, found.ari) == (0, 0, 0)


LABELS = st.lists(st.sampled_from("abc"), min_size=12, max_size=12)


def check_properties(compare, a, b, seed):
    """Symmetric; the same for any order of heads, and for other names; one for equal maps."""
    one = compare(table(a, 4), table(b, 4))
    other = compare(table(b, 4), table(a, 4))
    assert [list(row) for row in zip(*one.table, strict=True)] == [list(row) for row in other.table]
    for name in ("agreement", "kappa", "nmi", "ari"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-12)
    assert one.jaccard == pytest.approx(other.jaccard)
    order = random.Random(seed).sample(range(12), 12)
    moved = compare(table([a[i] for i in order], 4), table([b[i] for i in order], 4))
    assert close(moved, one)
    names = dict(zip("abc", random.Random(seed).sample("uvw", 3), strict=True))
    renamed = compare(table([names[x] for x in a], 4), table([names[x] for x in b], 4))
    for name in ("agreement", "kappa", "nmi", "ari"):
        assert getattr(one, name) == pytest.approx(getattr(renamed, name), abs=1e-12)
    apart = compare(table([names[x] for x in a], 4), table(b, 4))
    assert (apart.nmi, apart.ari) == (pytest.approx(one.nmi), pytest.approx(one.ari, abs=1e-12))
    same = compare(table(a, 4), table(a, 4))
    assert (same.agreement, same.kappa, same.nmi, same.ari) == (1, 1, pytest.approx(1), pytest.approx(1))
    assert set(same.jaccard.values()) == {1}


def close(x: Comparison, y: Comparison) -> bool:
    return (x.labels_a, x.labels_b, x.table) == (y.labels_a, y.labels_b, y.table)


@given(LABELS, LABELS, st.integers(0, 1000))
def test_what_holds_for_any_two_maps(a, b, seed):
    check_properties(compare_labels, a, b, seed)


def test_the_properties_find_planted_bugs():
    def by_heads_of_the_first(a, b):
        found = compare_labels(a, b)
        overlap = {name: value * found.table[0][0] for name, value in found.jaccard.items()}
        return Comparison(**{**vars(found), "jaccard": overlap})

    def nmi_by_the_first(a, b):
        found = compare_labels(a, b)
        counts = [sum(row) / 12 for row in found.table]
        return Comparison(**{**vars(found), "nmi": found.nmi * -sum(p * math.log(p) for p in counts)})

    def by_first_head(a, b):
        found = compare_labels(a, b)
        return Comparison(**{**vars(found), "kappa": float(a[0][0] == "a")})

    a, b = list("aaabbbbccccc"), list("abababcccabc")
    check_properties(compare_labels, a, b, 1)
    for wrong in (by_heads_of_the_first, nmi_by_the_first, by_first_head):
        with pytest.raises(AssertionError):
            check_properties(wrong, a, b, 1)


@given(LABELS, LABELS)
def test_kappa_and_ari_against_their_definitions_on_pairs(a, b):
    found = compare_labels(table(a, 4), table(b, 4))
    pairs = [(i, j) for i in range(12) for j in range(i)]
    same_a, same_b = ({(i, j) for i, j in pairs if x[i] == x[j]} for x in (a, b))
    expected = len(same_a) * len(same_b) / len(pairs)
    most = (len(same_a) + len(same_b)) / 2
    assume(most != expected)
    assert found.ari == pytest.approx((len(same_a & same_b) - expected) / (most - expected))
    by_chance = sum(x == y for x in a for y in b) / 144
    if found.kappa is not None and by_chance < 1:
        agree = sum(x == y for x, y in zip(a, b, strict=True)) / 12
        assert found.kappa == pytest.approx((agree - by_chance) / (1 - by_chance))


def test_many_tables_at_once():
    labels = torch.randint(3, (5, 2, 12), generator=torch.Generator().manual_seed(0))
    squares = cross_table(labels[:, 0], labels[:, 1], 3)
    for square, (a, b) in zip(squares, labels.tolist(), strict=True):
        one = compare_labels([[str(x) for x in a]], [[str(x) for x in b]])
        assert float(kappa(square)) == pytest.approx(one.kappa)
        assert {name: float(jaccard(square)[int(name)]) for name in one.jaccard} == pytest.approx(one.jaccard)
    torch.testing.assert_close(kappa(squares), torch.stack([kappa(square) for square in squares]))


def test_maps_are_compared_by_their_roles_with_all_numbers():
    a = RoleMap(((Local(1), Anchor(), Memory(1, 2, 3)), (Local(1), Anchor(), Memory(1, 2, 4))))
    b = RoleMap(((Local(1), Anchor(), Memory(1, 2, 3)), (Local(2), Anchor(), Memory(1, 2, 3))))
    found = compare_maps(a, b)
    assert found.labels_a == ("anchor1", "local1", "memory1+2+3", "memory1+2+4")
    assert found.agreement == pytest.approx(4 / 6)
    assert set(found.jaccard) == {"anchor1", "local1", "memory1+2+3"}


@pytest.mark.parametrize(
    ("a", "b"), [([["x", "x"]], [["x"], ["x"]]), ([["x"]], [["x", "x"]]), ([], []), ([[]], [[]])]
)
def test_maps_of_other_models_are_refused(a, b):
    with pytest.raises(RoleMapMismatchError, match="two maps of one model"):
        compare_labels(a, b)


def test_a_map_is_like_its_own_fitted_form():
    written = RoleMap(((Local(1), Memory(), Anchor()), (Memory(), Memory(), Local(2))))
    fitted = written.fit(2, 3, 21, 3)
    assert compare_maps(written, fitted).agreement < 1  # nothing says for which window
    known = dataclasses.replace(fitted, origin=origin(21))
    for a, b in itertools.permutations((written, known)):
        assert compare_maps(a, b).agreement == 1
    open_ended = dataclasses.replace(written, origin=origin(21))
    assert compare_maps(open_ended, fitted).agreement == 1
    other = dataclasses.replace(written.fit(2, 3, 12, 3), origin=origin(12))
    assert compare_maps(open_ended, dataclasses.replace(written, origin=origin(12))).agreement == 1
    assert compare_maps(open_ended, other).agreement < 1  # contradicting: as they are written


def test_a_role_that_does_not_fit_the_window_of_the_other():
    small = RoleMap(((Local(1), Memory()),), origin=origin(12, 1, 2))
    with pytest.raises(WindowError):
        compare_maps(small, RoleMap(((Local(1), Memory(3, 12, 3)),)))
    with pytest.raises(RoleMapMismatchError):
        compare_maps(small, RoleMap.uniform(Local(), 2, 1))


def origin(window, layers=2, heads=3):
    facts = {"layers": layers, "heads": heads, "head_dim": 4, "window": window, "chunk": 3}
    return Origin(model=ModelFacts(**facts, model_class="Model"))


def test_role_maps_of_other_models_are_refused():
    with pytest.raises(RoleMapMismatchError, match="1 layers x 2 heads with 2 layers x 1 heads"):
        compare_maps(RoleMap.uniform(Local(), 1, 2), RoleMap.uniform(Local(), 2, 1))
