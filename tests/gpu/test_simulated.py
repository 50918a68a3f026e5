"""The simulated device refuses what a real one refuses, and tells where the host waits."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.simulated import DEVICES, Simulation


def test_it_computes_what_the_cpu_computes(simulation: Simulation, device: torch.device) -> None:
    x = torch.randn(4, 6)
    up = x.to(device)
    assert up.device == device
    found = (up[1:] @ up.mT).softmax(-1).index_select(1, torch.tensor([2, 0], device=device))
    assert found.device == device
    assert torch.equal(found.cpu(), (x[1:] @ x.mT).softmax(-1)[:, [2, 0]])
    up[:, 2:4].zero_()
    assert up[:, 1:5].cpu()[:, 1:3].eq(0).all(), "views share memory"


def test_devices_do_not_mix(device: torch.device) -> None:
    x = torch.zeros(3, device=device)
    other = next(one for one in DEVICES if one != device)
    for wrong in (torch.zeros(3), torch.zeros(3, device=other)):
        with pytest.raises(RuntimeError, match="same device"):
            x + wrong
    assert (x + torch.tensor(1.0)).device == device, "a number may lie on the CPU"
    assert x.to(other).device == other


def test_nothing_runs_after_a_gather_out_of_range(device: torch.device) -> None:
    x = torch.zeros(3, device=device)
    with pytest.raises(RuntimeError, match="device-side assert"):
        x.gather(0, torch.full((1,), 3, device=device))
    with pytest.raises(RuntimeError, match="earlier"):
        x + 1


def test_places_where_the_host_waits_are_counted(simulation: Simulation, device: torch.device) -> None:
    x = torch.arange(4.0, device=device)
    assert simulation.waits == []
    seen = [
        x.sum().item,
        x.nonzero,
        x.tolist,
        x.cpu,
        lambda: x[torch.tensor([1])],
        lambda: bool(x[1] > 0),
        lambda: x[x > 0],
    ]
    for number, wait in enumerate(seen, 1):
        wait()
        assert len(simulation.waits) == number
    torch.zeros(3).pin_memory().to(device, non_blocking=True)
    assert len(simulation.waits) == len(seen)
    torch.zeros(3).to(device, non_blocking=True)
    assert len(simulation.waits) == len(seen) + 1, "memory that is not pinned"


def test_a_copy_that_nobody_waited_for_holds_zeros(simulation: Simulation, device: torch.device) -> None:
    first, second = (torch.full((2,), value, device=device) for value in (1.0, 2.0))
    here = first.to("cpu", non_blocking=True)
    event = torch.Event(device)
    event.record()
    later = second.to("cpu", non_blocking=True)
    assert here.tolist() == [0, 0]
    simulation.step += 1
    event.synchronize()
    assert here.tolist() == [1, 1]
    assert later.tolist() == [0, 0], "asked for after the event"
    assert simulation.waits == [], "what was asked for in an earlier step is there"
    event.record()
    event.synchronize()
    assert later.tolist() == [2, 2]
    assert simulation.waits == ["event of this step"]
