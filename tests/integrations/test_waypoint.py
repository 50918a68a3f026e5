"""Waypoint's stand-in with a dilated global layer: parity, planted bugs, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing.errors import ChunkOrderError, ExternalEditError, RoleError, StreamError, StreamShapeError
from headforcing.integrations.waypoint import Waypoint
from headforcing.roles import Dilated, HeadRole, SlidingWindow
from headforcing.testing.kit import differences
from tests.hosts.waypoint import (
    FRAMES,
    HEAD_DIM,
    KEY_HEADS,
    TOKENS,
    DilatedWaypointHost,
    WaypointModel,
    config,
)

VIDEO = 14
DRAWS = (2, 1, 0)


class World:
    """A model, its caches, and a handle."""

    def __init__(self, adapter: Waypoint | None = None, fused: bool = False) -> None:
        self.host = DilatedWaypointHost()
        self.host.fused = fused
        self.model: Any = self.host.model()
        self.caches = self.host.caches(self.model)
        self.handle: Any = None
        if adapter is not None:
            self.handle = hf.apply_head_forcing(self.model, "own", adapter=adapter)

    @property
    def rings(self) -> Any:
        return self.caches["rings"]()

    def frame(self, frame: int, draws: Sequence[int] = DRAWS) -> list[Tensor]:
        return [self.host.call(self.model, self.caches, frame, 1, draw) for draw in draws]

    def video(self, frames: int = VIDEO, seed: int = 0) -> list[Tensor]:
        self.rings.reset()
        return [out for at in range(frames) for out in self.frame(at, [seed + draw for draw in DRAWS])]


@pytest.mark.parametrize("fused", [False, True])
def test_own_memory_past_eviction_and_in_a_second_video(fused: bool) -> None:
    plain, forced = World(fused=fused), World(Waypoint(), fused)
    for seed in (0, 20):
        assert differences(forced.video(seed=seed), plain.video(seed=seed)) is None
    assert forced.handle.frames(1, 0) == [[[8, 10, 12]]]
    forced.handle.remove()
    assert differences(forced.video(), plain.video()) is None


def test_own_memory_is_read_from_the_configuration() -> None:
    model = WaypointModel(config(5, 12, 4))
    far = Dilated(12, 4, positions="absolute")
    assert Waypoint().own_memory(model) == [SlidingWindow(5, positions="absolute"), far]
    for block in model.blocks:
        block.config.global_attn_offset = 2  # type: ignore[union-attr]
    assert Waypoint().own_memory(model)[0] == far


@pytest.mark.parametrize(("store", "copies"), [("lean", 2), ("ring", 3)])
def test_keys_are_stored_once_per_key_head(store: str, copies: int) -> None:
    world = World()
    world.handle = hf.apply_head_forcing(world.model, "own", adapter=Waypoint(), store=store)
    world.video()
    frames = 3 + 4  # of both layers, current one included
    numbers = 100  # bytes at most that say where frames lie
    bytes_ = frames * copies * KEY_HEADS * TOKENS * HEAD_DIM * 4
    assert bytes_ <= world.handle.status().stored_bytes <= bytes_ + numbers


class ResidualDropped(Waypoint):
    def project(self, module: Any, call: Any) -> tuple[Tensor, Tensor, Tensor]:
        first = call.arguments["v1"]
        call.arguments["v1"] = None
        found = super().project(module, call)
        call.arguments["v1"] = call.arguments["v1"] if first is None else first
        return found


class ResidualOfThisLayer(Waypoint):
    def output(self, module: Any, out: Tensor, call: Any, memo: Any) -> Any:
        y, _ = super().output(module, out, call, memo)
        return y, None


class GateDropped(Waypoint):
    def output(self, module: Any, out: Tensor, call: Any, memo: Any) -> Any:
        module.gated_attn = False
        try:
            return super().output(module, out, call, memo)
        finally:
            module.gated_attn = True


class Halves(Waypoint):
    def rotate(self, x: Tensor, call: Any, positions: Sequence[float], patch: int = 1) -> Tensor:
        mixed = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return super().rotate(mixed, call, positions, patch)


class PhaseOffByOne(Waypoint):
    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        local, _ = super().own_memory(model)
        return [local, Shifted(6, 2, positions="absolute")]


class Shifted(Dilated):
    def retain(self, table: Any) -> Any:
        oldest = table.start + table.chunk - self.window
        return [r for r, f in enumerate(table.frames) if f >= oldest and f % self.dilation == 1]


class OneSlotMore(Waypoint):
    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        return [super().own_memory(model)[0], Dilated(7, 2, positions="absolute")]


class NotDilated(Waypoint):
    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        return [super().own_memory(model)[0], SlidingWindow(6, positions="absolute")]


class LayersExchanged(Waypoint):
    def own_memory(self, model: nn.Module) -> list[HeadRole]:
        return super().own_memory(model)[::-1]


class OtherGroups(Waypoint):
    """Query head h with key head h mod n, as if keys were tiled and not repeated."""

    def project(self, module: Any, call: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(module, call)
        return q.unflatten(2, (-1, TOKENS)).transpose(2, 4).flatten(2, 3), k, v


@pytest.mark.parametrize(
    "bug",
    [
        ResidualDropped,
        ResidualOfThisLayer,
        GateDropped,
        Halves,
        PhaseOffByOne,
        OneSlotMore,
        NotDilated,
        LayersExchanged,
        OtherGroups,
    ],
)
def test_a_planted_bug_shows(bug: type[Waypoint]) -> None:
    assert differences(World(bug()).video(), World().video()) is not None


def test_positions_past_the_table_are_those_of_a_longer_one() -> None:
    world = World()
    world.frame(0)
    module = world.model.blocks[0]
    x = torch.randn(1, 1, 2 * TOKENS, KEY_HEADS, HEAD_DIM)
    call = called(world)
    for position in (FRAMES, FRAMES + 7, 300, 2.5):
        found = Waypoint().rotate(x, call, [position])
        time = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4) * position
        cos, sin = (table[:TOKENS].clone() for table in (module.rope.cos, module.rope.sin))
        cos[:, 4:], sin[:, 4:] = time.cos().float(), time.sin().float()
        even, odd = x[:, 0].unflatten(1, (2, TOKENS)).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[:, None], sin[:, None]
        expected = torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(1, 2)
        assert torch.allclose(found[:, 0], expected, atol=2e-7 * max(position, 10) * 4)
    with pytest.raises(RoleError, match="none below 0"):
        Waypoint().rotate(x, call, [-1])


def called(world: World) -> Any:
    """The first call of a pass, as the adapter reads it."""
    found = []

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(Waypoint().read(module, args, kwargs))

    hook = world.model.blocks[0].register_forward_pre_hook(record, with_kwargs=True)
    world.frame(1, (1,))
    hook.remove()
    return found[0]


def test_a_cache_that_holds_frames_is_refused() -> None:
    world = World()
    world.frame(0)
    world.handle = hf.apply_head_forcing(world.model, "own", adapter=Waypoint())
    for _ in range(2):
        with pytest.raises(ExternalEditError, match="frames that head forcing did not write"):
            world.frame(0)
    assert differences(world.video(), World().video()) is None


def test_a_new_video_without_reset_is_refused() -> None:
    world = World(Waypoint())
    world.video(4)
    with pytest.raises(ExternalEditError, match="frame 0 after frame 3"):
        world.frame(0)
    assert differences(world.video(), World().video()) is None


def test_a_frame_that_was_not_written_is_refused() -> None:
    world = World(Waypoint())
    world.frame(0)
    world.frame(1, (2, 1))
    with pytest.raises(StreamError, match="no pass over frame 1 wrote"):
        world.frame(2)
    world.frame(1, (0,))
    world.frame(2)


def test_a_cache_that_is_emptied_inside_a_video_begins_another() -> None:
    world = World(Waypoint())
    world.video(4)
    world.rings.reset()
    with pytest.raises(ChunkOrderError):
        world.frame(4)
    assert differences(world.video(), World().video()) is None


def test_calls_of_other_than_one_frame_are_refused() -> None:
    world = World(Waypoint())
    module, x = world.model.blocks[0], torch.randn(1, TOKENS, 64)
    two = {"t_pos": torch.tensor([[0] * 4 + [1] * 4])}
    with pytest.raises(StreamShapeError, match=r"frames \[0, 1\]: expected one"):
        module(x, two, None, world.rings)
    with pytest.raises(StreamShapeError, match="4 tokens: expected one frame of 2x4"):
        module(x[:, :4], {"t_pos": torch.zeros(1, 4)}, None, world.rings)
