"""Which answer of a Wan-like adapter is wrong: a check that fails is asked again with every other answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from headforcing.adapters.wan import WanAdapter
from headforcing.testing.kit import Caught, Kit

CHOICES: dict[str, tuple[Any, ...]] = {
    "norm_per_head": (False, True),
    "halves": (False, True),
    "start_in": ("tokens", "frames"),
    "rolls": (False, True),
    "positions": ("absolute", "compact"),
}
"""The answers with few values."""


def wrong_answer(kit: Kit, check: Callable[[Kit], None]) -> str:
    """The other answer with which a check that failed passes, in words; empty: there is none."""
    if not isinstance(kit.adapter, WanAdapter):
        return ""
    for name, value in _others(kit.adapter):
        other = copy.copy(kit.adapter)
        setattr(other, name, value)
        with torch.no_grad(), Caught() as caught:
            check(Kit(other, kit.host, kit.anchored))
        if caught.error is None:
            return f" (it passes with {name} = {value!r})"
    return ""


def _others(adapter: WanAdapter) -> Iterator[tuple[str, Any]]:
    """Every answer that could be another one, and two names that could be exchanged."""
    for name, values in CHOICES.items():
        yield from ((name, value) for value in values if value != getattr(adapter, name))
    yield "norms", adapter.norms[::-1]
    if len(adapter.projections) == 3:
        q, k, v = adapter.projections
        yield from (("projections", order) for order in ((k, q, v), (q, v, k), (v, k, q)))
