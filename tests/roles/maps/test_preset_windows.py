"""Presets follow the window of the model: they fit it, store no more of it than published, or refuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import headforcing as hf
from headforcing.errors import HeadForcingError, WindowError
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.measure.memory import steady
from headforcing.roles import (
    Anchor,
    Averaging,
    Dynamic,
    Full,
    HeadRole,
    Local,
    Memory,
    Participating,
    SlidingWindow,
    Strided,
    Veil,
    Wave,
)
from headforcing.roles.base import bounded
from headforcing.roles.maps.importers import import_roles
from headforcing.roles.maps.preset import Preset
from headforcing.roles.maps.presets import PRESETS, dummy_forcing, pyramid_forcing, scaled
from headforcing.roles.maps.role_map import RoleMap
from tests.examples import examples
from tests.hosts.rig import Rig

WINDOWS, CHUNKS = range(6, 43), range(1, 8)
PUBLISHED: dict[str, dict[str, HeadRole]] = {
    "full": {"all": Full(positions="absolute")},
    "sliding_window": {"all": SlidingWindow(21, 0, positions="compact")},
    "streaming_llm": {"all": SlidingWindow(21, 3, positions="compact")},
    "infinity_rope": {"all": SlidingWindow(6, 1, positions="compact")},
    "memrope": {"all": Averaging(12, 3, 0.01, 0.1)},
    "deep_forcing": {"all": Participating(21, 10, 4, 2)},
    "head_forcing": {
        "anchor": Anchor(1, 0, positions="clamped"),
        "local": Local(1, 0, positions="compact"),
        "memory": Memory(1, None, None, positions="compact"),
    },
    "pyramid_forcing": {
        "wave": Wave(1, 1, 18, 21, 6, 4),
        "anchor": Strided(3, 1, 18, 21, 6, 4),
        "veil": Veil(3, 1, 18, 21, 4, 4, 2),
    },
    "dummy_forcing": {
        "sink": Anchor(1, 0, positions="absolute"),
        "neighbour": Local(3, 0, positions="absolute"),
        "dummy": Local(1, 0, positions="absolute"),
    },
    "forcing_kv": {
        "static": Local(1, 1, positions="absolute"),
        "dynamic": Dynamic(1, 6, 2, positions="absolute"),
    },
}
TOO_SMALL = {"memrope": range(6, 12), "pyramid_forcing": range(6, 8)}
"""Windows that are too small for a preset, with chunks of 3."""
FOLLOWING = ("sliding_window", "streaming_llm", "deep_forcing", "head_forcing", "pyramid_forcing")
"""Presets with numbers that are tied to the window."""


def fitted(preset: Preset, window: int, chunk: int) -> Mapping[str, HeadRole] | None:
    """Its roles with every number filled in, or `None` if it refuses."""
    try:
        return {label: role.fit(window, chunk) for label, role in preset.roles(window, chunk).items()}
    except WindowError as error:
        said = str(error)
    assert str(chunk) in said
    assert str(window) in said or "at least" in said
    return None


def numbers_of(roles: Mapping[str, HeadRole]) -> dict[str, int]:
    """Every number of frames, by label and field."""
    return {
        f"{label}.{name}": getattr(role, name) for label, role in roles.items() for name in role._counts()
    }


def most_stored(role: HeadRole, window: int, chunk: int) -> int:
    """Whole frames that a head may store, current chunk included."""
    if isinstance(role, Wave):
        return math.ceil(Fraction(26, 21) * window) + chunk
    return window


def check_fits(preset: Preset, window: int, chunk: int) -> None:
    """Roles are within the window, and store no more of it than at the published window."""
    roles = fitted(preset, window, chunk)
    for role in () if roles is None or preset.name == "full" else roles.values():
        kept = role.capacity(chunk)
        assert kept is not None
        assert kept + chunk <= most_stored(role, window, chunk), role
        assert getattr(role, "far", 0) <= window
        if bounded(role):
            assert max(role.positions_of(range(kept + chunk), chunk, window)) < window


def check_counts(preset: Preset, window: int, chunk: int) -> None:
    """The same on a real store: what a query attends to, and compressed tokens."""
    roles = fitted(preset, window, chunk)
    for role in () if roles is None or preset.name == "full" else roles.values():
        found = steady(role, window, chunk)
        assert found is not None
        assert found.most <= window, role
        beside = 0 if role.compressed() is None else chunk
        assert found.stored <= most_stored(role, window, chunk) + beside, role


def check_monotone(preset: Preset) -> None:
    """No number is larger at a smaller window, and the share of the window is the published one."""
    published = numbers_of(preset.roles(21, 3))
    for number, before in published.items():
        steps = [numbers_of(preset.roles(w, 1))[number] for w in WINDOWS if fitted(preset, w, 1)]
        known = [step for step in steps if step is not None]
        assert known == sorted(known), number
        assert (before is None) == (not known)
    for window in WINDOWS:
        if fitted(preset, window, 3):
            now = numbers_of(preset.roles(window, 3))
            for number, before in published.items():
                if before is not None and now[number] != before:
                    assert now[number] == max(1, before * window // 21), number


def check_published(preset: Preset) -> None:
    """At the published window it is what is published."""
    roles = preset.roles(21, 3)
    assert {label: repr(role) for label, role in roles.items()} == {
        label: repr(role) for label, role in PUBLISHED[preset.name].items()
    }
    assert dict(roles) == PUBLISHED[preset.name]


def check_refused(preset: Preset) -> None:
    """With chunks of 3 it refuses the windows that are known to be too small, and no other."""
    refused = {window for window in WINDOWS if fitted(preset, window, 3) is None}
    assert refused == set(TOO_SMALL.get(preset.name, ()))


def check_all(preset: Preset) -> None:
    check_published(preset)
    check_refused(preset)
    check_monotone(preset)
    for window in WINDOWS:
        for chunk in CHUNKS:
            if chunk <= window:
                check_fits(preset, window, chunk)
    for window in (6, 8, 11, 12, 16, 24, 42):
        check_counts(preset, window, 3)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_follows_the_window(name: str) -> None:
    check_all(PRESETS[name])


@settings(max_examples=examples(40))
@given(st.sampled_from([*PRESETS.values()]), st.sampled_from(WINDOWS), st.sampled_from(CHUNKS))
def test_what_is_attended_to_is_within_any_window(preset: Preset, window: int, chunk: int) -> None:
    if chunk <= window:
        check_counts(preset, window, chunk)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_rule(number: int, window: int, other: int) -> None:
    assert scaled(number, 21) == number
    assert scaled(21, window) == window
    assert 1 <= scaled(number, window) <= max(1, Fraction(number * window, 21))
    assert scaled(number, window) > Fraction(number * window, 21) - 1
    assert (window <= other) <= (scaled(number, window) <= scaled(number, other))


@pytest.mark.parametrize("name", FOLLOWING)
def test_presets_that_follow_the_window_differ_from_window_to_window(name: str) -> None:
    assert fitted(PRESETS[name], 12, 3) != fitted(PRESETS[name], 21, 3)
    assert {name for name in PRESETS if fitted(PRESETS[name], 12, 3) != fitted(PRESETS[name], 42, 3)} == set(
        FOLLOWING
    )


# On a model ---------------------------------------------------------------------------------------


class Noting(SelfForcing):
    """Notes the positions that anything is rotated to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[float] = set()

    def rotate(self, x, call, positions, patch=1):  # type: ignore[no-untyped-def]
        self.seen.update(positions)
        return super().rotate(x, call, positions, patch)


