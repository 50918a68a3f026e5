"""Videos of the stand-in hosts on a simulated device, as their pipelines make them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing.roles import HeadRole
from headforcing.roles.maps.role_map import RoleMap
from headforcing.testing.host import Host
from tests.gpu.simulated import DEVICES, Simulation

Roles = HeadRole | RoleMap | list[list[HeadRole]] | str
elsewhere = pytest.mark.parametrize(
    "device", [pytest.param(DEVICES[0], marks=pytest.mark.slow), DEVICES[1]], indirect=True, ids=str
)
"""In the fast run, on the device that is not the current one alone."""


class Video:
    """A head-forced model and its caches on one device; on the CPU, the same without a simulation.

    Args:
        host: the base model.
        roles: what is applied to it.
        device: where it runs.
        how: more for `apply_head_forcing`.
    """

    def __init__(self, host: Host, roles: Roles, device: torch.device | str = "cpu", **how: Any) -> None:
        how.setdefault("backend", "sdpa")
        how.setdefault("adapter", host.adapter)
        self.host, self.device = host, torch.device(device)
        self.model = host.model(how.pop("dtype", torch.float32))
        with self._pipeline():
            _move_module(self.model, self.device)
            self.caches = moved(host.caches(self.model), self.device)
        self.model.register_forward_pre_hook(self._bring, with_kwargs=True)
        self.handle = hf.apply_head_forcing(self.model, roles, **how)

    def call(self, start: int, draw: int, frames: int | None = None) -> Tensor:
        """One pass; what it returns, on the CPU."""
        stream = self.handle.stream("video") if self.caches is None else contextlib.nullcontext()
        with stream, torch.no_grad():
            out = self.host.call(self.model, self.caches, start, frames or self.host.chunk, draw)
        with self._pipeline():
            return out.cpu()

    def chunks(self, numbers: Iterable[int], draws: Iterable[int] = (1, 10)) -> list[Tensor]:
        """Passes over chunks."""
        return [self.call(self.host.chunk * number, draw) for number in numbers for draw in draws]

    def new_video(self) -> None:
        """Does to the caches what the pipeline does."""
        if self.caches is not None:
            with self._pipeline():
                self.host.new_video(self.model, self.caches)
                moved(self.caches, self.device)

    def _pipeline(self) -> Any:
        """What the base model's pipeline does may wait."""
        return Simulation.now().uncounted() if self.device.type == "cuda" else contextlib.nullcontext()

    def _bring(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The inputs of a pass are on the device, as upstream's are."""
        with self._pipeline():
            return moved(args, self.device), moved(kwargs, self.device)


def moved(tree: Any, device: torch.device) -> Any:
    """A tree of tensors on another device; dicts, lists and objects are changed in place."""
    if device.type == "cpu":
        return tree
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return tuple(moved(x, device) for x in tree)
    if isinstance(tree, list):
        tree[:] = [moved(x, device) for x in tree]
    elif isinstance(tree, dict):
        tree.update({key: moved(x, device) for key, x in tree.items()})
    elif type(tree).__module__.startswith(("tests.", "headforcing.")):
        vars(tree).update({key: moved(x, device) for key, x in vars(tree).items()})
    return tree


def _move_module(model: nn.Module, device: torch.device) -> None:
    """Moves parameters and buffers, and tables that lie in attributes, as models do in their first call."""
    if device.type == "cpu":
        return
    model.to(device)
    for module in model.modules():
        for name, x in [*vars(module).items()]:
            if isinstance(x, Tensor) or (isinstance(x, tuple) and x and isinstance(x[0], Tensor)):
                vars(module)[name] = moved(x, device)
