"""What the shipped weights and role map are for, with wide margins, on two videos of up to 240 frames."""

from __future__ import annotations

import warnings

import pytest

from headforcing.adapters.base import find_adapter
from headforcing.apply import apply_head_forcing
from headforcing.demo import demo_model, demo_roles, demo_stability
from headforcing.demo.contest.compare import GIVEN_CHUNKS, Policy, make_scene, roll, summarise
from headforcing.demo.world.camera import CHUNK
from headforcing.roles import HeadRole, Local
from headforcing.roles.maps.fingerprint import fingerprint

SEEDS = 0, 1


def slow(*values):
    """The same at length."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def model():
    return demo_model()


def late_psnr(model, policy: Policy, camera: str, chunks: int) -> float:
    """Of what is made against the true world, over the last ten chunks, in dB."""
    scene = make_scene(SEEDS, chunks, camera=camera)
    made = roll(model, policy, scene, chunks, seeds=SEEDS, given_chunks=GIVEN_CHUNKS[camera])
    return float(summarise(made.psnr, CHUNK * (chunks - 10), CHUNK * chunks).mean())


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


@pytest.mark.parametrize(("camera", "chunks"), [("pan", 30), slow("still", 80), slow("pan", 80)])
def test_the_own_window_drifts_and_head_forcing_does_not(model, camera, chunks):
    own = late_psnr(model, Policy("own window"), camera, chunks)
    forced = late_psnr(model, Policy("Head Forcing", demo_roles()), camera, chunks)
    assert own < 28
    assert forced > own + 6
    assert forced > 29


@pytest.mark.parametrize("chunks", [30, slow(80)])
def test_heads_that_all_forget_drift_like_the_window(model, chunks):
    assert late_psnr(model, Policy("all local", Local(3)), "still", chunks) < 27