def table_of(name: str, window: int) -> RoleMap:
    """Every label of a preset in the one layer of a model."""
    preset = PRESETS[name]
    if not (names := preset.labels_needed()):
        return preset.uniform(1, 4, window, 3)
    return preset.labelled([[names[head % len(names)] for head in range(4)]], window, 3)


@pytest.mark.parametrize("window", [6, 9, 12, 24, 42])
@pytest.mark.parametrize("name", PRESETS)
def test_a_model_runs_through_eviction(name: str, window: int) -> None:
    rig, adapter = Rig(window, layers=1, grid=(6, 6)), Noting()
    if window in TOO_SMALL.get(name, ()):
        with pytest.raises(WindowError, match=str(window)):
            hf.apply_head_forcing(rig.model, table_of(name, window))
        return
    roles = table_of(name, window)
    handle = hf.apply_head_forcing(rig.model, roles, adapter=adapter)
    held = rig.stored(handle, rig.caches(), 2 * window // 3 + 12)
    assert name == "full" or max(held) == max(held[: 2 * len(held) // 3])
    if all(map(bounded, roles.counts())):
        assert max(adapter.seen) < window
    if name == "pyramid_forcing":
        assert max(adapter.seen) < window + 3
    assert min(adapter.seen) >= 0


def test_a_map_for_a_larger_window_is_refused_and_one_for_a_smaller_is_not() -> None:
    labels = [["wave", "anchor", "veil", "wave"]] * 2
    rig = Rig(12)
    with pytest.raises(WindowError, match=r"distance of 21, but .* 12 frames.*window=12"):
        hf.apply_head_forcing(rig.model, pyramid_forcing(labels))
    handle = hf.apply_head_forcing(rig.model, pyramid_forcing(labels, window=12))
    assert max(rig.stored(handle, rig.caches(), 12)) > 0
    handle.remove()
    assert pyramid_forcing(labels, 12).fit(2, 4, 21, 3) == pyramid_forcing(labels, 12)


def test_published_labels_are_imported_for_a_window(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "labels.csv").write_text("-1,1,2\n")
    found = import_roles(tmp_path / "labels.csv", "pyramid_forcing", window=12)
    assert found == pyramid_forcing([["wave", "anchor", "veil"]], 12)
    assert import_roles(tmp_path / "labels.csv", "pyramid_forcing") == pyramid_forcing(found.labels)
    with pytest.raises(WindowError, match=r"8 frames with a chunk of 3.* 6: use"):
        import_roles(tmp_path / "labels.csv", "pyramid_forcing", window=6)


def test_more_chunks_of_dummy_forcing_need_a_larger_window() -> None:
    with pytest.raises(WindowError, match=r"12 frames with a chunk of 4, but .* 9: use"):
        dummy_forcing([["sink"]], 4, window=9, context=2)
    found = dummy_forcing([["neighbour"]], 4, window=12, context=2)
    assert found.layers == ((Local(8, positions="absolute"),),)


# Planted bugs -------------------------------------------------------------------------------------


def _pyramid(**change: int) -> object:
    def roles(window: int, chunk: int) -> Mapping[str, HeadRole]:
        found = PRESETS["pyramid_forcing"].roles(window, chunk)
        return {
            label: dataclasses.replace(role, **{n: v for n, v in change.items() if n in role._counts()})
            for label, role in found.items()
        }

    return roles


def _other_deep(rounded):  # type: ignore[no-untyped-def]
    def roles(window: int, chunk: int) -> Mapping[str, HeadRole]:
        return {"all": Participating(window, *(rounded(part * window / 21) for part in (10, 4, 2)))}

    return roles


BUGS = [
    ("pyramid_forcing", _pyramid(cap=4)),
    ("pyramid_forcing", _pyramid(near=18, far=21)),
    ("pyramid_forcing", _pyramid(block=4)),
    ("pyramid_forcing", _pyramid(cap=5)),
    ("deep_forcing", _other_deep(math.ceil)),
    ("deep_forcing", _other_deep(lambda part: 1 + int(part))),
    ("streaming_llm", lambda window, chunk: {"all": SlidingWindow(21, sink=chunk)}),
    ("streaming_llm", lambda window, chunk: {"all": SlidingWindow(42 - window, sink=chunk)}),
    ("memrope", lambda window, chunk: {"all": Averaging(scaled(12, window))}),
    ("infinity_rope", lambda window, chunk: {"all": SlidingWindow(scaled(6, window), sink=1)}),
    ("dummy_forcing", lambda window, chunk: PRESETS["dummy_forcing"].roles(42, 3 + (window < 8))),
    ("forcing_kv", lambda window, chunk: {**PUBLISHED["forcing_kv"], "static": Local(window)}),
]


@pytest.mark.parametrize(("name", "roles"), BUGS)
def test_planted_bugs_are_found(name: str, roles: object) -> None:
    with pytest.raises((AssertionError, HeadForcingError)):
        check_all(dataclasses.replace(PRESETS[name], roles=roles))
