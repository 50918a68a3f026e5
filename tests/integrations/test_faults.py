"""A fault anywhere in a pass, on every adapter: a chunk at frame 0 then begins a video like a fresh run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headforcing.adapters.base import find_adapter
from headforcing.errors import StreamError
from headforcing.roles import Local
from headforcing.stores import KVStore
from headforcing.testing.kit import Kit, Take, differences
from headforcing.types import Chunk
from tests.faults import PASSES, Fault, Kind, meet, places
from tests.hosts import find_host, host_names

KINDS: tuple[Kind, ...] = ("before", "after", "line")
ROLE = Local(2, sink=1)
Point = tuple[int, int]
"""The number of a video on the same caches, and of a chunk in it, whose first pass fails."""
POINTS: tuple[Point, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))


def kit_of(name: str) -> Kit:
    host = find_host(name)
    if reason := host.missing():
        pytest.skip(reason)
    return Kit(host.adapter or find_adapter(host.model()), host)


def until(kit: Kit, point: Point) -> tuple[Take, Point, Callable[[], list[Tensor]]]:
    """A model that stands right before the pass that fails, and this pass."""
    take, step = kit.forced(ROLE), kit.host.chunk
    for video in range(point[0] + 1):
        if video:
            kit.host.new_video(take.model, take.caches)
        for chunk in range(2 if video < point[0] else point[1]):
            take.passes(chunk * step, (11, 10))
    return take, point, lambda: take.passes(point[1] * step, (11,))


def fresh(take: Take) -> list[Tensor]:
    """A video of two chunks."""
    return [out for chunk in range(2) for out in take.passes(chunk * take.kit.host.chunk, (1, 0))]


def rest(take: Take, point: Point, act: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The pass that failed, the clean one after it, and another chunk."""
    start, step = point[1] * take.kit.host.chunk, take.kit.host.chunk
    return [*act(), *take.passes(start, (10,)), *take.passes(start + step, (11, 10))]


def check(name: str, point: Point, kind: Kind, least: int) -> None:
    """Fails at some places of a pass; then the pass is made again, or a new video begins."""
    kit = kit_of(name)
    with torch.no_grad():
        expected = fresh(kit.forced(ROLE)), rest(*until(kit, point))
        seen, _ = meet(kind, None, until(kit, point)[2], PASSES)
        for number, at in enumerate(places(seen, least, seed=sum(map(ord, name)))):
            take, _, act = until(kit, point)
            _, place = meet(kind, at, act, PASSES)
            if number % 2:
                assert differences(rest(take, point, act), expected[1]) is None, place
            kit.host.new_video(take.model, take.caches)
            assert differences(fresh(take), expected[0]) is None, place


EVERYWHERE = [(name, point, kind) for name in host_names() for point in POINTS for kind in KINDS]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "point", "kind"), EVERYWHERE)
def test_after_a_fault_anywhere_a_pass_can_be_made_again_and_a_video_begun(
    name: str, point: Point, kind: Kind
) -> None:
    check(name, point, kind, 0)


@pytest.mark.parametrize(
    ("name", "point"), [("causvid", (1, 0)), ("longlive2", (0, 1)), ("self_forcing", (1, 1))]
)
def test_after_a_fault_somewhere_a_pass_can_be_made_again_and_a_video_begun(name: str, point: Point) -> None:
    check(name, point, "line", 2)


# Planted bugs ---------------------------------------------------------------------------------------


def test_a_store_that_refuses_after_an_interrupt_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = KVStore.write

    def wrong(self: KVStore, chunk: Chunk) -> None:
        if getattr(self, "moving", False):
            raise StreamError("an earlier commit was interrupted")
        self.moving = True  # type: ignore[attr-defined]
        right(self, chunk)
        self.moving = False  # type: ignore[attr-defined]

    monkeypatch.setattr(KVStore, "write", wrong)
    with pytest.raises((StreamError, Fault)):
        check("causvid", (1, 0), "line", 12)
