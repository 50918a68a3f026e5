"""What the shipped weights and role map are for, with wide margins: two videos, eleven trained lengths."""

from __future__ import annotations

import hashlib
from importlib import resources

import pytest

from headforcing.demo import demo_model, demo_roles
from headforcing.demo.compare import GIVEN_CHUNKS, Policy, make_scene, roll, summarise
from headforcing.roles import Local

SEEDS, CHUNKS = (0, 1), 80


@pytest.fixture(scope="module")
def model():
    return demo_model()


def late_psnr(model, policy: Policy, camera: str) -> float:
    scene = make_scene(SEEDS, CHUNKS, camera=camera)
    made = roll(model, policy, scene, CHUNKS, seeds=SEEDS, given_chunks=GIVEN_CHUNKS[camera])
    return float(summarise(made.psnr, 210, 240).mean())


def test_the_role_map_names_the_weights_it_was_measured_on():
    weights = resources.files("headforcing.demo") / "weights.safetensors"
    assert demo_roles().origin.notes["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert demo_roles().shape == (6, 4)


@pytest.mark.parametrize("camera", ["still", "pan"])
def test_the_own_window_drifts_and_head_forcing_does_not(model, camera):
    own = late_psnr(model, Policy("own window"), camera)
    forced = late_psnr(model, Policy("Head Forcing", demo_roles()), camera)
    assert own < 28
    assert forced > own + 6
    assert forced > 29


def test_heads_that_all_forget_drift_like_the_window(model):
    assert late_psnr(model, Policy("all local", Local(3)), "still") < 27
