"""Role-map files of earlier versions: those in `v1/` were written by 0.1.0, and mean what they meant."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from headforcing import RoleMap
from headforcing.errors import RoleMapError
from headforcing.roles import HeadRole
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.episodic import ThresholdFifo, Uniform
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.head_forcing import Anchor, Local, Memory
from headforcing.roles.maps.origin import Measurement, ModelFacts, Origin
from headforcing.roles.maps.presets import PRESETS, commit_forcing
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from headforcing.roles.rolling_forcing import Rolling
from headforcing.roles.windows import Full, SlidingWindow

FILES = Path(__file__).parent / "v1"
EVERY: tuple[HeadRole, ...] = (
    Full(),
    SlidingWindow(9, 2, positions="absolute"),
    Local(2, 1, positions="adjoining"),
    Anchor(3, 1),
    Memory(2, 4, 5, ThresholdFifo(0.5)),
    Memory(1, 3, 2, Uniform(), positions="absolute"),
    Memory(),
    Wave(1, 2, period=4, cap=3),
    Strided(2, 1, near=12, far=15),
    Veil(2, 2, blocks=2, block=3, patch=1),
    Averaging(9, 2, 0.5, 0.25),
    Participating(15, 4, 5, 1),
    Dynamic(2, 4, 1, positions="compact"),
    Rolling(12, 2),
)


def of_preset(name: str) -> RoleMap:
    """Two layers of four heads, labels in turn."""
    preset = PRESETS[name]
    if not (needed := preset.labels_needed()):
        return preset.uniform(2, 4, 21, 3)
    row = [needed[head % len(needed)] for head in range(4)]
    return preset.labelled([row, row[::-1]])


def every_role() -> RoleMap:
    """A layer of every class of roles, and one of the same with clean windows."""
    cut = tuple(dataclasses.replace(role, clean_window=6 + i % 3) for i, role in enumerate(EVERY))
    origin = Origin(
        model=ModelFacts(layers=2, heads=len(EVERY), head_dim=8, window=21, chunk=3, model_class="M"),
        measurement=Measurement(method="m", settings={"a": 0.5}, seeds=(1,), library="0.1.0"),
        stability={"kappa": 0.75},
        notes={"by": "ü"},
    )
    return RoleMap((EVERY, cut), origin)


EXPECTED = {
    **{name: of_preset(name) for name in PRESETS},
    "every_role": every_role(),
    "commit_forcing": commit_forcing(
        PRESETS["head_forcing"].labelled([["anchor", "local", "memory", "memory"]] * 2), 6
    ),
}


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FILES / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", sorted(path.stem for path in FILES.glob("*.json")))
def test_a_file_of_version_1_means_what_it_meant(name: str, tmp_path: Path) -> None:
    found, expected = RoleMap.load(FILES / f"{name}.json"), EXPECTED[name]
    assert read(name)["version"] == 1
    assert found == expected
    assert found.origin == expected.origin
    assert [list(row) for row in found.labels] == read(name)["layers"]
    found.save(tmp_path / "roles.json")
    assert json.loads((tmp_path / "roles.json").read_text())["version"] == 2
    again = RoleMap.load(tmp_path / "roles.json")
    assert (again, again.labels, again.origin) == (found, found.labels, found.origin)


def test_no_file_is_missing() -> None:
    assert {path.stem for path in FILES.glob("*.json")} == set(EXPECTED)


INNER = {"type": "Local", "recent": 6}
AROUND = {"type": "CommitForcing", "positions": "compact", "window": 6, "role": INNER}


def document(role: dict[str, Any], version: int = 1) -> str:
    return json.dumps(
        {"format": "headforcing.role-map", "version": version, "roles": {"a": role}, "layers": [["a"]]}
    )


def test_a_role_around_another_is_its_clean_window() -> None:
    for around in (AROUND, {key: value for key, value in AROUND.items() if key != "positions"}):
        assert RoleMap.from_json(document(around)).layers == ((Local(6, clean_window=6),),)


@pytest.mark.parametrize(
    "role",
    [
        {**AROUND, "role": AROUND},
        {**AROUND, "role": "local"},
        {**AROUND, "role": {**INNER, "clean_window": 3}},
        {**AROUND, "role": {"type": "Locl"}},
        {**AROUND, "window": -1},
        {**AROUND, "window": None},
        {**AROUND, "window": True},
        {**AROUND, "positions": "absolute"},
        {**AROUND, "sink": 1},
        {"type": "CommitForcing", "window": 6},
        {"type": "CommitForcing", "role": INNER},
        {**INNER, "clean_window": 6},
        {**INNER, "clean_window": None},
        {**INNER, "role": INNER},
    ],
    ids=str,
)
def test_what_version_1_did_not_allow_is_refused(role: dict[str, Any]) -> None:
    with pytest.raises(RoleMapError, match="here: /roles/a"):
        RoleMap.from_json(document(role), "here")


def test_version_2_has_no_role_around_another() -> None:
    with pytest.raises(RoleMapError, match="/roles/a"):
        RoleMap.from_json(document(AROUND, 2))
    assert RoleMap.from_json(document({**INNER, "clean_window": 6}, 2)).layers[0][0].clean_window == 6


@pytest.mark.parametrize("version", [3, 99])
def test_a_later_version_is_refused_with_what_to_do(version: int) -> None:
    with pytest.raises(RoleMapError, match=f"here: .*{version}.* a newer file requires a newer headforcing"):
        RoleMap.from_json(document(INNER, version), "here")
