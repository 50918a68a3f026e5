"""Every video on a device equals that on the CPU, whatever the current device is."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from headforcing.adapters.base import find_adapter
from headforcing.roles import Anchor, HeadRole, Local, Memory
from headforcing.roles.episodic import Uniform
from tests.gpu.simulated import DEVICES, Simulation
from tests.gpu.videos import Roles, Video, elsewhere
from tests.hosts import find_host, host_names

MIXED = [Anchor(1), Local(1), Memory(1, 2, 2)]
"""Roles of three kinds."""
BY_NUMBER = {"anyflow_far": [*MIXED[:2], Memory(1, 2, 2, Uniform())]}
"""For base models whose roles cannot choose by content."""


def roles_of(name: str) -> list[list[HeadRole]]:
    """In every layer other heads have another role."""
    model = (host := find_host(name)).model()
    adapter = host.adapter or find_adapter(model)
    heads = [adapter.heads(module)[0] for _, module in adapter.attentions(model)]
    mixed = BY_NUMBER.get(name, MIXED)
    return [[mixed[(head + layer) % 3] for head in range(count)] for layer, count in enumerate(heads)]


def made(name: str, roles: Roles, device: torch.device | str, chunks: int, **how: Any) -> list[Tensor]:
    """Two videos, the second one on the caches of the first."""
    video = Video(find_host(name), roles, device, **how)
    first = video.chunks(range(chunks))
    video.new_video()
    return [*first, *video.chunks(range(2), draws=(20,))]


def check_equals_the_cpu(name: str, roles: Roles, device: torch.device, chunks: int = 4, **how: Any) -> None:
    with Simulation.off():
        expected = made(name, roles, "cpu", chunks, **how)
    assert all(map(torch.equal, made(name, roles, device, chunks, **how), expected))


FAST = ("self_forcing",)
"""The others in the long run."""


@elsewhere
@pytest.mark.parametrize("store", ["ring", pytest.param("lean", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in host_names()]
)
def test_a_video_equals_that_on_the_cpu(
    simulation: Simulation, name: str, device: torch.device, store: str
) -> None:
    if reason := find_host(name).missing():
        pytest.skip(reason)
    with Simulation.off():
        roles = roles_of(name)
    check_equals_the_cpu(name, roles, device, store=store)


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_that_is_launched_on_the_current_device_is_found(
    simulation: Simulation, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake that was made: it works as long as the model is on the current device."""
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(device=contextlib.nullcontext))
    with contextlib.nullcontext() if index == 0 else pytest.raises(RuntimeError, match="launched on cuda:0"):
        check_equals_the_cpu("self_forcing", Local(1), DEVICES[index], chunks=1)
