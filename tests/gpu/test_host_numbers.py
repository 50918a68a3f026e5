"""Numbers on a device are read once per pass, and are those of this pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headforcing.adapters import host_numbers as reading
from headforcing.adapters.host_numbers import host_numbers
from tests.gpu.simulated import Simulation
from tests.gpu.videos import Video
from tests.testing.ripple import WINDOWS, RippleAdapter, RippleHost

LAYERS = 3
Ask = Callable[[nn.Module, Tensor], Any]


def passes(ask: Ask, device: torch.device, waits: list[str], inference: bool) -> None:
    """Two models take turns; their positions come as a new tensor, a written one, and one that stays."""
    models = [[nn.Identity() for _ in range(LAYERS)] for _ in range(2)]
    with torch.inference_mode(inference):
        written = torch.zeros(1, 4, dtype=torch.long, device=device)
        for number in range(12):
            model = models[number // 3 % 2]
            if number % 3 == 0:
                written = torch.full((1, 4), number, device=device)
            elif number % 3 == 1:
                written.add_(1)
            expected, before = number - (number % 3 == 2), len(waits)
            for layer in model:
                assert ask(layer, written) == [[expected] * 4]
            assert len(waits) == before + 1


def written_between_layers(device: torch.device) -> None:
    """A tensor that changes in the middle of a pass."""
    x, layers = torch.zeros(2, device=device), [nn.Identity() for _ in range(LAYERS)]
    assert [host_numbers(layer, x.add_(1)) for layer in layers] == [[1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize("inference", [False, True])
def test_each_pass_reads_once(simulation: Simulation, device: torch.device, inference: bool) -> None:
    passes(host_numbers, device, simulation.waits, inference)


def test_a_tensor_that_is_written_between_two_layers_is_read_again(
    simulation: Simulation, device: torch.device
) -> None:
    written_between_layers(device)


def test_on_the_cpu_nothing_is_kept() -> None:
    layer, x = nn.Identity(), torch.zeros(())
    assert host_numbers(layer, x) == 0
    x.data.fill_(2)
    assert host_numbers(nn.Identity(), x) == 2
    assert x not in reading._read.of


def test_nothing_outlives_the_tensor_and_the_layer_that_read(
    simulation: Simulation, device: torch.device
) -> None:
    layer, x = nn.Identity(), torch.ones(1, device=device)
    host_numbers(layer, x)
    gone = weakref.ref(layer)
    del layer
    assert gone() is None
    x.data.zero_()
    assert host_numbers(nn.Identity(), x) == [0], "nobody can tell whether this is the same pass"
    del x
    assert not len(reading._read.of)


def always(layer: nn.Module, x: Tensor) -> Any:
    return x.tolist()


def by_object(layer: nn.Module, x: Tensor, seen: dict[int, Any] = {}) -> Any:  # noqa: B006 - the bug
    return seen.setdefault(id(x), x.tolist())


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("bug", [always, by_object])
def test_a_bug_is_found(simulation: Simulation, device: torch.device, bug: Ask, inference: bool) -> None:
    with pytest.raises(AssertionError):
        passes(bug, device, simulation.waits, inference)


def test_versions_are_needed(
    simulation: Simulation, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "version", lambda x: None)
    with pytest.raises(AssertionError):
        written_between_layers(device)


# A model ------------------------------------------------------------------------------------------


class ReadsInEveryLayer(RippleAdapter):
    """As porters write it."""

    def read(self, module: Any, args: Any, kwargs: Any) -> Any:
        places = (args[1] if len(args) > 1 else kwargs["places"])["frame"]
        assert int(places[0, 0]) >= 0
        return super().read(module, args, kwargs)


@pytest.mark.parametrize(("adapter", "each"), [(RippleAdapter, 1), (ReadsInEveryLayer, 1 + len(WINDOWS))])
def test_a_model_whose_start_is_on_the_device_waits_once_per_pass(
    simulation: Simulation, device: torch.device, adapter: type[RippleAdapter], each: int
) -> None:
    host = RippleHost()
    roles = [[role] * 4 for role in host.memory]
    with simulation.off():
        expected = Video(host, roles).chunks(range(8))
    video = Video(host, roles, device, adapter=adapter())
    waits, outs = list[int](), list[Tensor]()
    for number in range(8):
        simulation.step = number  # what was asked for in the chunk before is there
        for draw in (1, 10):
            before = len(simulation.waits)
            outs.append(video.call(number, draw))
            waits.append(len(simulation.waits) - before)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outs, expected, strict=True))
    assert waits == [each] * len(waits), simulation.waits[-8:]
