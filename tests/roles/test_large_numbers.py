"""Numbers that are too large: a role works as if it were large enough, or one error says what is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import headforcing as hf
from headforcing import roles as every
from headforcing.errors import HeadForcingError, RoleMapError
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.roles.base import reads_phase
from headforcing.roles.episodic import Uniform
from headforcing.roles.maps.file import encode_role
from headforcing.roles.maps.role_map import RoleMap
from headforcing.roles.maps.strict_json import pretty
from headforcing.stores import KVStore, store_class
from headforcing.stores.rotated import RotatedBank
from headforcing.types import Chunk, Heads
from tests.examples import examples
from tests.hosts.rig import Rig
from tests.planted import with_banks
from tests.strategies import GRID, frame_tensor, kinds, queries

LARGE = (10**9, 10**20)
ENOUGH = {10**9: 64, 10**20: 64**3}
"""More than any number that a short video can reach."""
WINDOW, CHUNK, CHUNKS = 12, 4, 5
MOST = 1 << 24
"""Bytes that a test may ask for at once."""


class Small(TorchFunctionMode):
    """Fails where much memory is asked for, before it is allocated."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.arange):
            asked = function(*args, **{**given, "device": "meta"})
            assert asked.nbytes <= MOST, f"{function.__name__} of {asked.nbytes} bytes"
        return function(*args, **given)


def usual() -> list[HeadRole]:
    """Every built-in role with numbers that fit the demo model."""
    kinds = [getattr(every, name) for name in every.__all__ if name != "HeadRole"]
    needed = {every.SlidingWindow: {"window": 8}, every.Rolling: {"window": 8}, every.Dynamic: {"pieces": 4}}
    needed |= {every.Dilated: {"window": 8, "dilation": 2}}
    needed |= {every.Memory: {"update": Uniform()}}
    return [kind(**needed.get(kind, {})) for kind in kinds]


SINGLE = [(role, name, number) for role in usual() for name in role._counts() for number in LARGE]


def from_file(role: HeadRole, numbers: dict[str, int]) -> HeadRole:
    """The role with some numbers replaced, as it is read from a file."""
    entries = {**encode_role(role), **numbers}
    document = {"format": "headforcing.role-map", "version": 2, "roles": {"a": entries}, "layers": [["a"]]}
    return RoleMap.from_json(pretty(document)).layers[0][0]


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(window=21, layers=1, heads=1)


@pytest.mark.parametrize(
    ("role", "name", "number"),
    [
        pytest.param(*single, marks=() if index % 4 in (0, 3) else pytest.mark.slow)
        for index, single in enumerate(SINGLE)  # in the fast run the two numbers take turns
    ],
    ids=str,
)
def test_a_number_may_be_too_large_for_any_model(rig: Rig, role: HeadRole, name: str, number: int) -> None:
    """From a file and on a model: apply and the first chunks work, or say which role is too large."""
    for scheme in ({}, {"positions": "absolute"}):
        said = str(number)
        try:
            with Small():
                large = from_file(role, {name: number, **scheme})
                assert getattr(large, name) == number
                hf.apply_head_forcing(rig.model, large, replace=True)
                rig.video(rig.caches(), 2)
        except HeadForcingError as error:
            said = str(error)
        assert str(number) in said


@st.composite
def too_large(draw: Any) -> tuple[HeadRole, dict[str, int]]:
    """A role that fits, and large numbers for some of its fields."""
    role = draw(st.one_of(*kinds(WINDOW, CHUNK).values()))
    names = draw(st.sets(st.sampled_from(role._counts()), min_size=1))
    return role, {name: draw(st.sampled_from(LARGE)) for name in sorted(names)}


