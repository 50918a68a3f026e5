"""Waypoint: its real classes with and without head forcing, past the eviction of both kinds of rings.

It attends with `flex_attention`, we with another kernel, so videos are equal to rounding. In float64 that is
1e-12 of the output, where no fault can hide.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.apply.unverified import unverified
from headforcing.measure.verify import gap
from headforcing.roles import Dilated, Local, SlidingWindow

from .waypoint import DILATION, FRAMES, GLOBAL, LOCAL, LONG, World, imported

pytestmark = [pytest.mark.upstream, pytest.mark.filterwarnings("ignore")]
LIMITS = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}
VIDEO = 2 * GLOBAL + 3
OWN = [SlidingWindow(LOCAL, positions="absolute"), Dilated(GLOBAL, DILATION, positions="absolute")] * 2


@pytest.fixture(scope="module")
def package() -> Iterator[Any]:
    with warnings.catch_warnings(), imported() as found:
        warnings.simplefilter("ignore")
        yield found


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(gap(b, a) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("dtype", "patched", "residual"),
    [
        *((torch.float64, patched, residual) for patched in (False, True) for residual in (False, True)),
        (torch.float32, True, True),
        (torch.bfloat16, True, True),
    ],
    ids=str,
)
def test_own_memory(package: Any, dtype: torch.dtype, patched: bool, residual: bool) -> None:
    world = World(package, dtype, patched, residual=residual)
    expected = [world.video(VIDEO), world.video(GLOBAL, seed=1)]
    handle = hf.apply_head_forcing(world.model, "own")
    found = [world.video(VIDEO), world.video(GLOBAL, seed=1)]
    status = handle.status()
    assert status.bypassed == 0
    measured = max(apart(*pair) for pair in zip(found, expected, strict=True))
    assert measured < LIMITS[dtype]
    handle.remove()
    assert all(map(torch.equal, world.video(VIDEO), expected[0]))


def test_what_is_stored(package: Any) -> None:
    world = World(package)
    handle = hf.apply_head_forcing(world.model, "own")
    assert find_adapter(world.model).own_memory(world.model) == OWN
    world.video(VIDEO)
    last = VIDEO - 1
    before = [frame for frame in range(last - GLOBAL + 1, last) if frame % DILATION == 0]
    assert handle.frames(0, 0)[0][0][:2] == [last - 2, last - 1]
    assert handle.frames(1, 0)[0][0][: len(before)] == before


def test_known_code_is_not_warned_about(package: Any) -> None:
    for patched in (False, True):
        model = World(package, patched=patched).model
        assert unverified(model, find_adapter(model)) == {}


def test_verify(package: Any) -> None:
    world = World(package, torch.float64)
    verdict = hf.verify(world.model, lambda *_: world.video(VIDEO))
    assert verdict.ok
    assert verdict.evicted


def test_other_roles_show(package: Any) -> None:
    world = World(package)
    expected = world.video(VIDEO)
    hf.apply_head_forcing(world.model, Local(1, positions="absolute"))
    assert apart(world.video(VIDEO), expected) > 1e-2


def test_past_the_table(package: Any) -> None:
    frames = FRAMES + VIDEO
    expected = World(package, frames=LONG).video(frames)
    world = World(package)
    with pytest.raises(IndexError):
        world.video(FRAMES + 1)
    handle = hf.apply_head_forcing(world.model, "own")
    measured = apart(world.video(frames), expected)
    assert measured < 1e-4
    handle.remove()
    hf.apply_head_forcing(world.model, SlidingWindow(GLOBAL))
    assert all(bool(out.isfinite().all()) for out in world.video(frames))


def test_rotated_keys_are_the_models(package: Any) -> None:
    world = World(package)
    adapter: Any = find_adapter(world.model)
    calls: list[Any] = []
    for _, module in adapter.attentions(world.model):

        def record(module: Any, args: Any, kwargs: Any, made: Any) -> None:
            calls.append((module, adapter.read(module, args, kwargs)))

        module.register_forward_hook(record, with_kwargs=True)
    for frame in range(GLOBAL):
        calls.clear()
        world.frame(frame)
        for module, call in calls[-4:]:
            with torch.inference_mode():
                _, k, _ = adapter.project(module, call)
                mine = adapter.rotate(k, call, [frame])[:, 0].transpose(1, 2)
            ring = world.cache.layers[module.layer_idx]
            tail = ring.kv[0, :, :, ring.L :] if frame % ring.pinned_dilation else None
            slot = (frame // ring.pinned_dilation) % ring.num_buckets * ring.tpf
            theirs = ring.kv[0, :, :, slot : slot + ring.tpf] if tail is None else tail
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("roles", ["own", Local(2, positions="absolute", clean_window=2)], ids=str)
def test_compiled_whole(package: Any, roles: Any) -> None:
    world = World(package)
    handle = hf.apply_head_forcing(world.model, roles)
    expected = world.video(GLOBAL)
    handle.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, recompile_limit=64):
        compiled = torch.compile(world.model, fullgraph=True, dynamic=False, backend="aot_eager")
        measured = apart(world.video(GLOBAL, model=compiled), expected)
    assert measured < LIMITS[torch.float32]
