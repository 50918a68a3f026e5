"""A fault anywhere in a pass, on every adapter: a chunk at frame 0 then begins a video like a fresh run."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headforcing.adapters.base import find_adapter
from headforcing.errors import StreamError
from headforcing.roles import Local
from headforcing.stores import KVStore
from headforcing.testing.kit import Kit, Take, differences
from headforcing.types import Chunk
from tests.examples import CI, examples
from tests.faults import PASSES, Fault, Kind, meet, places
from tests.hosts import find_host, host_names

KINDS: tuple[Kind, ...] = ("before", "after", "line")
Point = tuple[int, int]
"""The number of a video on the same caches, and of a chunk in it, whose first pass fails."""
POINTS: tuple[Point, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))


def kit_of(name: str) -> Kit:
    host = find_host(name)
    if reason := host.missing():
        pytest.skip(reason)
    return Kit(host.adapter or find_adapter(host.model()), host)


def until(kit: Kit, point: Point) -> tuple[Take, Callable[[], Any]]:
    """A model that stands right before the pass that fails, and this pass."""
    take, step = kit.forced(Local(2, sink=1)), kit.host.chunk
    for video in range(point[0] + 1):
        if video:
            kit.host.new_video(take.model, take.caches)
        for chunk in range(3 if video < point[0] else point[1]):
            take.passes(chunk * step, (11, 10))
    return take, lambda: take.passes(point[1] * step, (11,))


def fresh(kit: Kit) -> list[Tensor]:
    take = kit.forced(Local(2, sink=1))
    return [out for chunk in range(3) for out in take.passes(chunk * kit.host.chunk, (2, 1, 0))]


def check(name: str, point: Point, kind: Kind, least: int, again: bool) -> None:
    """Fails at some places of a pass; then a new video begins, or the pass is made again."""
    kit = kit_of(name)
    with torch.no_grad():
        expected = fresh(kit)
        seen, _ = meet(kind, None, until(kit, point)[1], PASSES)
        for at in places(seen, least, seed=sum(map(ord, name))):
            take, act = until(kit, point)
            _, place = meet(kind, at, act, PASSES)
            if again:
                act()
            kit.host.new_video(take.model, take.caches)
            found = [out for chunk in range(3) for out in take.passes(chunk * kit.host.chunk, (2, 1, 0))]
            assert differences(found, expected) is None, place


@pytest.mark.parametrize("name", host_names())
def test_after_a_fault_anywhere_a_new_video_is_as_if_fresh(name: str) -> None:
    if examples(CI) > CI:
        for point in POINTS:
            for kind in KINDS:
                check(name, point, kind, 0, again=False)
        return
    dice = random.Random(name)
    check(name, dice.choice(POINTS[1:]), dice.choice(KINDS), 2, again=dice.random() < 0.5)


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
        check("causvid", (1, 0), "line", 12, again=False)