def views(role: HeadRole, store: type[KVStore], window: int = WINDOW) -> list[Any]:
    """All that the heads of a role see in a video of a few chunks."""
    role = role.fit(window, CHUNK)
    held, seen = store({role: Heads((0,), 1)}, window=window, layer=0), []
    for start in range(0, CHUNKS * CHUNK, CHUNK):
        frames = range(start, start + CHUNK)
        q, k, v = (frame_tensor(frames, seed, 1, 1, GRID[0] * GRID[1]) for seed in (1, 2, 3))
        held.write(Chunk(start, k, v, GRID, q))
        for phase in ("denoise", "clean") if reads_phase(role) else ("denoise",):
            for query in queries(role, frames):
                view = held.view(role, phase, encode, query)
                tokens = held.view_compressed(role, encode, query)
                seen.append((view.frames, view.positions, view.k.clone(), view.v.clone()))
                seen.append(None if tokens is None else tuple(x.clone() for x in tokens))
    return seen


def encode(x: torch.Tensor, positions: Any, patch: int = 1) -> torch.Tensor:
    """Stands for RoPE: exact, and different for every position."""
    return x + 1000.0 * torch.tensor(positions, dtype=x.dtype)[:, None, None, None]


def check_like_enough(
    role: HeadRole, numbers: dict[str, int], store: type[KVStore], window: int = WINDOW
) -> None:
    """With large numbers, a role sees what it sees with numbers that are large enough, or says why not."""
    try:
        large = dataclasses.replace(role, **numbers)
        with Small():
            found = views(large, store, window)
    except HeadForcingError:
        return
    enough = {name: ENOUGH[number] for name, number in numbers.items()}
    wanted = views(dataclasses.replace(role, **enough), store, window)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("store", ["ring", "lean", "reference"])
def test_a_number_that_is_never_reached_is_any_such_number(store: str) -> None:
    @given(too_large())
    @settings(max_examples=examples(25, nightly=600))
    def check(case: tuple[HeadRole, dict[str, int]]) -> None:
        check_like_enough(*case, store_class(store))

    check()


class AllAtOnce(RotatedBank):
    """Planted bug: buffers for all that a role may ever keep."""

    def wanted(self, k: torch.Tensor, v: torch.Tensor) -> int:
        return (self.role.capacity(k.shape[1]) or 0) + k.shape[1]


class AllInFront(RotatedBank):
    """Planted bug: room for all compressed tokens there may ever be."""

    def _most_tokens(self, patches: int) -> int | None:
        return None if self.compressed is None else self.compressed.max_tokens(patches)


@pytest.mark.parametrize(
    ("bank", "role", "numbers"),
    [
        (AllAtOnce, SlidingWindow(8, positions="absolute"), {"window": 10**9}),
        (AllAtOnce, SlidingWindow(8, positions="absolute"), {"window": 10**20}),
        (AllAtOnce, every.Wave(near=9, far=WINDOW), {"cap": 10**9}),
        (AllInFront, every.Veil(), {"blocks": 10**9, "far": 10**20}),
    ],
    ids=str,
)
def test_the_test_catches_memory_that_is_reserved(
    bank: type[RotatedBank], role: HeadRole, numbers: dict[str, int]
) -> None:
    window = max(WINDOW, numbers.get("far", 0))
    check_like_enough(role, numbers, RotatedStore, window)
    with pytest.raises((AssertionError, RuntimeError, TypeError, OverflowError)):
        check_like_enough(role, numbers, with_banks(bank), window)


RotatedStore = with_banks(RotatedBank)


def test_a_window_may_be_too_large_as_well() -> None:
    """Roles that take the rest of the window, and those that it bounds."""
    rest = every.Memory(), every.Participating(10**9, 10, 4, 10**8), every.Averaging(10**9)
    for role in rest:
        with Small():
            views(role, store_class("ring"), window=10**10)


def test_numbers_of_too_many_digits_are_refused_in_files() -> None:
    with pytest.raises(RoleMapError, match="not strict JSON"):
        RoleMap.from_json(
            '{"format": "headforcing.role-map", "version": 2, "layers": [["a"]], '
            f'"roles": {{"a": {{"type": "Local", "recent": {"9" * 5000}}}}}}}'
        )
