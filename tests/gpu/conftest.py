"""The simulated devices, as fixtures; every test that takes one runs on both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu import simulated as gpu


@pytest.fixture
def simulation() -> Iterator[gpu.Simulation]:
    """Runs a test inside the simulation; without a compiler it is skipped."""
    if reason := gpu.missing():
        pytest.skip(reason)
    with gpu.simulated() as running, torch.no_grad():
        yield running


@pytest.fixture(params=gpu.DEVICES, ids=str)
def device(request: pytest.FixtureRequest, simulation: gpu.Simulation) -> torch.device:
    """The current device, and the other one."""
    found: torch.device = request.param
    return found
