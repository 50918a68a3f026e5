"""NaN and infinity on an accelerator, where a verdict is read a chunk late: an error, and life goes on."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headforcing.errors import NonFiniteKVError
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow, episodic
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.episodic import ThresholdFifo
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import Averaging
from headforcing.stores import checks
from tests.examples import examples
from tests.gpu import simulated as gpu
from tests.gpu.simulated import DEVICES, Simulation
from tests.gpu.videos import Video
from tests.hosts.self_forcing import SelfForcingHost

WINDOW, CHUNKS = 9, 6
FULL = Memory(1, 2, 2)
ROLES: list[list[HeadRole]] = [
    [FULL, Participating(WINDOW, sink=1, recent=3, chosen=1), Memory(1, 2, 2, ThresholdFifo()), Local(1)],
    [Dynamic(pieces=4), FULL, Averaging(WINDOW, sink=1), Anchor(1)],
]
"""Every role that reads keys, values or queries, and two that do not."""


@dataclass(frozen=True)
class Fault:
    """A number that is not finite.

    Attributes:
        what: 0 for queries, 1 for keys, 2 for values.
        layer: where.
        head: where.
        chunk: in the passes over which chunk.
        value: the number.
    """

    what: int = 1
    layer: int = 0
    head: int = 0
    chunk: int = 2
    value: float = torch.nan


class Poisoned(SelfForcing):
    """Projects what the fault says."""

    def __init__(self) -> None:
        self.fault: Fault | None = None

    def project(self, module: nn.Module, call: Any) -> Any:
        found, fault = [*super().project(module, call)], self.fault
        layer = module._headforcing.layer
        if fault is not None and (layer, call.start) == (fault.layer, 3 * fault.chunk):
            found[fault.what] = found[fault.what].clone()
            found[fault.what][0, 1, 2, fault.head, 3].fill_(fault.value)
        return found


class Broken(Video):
    """A video in which a number is not finite."""

    def __init__(self, fault: Fault | None, device: torch.device | str, **how: Any) -> None:
        self.adapter = Poisoned()
        super().__init__(SelfForcingHost(), ROLES, device, adapter=self.adapter, **how)
        self.adapter.fault = fault


def ends_by_new_video(video: Broken) -> None:
    video.adapter.fault = None
    video.new_video()
    video.call(0, 10)


def ends_by_context(video: Broken) -> None:
    with video.handle:
        pass


ENDS: dict[str, Callable[[Broken], Any]] = {
    "commit": lambda video: video.handle.commit(),
    "new video": ends_by_new_video,
    "reset": lambda video: video.handle.reset(),
    "remove": lambda video: video.handle.remove(),
    "context": ends_by_context,
}
"""How a video ends; only a commit may be tried again."""


@functools.cache
def _expected(store: str) -> list[Tensor]:
    with Simulation.off():
        return Broken(None, "cpu", store=store).chunks(range(3), draws=(10,))


def check_is_told(fault: Fault, end: str, device: torch.device, store: str = "ring") -> None:
    """In time, once or as long as the video goes on, and the next video is as if nothing had happened."""
    what = "queries" if fault.what == 0 else "keys or values"
    message = rf"layer {fault.layer}, heads {fault.head}: {what} of frames {3 * fault.chunk}\.\."
    late = device.type == "cuda"
    video = Broken(fault, device, store=store)
    notices = fault.chunk + 1 + late  # the chunk that is refused
    video.chunks(range(min(notices, CHUNKS)), draws=(10,))
    if notices < CHUNKS:
        for _ in range(2):
            with pytest.raises(NonFiniteKVError, match=message):
                video.call(3 * notices, 10)
    else:
        for _ in range(2 if end == "commit" else 1):
            with pytest.raises(NonFiniteKVError, match=message):
                ENDS[end](video)
    video.adapter.fault = None
    if video.handle.applied:
        video.new_video()
    else:
        video = Broken(None, device, store=store)
    assert all(map(torch.equal, video.chunks(range(3), draws=(10,)), _expected(store)))
    video.handle.remove()


@pytest.fixture(params=[torch.device("cpu"), *DEVICES], ids=str)
def anywhere(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, where a verdict is there at once, and the simulated devices."""
    if request.param.type == "cpu":
        yield request.param
        return
    if reason := gpu.missing():
        pytest.skip(reason)
    with gpu.simulated(), torch.no_grad():
        yield request.param


def drawn(seed: int) -> tuple[Fault, str, str]:
    draw = random.Random(seed)
    fault = Fault(
        draw.randrange(3),
        draw.randrange(2),
        draw.randrange(4),
        draw.randrange(CHUNKS),
        draw.choice([torch.nan, torch.inf, -torch.inf]),
    )
    return fault, draw.choice([*ENDS]), draw.choice(["ring", "lean", "reference"])


@pytest.mark.parametrize("seed", range(examples(4)))
def test_nothing_that_is_not_finite_stays_unsaid(anywhere: torch.device, seed: int) -> None:
    fault, end, store = drawn(seed)
    check_is_told(fault, end, anywhere, store)


@pytest.mark.parametrize("end", ENDS)
def test_the_last_chunk_is_told_of_however_a_video_ends(anywhere: torch.device, end: str) -> None:
    check_is_told(Fault(chunk=CHUNKS - 1, layer=1), end, anywhere)
