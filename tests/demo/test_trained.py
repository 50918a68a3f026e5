"""What the shipped weights and role map are for, with wide margins, on two videos of up to 252 frames."""

from __future__ import annotations

import hashlib
import warnings
from importlib.resources import files
from pathlib import Path

import pytest

from headforcing.adapters.base import find_adapter
from headforcing.apply import apply_head_forcing
from headforcing.demo import demo_model, demo_roles, demo_stability
from headforcing.demo.contest.compare import GIVEN_CHUNKS, Policy, make_scene, roll, summarise
from headforcing.demo.world.camera import CHUNK
from headforcing.roles import HeadRole, Local
from headforcing.roles.maps.fingerprint import fingerprint

SEEDS = 0, 1
ROOT = Path(__file__).parents[2]


def slow(*values):
    """The same at length."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def model():
    return demo_model()


def late(model, policy: Policy, camera: str, chunks: int) -> tuple[float, float]:
    """Over the last ten chunks: the town against the true one, in dB, and the landmarks that are right."""
    scene = make_scene(SEEDS, chunks, camera=camera)
    made = roll(model, policy, scene, chunks, seeds=SEEDS, given_chunks=GIVEN_CHUNKS[camera])
    span = CHUNK * (chunks - 10), CHUNK * chunks
    return float(summarise(made.psnr, *span).mean()), float(summarise(made.landmarks, *span).nanmean())


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("autoencoder", "586d580cf26c0920ee47210705afebf5da4c17a6c61ab3e2e38ce7023808b169"),
        ("weights", "91e4b7b14ec078e7e0c30617b3f33b1d512127aac6adb010cc67db43eee32c08"),
    ],
)
def test_the_weights_are_those_that_were_judged(name, digest):
    path = files("headforcing.demo") / f"{name}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert f"`{digest[:12]}…`" in (ROOT / "docs" / "demo.md").read_text("utf-8")


def test_the_role_map_names_the_weights_it_was_measured_on(model):
    roles = demo_roles()
    assert roles.shape == (6, 6)
    assert roles.origin.model.fingerprint == fingerprint(model, find_adapter(model))
    with warnings.catch_warnings(), apply_head_forcing(model, roles, strict=True):
        warnings.simplefilter("error")
    assert roles.origin.measurement.profile is not None


def test_the_stability_report_is_of_this_map():
    roles, report = demo_roles(), demo_stability()
    assert dict(roles.origin.stability) == report.summary()
    assert report.method == roles.origin.measurement.method
    of_label: dict[str, set[HeadRole]] = {}
    for labels, row in zip(report.labels, roles.layers, strict=True):
        for label, role in zip(labels, row, strict=True):
            of_label.setdefault(label, set()).add(role)
    assert all(len(found) == 1 for found in of_label.values())
    assert len(of_label) == len(roles.counts())


@pytest.mark.parametrize(("camera", "chunks"), [("pan", 30), slow("still", 84), slow("pan", 84)])
def test_the_own_window_forgets_the_town_and_head_forcing_does_not(model, camera, chunks):
    own, ghosts = late(model, Policy("own window"), camera, chunks)
    forced, right = late(model, Policy("Head Forcing", demo_roles()), camera, chunks)
    assert own < 24
    assert forced > own + 5
    assert forced > 25
    assert ghosts < 0.4
    assert right > 0.75


@pytest.mark.parametrize("chunks", [30, slow(84)])
def test_heads_that_all_forget_drift_like_the_window(model, chunks):
    assert late(model, Policy("all local", Local(3)), "pan", chunks)[0] < 20
