"""NaN and infinity on an accelerator, where a verdict is read a chunk late: an error, and life goes on."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headforcing.errors import NonFiniteKVError
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import Anchor, HeadRole, Local, Memory
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.episodic import ThresholdFifo
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Veil
from headforcing.stores import checks
from tests.examples import examples
from tests.gpu import simulated as gpu
from tests.gpu.simulated import DEVICES, Simulation
from tests.gpu.videos import Video, elsewhere, moved
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


def check_is_told(
    fault: Fault, end: str, device: torch.device, *, store: str = "ring", chunks: int = CHUNKS, again: int = 3
) -> None:
    """In time, once or as long as the video goes on, and the next video is as if nothing had happened."""
    what = "queries" if fault.what == 0 else "keys or values"
    message = rf"layer {fault.layer}, heads {fault.head}: {what} of frames {3 * fault.chunk}\.\."
    video = Broken(fault, device, store=store)
    refused = fault.chunk + (2 if device.type == "cuda" else 1)  # the chunk that cannot begin
    video.chunks(range(min(refused, chunks)), draws=(10,))
    once = refused >= chunks and end != "commit"
    for _ in range(1 if once else 2):
        with pytest.raises(NonFiniteKVError, match=message):
            video.call(3 * refused, 10) if refused < chunks else ENDS[end](video)
    video.adapter.fault = None
    if video.handle.applied:
        video.new_video()
    else:
        video = Broken(None, device, store=store)
    found = video.chunks(range(again), draws=(10,))
    assert all(map(torch.equal, found, _expected(store)[:again]))
    video.handle.remove()


@pytest.fixture(
    params=[torch.device("cpu"), pytest.param(DEVICES[0], marks=pytest.mark.slow), DEVICES[1]], ids=str
)
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


@pytest.mark.parametrize("seed", range(examples(3)))
def test_nothing_that_is_not_finite_stays_unsaid(anywhere: torch.device, seed: int) -> None:
    fault, end, store = drawn(seed)
    check_is_told(fault, end, anywhere, store=store)


@pytest.mark.parametrize(
    "end", [pytest.param(end, marks=pytest.mark.slow if end in ("reset", "context") else ()) for end in ENDS]
)
def test_the_last_chunk_is_told_of_however_a_video_ends(anywhere: torch.device, end: str) -> None:
    check_is_told(Fault(chunk=1), end, anywhere, chunks=2, again=1)


def test_an_error_is_not_hidden_by_what_a_video_ends_with(anywhere: torch.device) -> None:
    video = Broken(Fault(chunk=0), anywhere)
    video.call(0, 10)
    with pytest.raises(KeyError), video.handle:
        raise KeyError


def test_of_every_video_one_layer_is_told(anywhere: torch.device) -> None:
    """Two timelines, both broken in both layers."""
    video = Broken(Fault(chunk=0), anywhere)
    both = [video.caches, moved(video.host.caches(video.model), anywhere)]
    for video.caches in both:
        video.call(0, 10)
    with pytest.raises(NonFiniteKVError) as caught:
        video.handle.reset()
    assert str(caught.value).count("layer 0, heads 0: keys or values of frames 0..2") == 2
    assert "layer 1" not in str(caught.value)
    video.handle.reset()


@elsewhere
@pytest.mark.parametrize("store", ["ring", pytest.param("lean", marks=pytest.mark.slow)])
def test_no_host_waits_for_a_verdict(simulation: Simulation, device: torch.device, store: str) -> None:
    check_no_wait(simulation, device, store)


def check_no_wait(simulation: Simulation, device: torch.device, store: str = "ring") -> None:
    video = Broken(None, device, store=store)
    video.chunks(range(3), draws=(10,))  # memories are full, positions are known
    simulation.waits.clear()
    for chunk in range(3, 6):
        simulation.step = chunk
        video.chunks([chunk], draws=(1, 10) if chunk == 4 else (10,))
    assert simulation.waits == []


def check_largest_numbers_are_finite(device: torch.device) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.full((1, 3, 4, 2, 8), torch.finfo(dtype).max, dtype=dtype).to(device)
        for heads in range(3):
            assert checks.largest_of(x[..., heads:, :]).tolist() == [torch.finfo(dtype).max] * (2 - heads)


def test_the_largest_numbers_are_finite(anywhere: torch.device) -> None:
    check_largest_numbers_are_finite(anywhere)


class Huge(Poisoned):
    """Keys and values of 3e38."""

    def project(self, module: nn.Module, call: Any) -> Any:
        q, k, v = super().project(module, call)
        return q, torch.full_like(k, 3e38), torch.full_like(v, 3e38)


def test_float64_keys_of_3e38_are_no_error(anywhere: torch.device) -> None:
    veil = Veil(sink=1, blocks=1, patch=2, far=WINDOW, near=6)
    roles = [ROLES[0], [*ROLES[1][:3], veil]]
    video = Video(SelfForcingHost(), roles, anywhere, adapter=Huge(), dtype=torch.float64)
    assert all(bool(x.isfinite().all()) for x in video.chunks(range(4), draws=(10,)))
    video.handle.remove()


# Planted bugs -------------------------------------------------------------------------------------


def in_memory(device: torch.device) -> None:
    """A head that chooses by content and is broken just when it does."""
    check_is_told(Fault(layer=0, head=0, chunk=1), "commit", device, chunks=4, again=1)


def at_the_end(device: torch.device) -> None:
    check_is_told(Fault(chunk=1), "remove", device, chunks=2, again=1)


def forgets(guard: checks.FiniteGuard, wait: bool) -> None:
    """Asks for a verdict once."""
    late, guard._committed = guard._committed, None
    if late is not None:
        late.check("were committed")
    guard._begin()
    if guard._pending is not None and (wait or guard._pending.ready):
        guard._pending.check("were not committed")


PLANTED: dict[str, tuple[Any, str, Any, Callable[[torch.device], None]]] = {
    "a verdict that is asked for once": (checks.FiniteGuard, "check", forgets, in_memory),
    "a verdict that nobody waits for": (gpu.Event, "synchronize", lambda event: None, in_memory),
    "the last chunk": (checks.FiniteGuard, "unreported", lambda guard: [], at_the_end),
    "a sum": (
        checks,
        "largest_of",
        lambda x: x.sum((0, 1, 2, 4), dtype=torch.float32),
        check_largest_numbers_are_finite,
    ),
}


LATE = ("a verdict that is asked for once", "a verdict that nobody waits for")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LATE else ()) for name in PLANTED]
)
def test_it_is_found(name: str, simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, wrong, check = PLANTED[name]
    monkeypatch.setattr(owner, attribute, wrong)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check(DEVICES[1])


def test_a_host_that_waits_is_found(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.FiniteGuard.check
    monkeypatch.setattr(checks.FiniteGuard, "check", lambda guard, wait: right(guard, True))
    with pytest.raises(AssertionError, match="event of this step"):
        check_no_wait(simulation, DEVICES[1])
