"""Which roles each policy gives to the heads, and how they are applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import headforcing as hf
from headforcing.adapters.base import Adapter, find_adapter
from headforcing.integrations.longlive2 import LongLive2
from headforcing.integrations.rolling_forcing import RollingForcing
from headforcing.integrations.streamdiffusionv2 import StreamDiffusionV2
from headforcing.roles import Full, HeadRole, SlidingWindow
from headforcing.roles.memrope import Averaging
from headforcing.roles.positions import PositionScheme
from headforcing.roles.reward_forcing import EmaSink
from headforcing.roles.rolling_forcing import Rolling

from .scenarios import (
    AVERAGED,
    COMMIT,
    COMPILED,
    EQUAL,
    FIVE_FRAMES,
    GROUPS,
    HEADS,
    LAYERS,
    NINE_FRAMES,
    OTHER_AVERAGES,
    PRESET,
    REFERENCE,
    WRAPPER,
    Scenario,
)


@dataclass(frozen=True)
class SecondWindow(SlidingWindow):
    """Equal to a sliding window in all but its class, so that its heads form a group."""


@dataclass(frozen=True)
class ThirdWindow(SlidingWindow):
    """As `SecondWindow`, once more."""


def apply(model: nn.Module, scenario: Scenario, policy: str) -> Any:
    """Apply the roles of a policy to a model, and return the handle."""
    if policy == PRESET and "RollingForcing" in scenario.repositories:
        chunks = len(scenario.steps)
        adapter = RollingForcing(chunks)
        return hf.apply_head_forcing(model, PRESET, adapter=adapter, chunk=chunks * scenario.chunk)
    if policy == PRESET:
        return hf.apply_head_forcing(model, PRESET, chunk=scenario.chunk)
    if policy == EQUAL:
        return hf.apply_head_forcing(model, "own", adapter=told_adapter(scenario))
    roles = POLICIES[policy](scenario)
    if isinstance(roles, HeadRole):
        roles = [roles] * HEADS
    store = "reference" if policy == REFERENCE else "ring"
    handle = hf.apply_head_forcing(model, [roles] * LAYERS, store=store)
    if policy == COMPILED:
        for _, module in find_adapter(model).attentions(model):
            module.compile(backend="eager", fullgraph=True)
    return handle


def told_adapter(scenario: Scenario) -> Adapter | None:
    """Return an adapter that is told what only the pipeline knows, where there is such a thing."""
    if scenario.raw_keys and scenario.repositories == ("LongLive2",):
        return LongLive2(use_relative_rope=True)
    if scenario.repositories == ("streamdiffusionv2",):
        return StreamDiffusionV2(num_kv_cache=scenario.window, sink=max(3, scenario.sink))
    return None


def _window(scenario: Scenario, role: type[SlidingWindow] = SlidingWindow) -> SlidingWindow:
    positions: PositionScheme = "compact" if scenario.raw_keys else "absolute"
    return role(window=scenario.window, sink=scenario.sink, positions=positions)


def _equal(scenario: Scenario) -> HeadRole:
    if "RollingForcing" in scenario.repositories:
        return Rolling(21, scenario.sink)
    return Full() if scenario.window == -1 else _window(scenario)


def _groups(scenario: Scenario) -> list[HeadRole]:
    first, second, third = (_window(scenario, role) for role in (SlidingWindow, SecondWindow, ThirdWindow))
    return [first, second, first, third]


def _budgets(scenario: Scenario) -> list[HeadRole]:
    wide = _window(scenario)
    return [wide, replace(wide, window=6), replace(wide, window=4, sink=1), wide]


def _commit(scenario: Scenario) -> HeadRole:
    """A clean pass that could see less, but sees all."""
    return replace(_equal(scenario), clean_window=scenario.frames + 1)


POLICIES: dict[str, Callable[[Scenario], HeadRole | list[HeadRole]]] = {
    WRAPPER: _equal,
    COMPILED: _equal,
    REFERENCE: _equal,
    GROUPS: _groups,
    COMMIT: _commit,
    AVERAGED: lambda scenario: Averaging(scenario.window, scenario.sink),
    OTHER_AVERAGES: lambda scenario: Averaging(scenario.window, scenario.sink, slow=0.5, fast=0.6),
    "a sink of another weight": lambda scenario: EmaSink(scenario.window, scenario.sink, 0.998),
    "a sink that stays": lambda scenario: SlidingWindow(scenario.window, scenario.sink),
    "last frames in the clean pass": lambda scenario: replace(_equal(scenario), clean_window=scenario.chunk),
    "no sink": lambda scenario: replace(_window(scenario), sink=0),
    "window one frame short": lambda scenario: replace(_window(scenario), window=scenario.window - 1),
    "compact positions": lambda scenario: replace(_window(scenario), positions="compact"),
    NINE_FRAMES: lambda scenario: SlidingWindow(9, positions="absolute"),
    FIVE_FRAMES: lambda scenario: SlidingWindow(5, positions="absolute"),
    "first frames stay where they were": lambda scenario: SlidingWindow(
        24, scenario.sink, positions="absolute", clean_window=21
    ),
    "window six frames wider": lambda scenario: Rolling(27, scenario.sink),
    "unlimited": lambda scenario: Full(),
    "head budgets": _budgets,
}
