"""Queries that share keys (GQA): stored once, and the same as keys that are repeated for every query head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import headforcing as hf
from headforcing.integrations.waypoint import Waypoint
from headforcing.measure.profiler import Protocol, profile_heads
from headforcing.roles import Dilated, Full, HeadRole, Local, Memory, Participating, SlidingWindow, Veil, Wave
from tests.hosts.waypoint import HEADS, KEY_HEADS, WaypointHost

EACH = HEADS // KEY_HEADS
FRAMES, WINDOW = 12, 24
ROLES: list[tuple[HeadRole, HeadRole]] = [
    (SlidingWindow(3), Full()),
    (Local(2, 1), Memory(1, 3, 2)),
    (Dilated(6, 2), Dilated(6, 3, positions="absolute")),
    (Wave(1, 1, period=2, cap=2), Veil(1, 1, blocks=2, block=2)),
    (Participating(8, 2, 3, 2), SlidingWindow(4)),
]


class Repeated(Waypoint):
    """Every query head has keys of its own."""

    def heads(self, module: Any) -> tuple[int, int]:
        return module.n_heads, module.d_head

    def project(self, module: Any, call: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(module, call)
        q = q.unflatten(2, (EACH, -1)).movedim(2, 4).flatten(3, 4)
        return q, k.repeat_interleave(EACH, dim=3), v.repeat_interleave(EACH, dim=3)

    def output(self, module: Any, out: Tensor, call: Any, memo: Any) -> Any:
        together = out.unflatten(2, (-1, EACH)).movedim(3, 1).flatten(1, 2)
        return super().output(module, together, call, memo)


def video(adapter: Waypoint, pair: tuple[HeadRole, HeadRole], repeat: int) -> tuple[list[Tensor], Any]:
    host = WaypointHost()
    model = host.model()
    caches = host.caches(model)
    row = [role for role in pair for _ in range(repeat)]
    handle = hf.apply_head_forcing(model, [row] * host.layers, adapter=adapter, window=WINDOW)
    outs = [host.call(model, caches, frame, 1, draw) for frame in range(FRAMES) for draw in (1, 0)]
    return outs, handle.status()


@pytest.mark.parametrize("pair", ROLES, ids=str)
def test_keys_are_stored_once(pair: tuple[HeadRole, HeadRole]) -> None:
    found, status = video(Waypoint(), pair, 1)
    expected, repeated = video(Repeated(), pair, EACH)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert status.stored_bytes < 0.75 * repeated.stored_bytes


def profiled(adapter: Waypoint) -> dict[str, Tensor]:
    host = WaypointHost()
    model = host.model()

    def run() -> None:
        caches = host.caches(model)
        for frame in range(5):
            for draw in (1, 0):
                host.call(model, caches, frame, 1, draw)

    metrics = ["attention_mass", "qk_logits", "output_regret"]
    return profile_heads(model, run, metrics, adapter=adapter, protocol=Protocol(queries=None)).values


def test_metrics_are_means_over_the_queries_of_a_head() -> None:
    shared, alone = profiled(Waypoint()), profiled(Repeated())
    linear = [name for name in alone if not name.startswith("output_regret")]
    assert len(linear) > 4
    for name in linear:
        mean = alone[name].unflatten(2, (KEY_HEADS, EACH)).mean(3)
        assert torch.allclose(shared[name], mean, atol=1e-5, equal_nan=True), name
    regret = shared["output_regret.mean"]
    assert bool(regret.isfinite().all())
    assert regret.shape[2] == KEY_HEADS
