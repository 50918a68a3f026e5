"""Tools for the checks: run a host with and without head forcing, and compare the outputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, is_dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.adapters.base import Adapter
from headforcing.apply import Roles, apply_head_forcing
from headforcing.apply.handle import HeadForcing
from headforcing.measure.verify import ROUNDING, gap
from headforcing.roles import Full, HeadRole
from headforcing.testing.host import Host
from headforcing.types import AttentionCall


class Skipped(Exception):
    """A check does not apply to this host; the message is the reason."""


class Caught:
    """Catches any exception of the adapter or the host, so that the other checks can run."""

    error: Exception | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


@dataclass(eq=False)
class Take:
    """A model with or without head forcing, and one timeline on it.

    Attributes:
        kit: the tools.
        model: the model.
        handle: of the applied model; `None`: it is unmodified.
        caches: of the timeline.
        name: of the timeline, for base models whose calls carry no cache object.
    """

    kit: Kit
    model: nn.Module
    handle: HeadForcing | None = None
    caches: Any = None
    name: str = "video"

    def passes(self, start: int, draws: Sequence[int], frames: int | None = None) -> list[Tensor]:
        """Passes over one chunk, one per draw."""
        stream = self.handle is not None and not self.kit.anchored
        with self.handle.stream(self.name) if self.handle and stream else nullcontext():
            return [
                self.kit.host.call(self.model, self.caches, start, frames or self.kit.host.chunk, draw)
                for draw in draws
            ]

    def video(self, frames: int, draw: int = 0, first: int = 0) -> list[Tensor]:
        """Chunks from frame `first` to `frames`, with two noisy passes and a clean one each."""
        step = self.kit.host.chunk
        draws = (draw + 2, draw + 1, draw)
        return [out for start in range(first, frames, step) for out in self.passes(start, draws)]

    def other(self, name: str, batch: int = 1) -> Take:
        """Another timeline on the same model."""
        return Take(self.kit, self.model, self.handle, self.kit.host.caches(self.model, batch), name)


@dataclass(eq=False)
class Kit:
    """An adapter, a host, and what is cached between checks.

    Attributes:
        adapter: what is checked.
        host: runs the model.
        anchored: whether calls carry a cache object.
        untouched: videos of the unmodified model.
        compared: passes that `same` compared in this check.
        apart: the largest difference among them, over the root mean square of the output.
    """

    adapter: Adapter
    host: Host
    anchored: bool = True
    untouched: dict[Any, list[Tensor]] = field(default_factory=dict)
    compared: int = 0
    apart: float = 0.0

    def plain(self, dtype: torch.dtype = torch.float32, batch: int = 1) -> Take:
        """An unmodified model."""
        model = self.host.model(dtype)
        return Take(self, model, None, self.host.caches(model, batch))

    def forced(
        self,
        role: HeadRole | Sequence[HeadRole] | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> Take:
        """A model with the same role for every head, or for every head of a layer; by default `Full`."""
        model = self.host.model(dtype)
        caches = self.host.caches(model, batch)
        return Take(self, model, self.apply(model, self._roles(model, role or Full())), caches)

    def _roles(self, model: nn.Module, role: HeadRole | Sequence[HeadRole]) -> Roles:
        """One role for all heads, or a table from one per layer."""
        if isinstance(role, HeadRole):
            return role
        heads = [self.adapter.heads(module)[0] for _, module in self.sites(model)]
        return [[own] * count for own, count in zip(role, heads, strict=True)]

    def apply(self, model: nn.Module, roles: Roles) -> HeadForcing:
        """Applies roles with the adapter under test."""
        return apply_head_forcing(model, roles, adapter=self.adapter)

    def truth(
        self, frames: int, draw: int = 0, dtype: torch.dtype = torch.float32, batch: int = 1
    ) -> list[Tensor]:
        """`Take.video` of the unmodified model.

        Raises:
            Skipped: it does not run in this dtype, and does in float32.
        """
        key = frames, draw, dtype, batch
        if key not in self.untouched:
            with Caught() as caught:
                self.untouched[key] = self.plain(dtype, batch).video(frames, draw)
            if caught.error is not None and dtype is not torch.float32:
                raise Skipped(f"the unmodified model does not run in {dtype}: {caught.error!r}")
            if caught.error is not None:
                raise caught.error
        return self.untouched[key]

    @property
    def memory(self) -> list[HeadRole]:
        """The role of every layer that reproduces the unmodified model."""
        own, layers = self.host.memory, self.host.layers
        return [own] * layers if isinstance(own, HeadRole) else list(own)

    def allowed(self, dtype: torch.dtype = torch.float32) -> float:
        """Up to which difference outputs that were computed in a dtype are equal to rounding."""
        limit = self.host.rounding
        return limit if dtype is torch.float32 or not limit else max(limit, ROUNDING[dtype])

    def same(
        self,
        found: Sequence[Tensor],
        expected: Sequence[Tensor],
        hint: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """As the function `same`, but up to `Host.rounding`; the report says what was measured."""
        same(found, expected, hint, self.allowed(dtype))
        unequal = [gap(b, a) for a, b in zip(found, expected, strict=True) if not torch.equal(a, b)]
        self.compared, self.apart = self.compared + len(found), max([self.apart, *unequal])

    def sites(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The attention modules that the adapter finds, with their paths."""
        return list(self.adapter.attentions(model))

    def calls(
        self, take: Take, start: int, draw: int = 0, frames: int | None = None
    ) -> list[tuple[str, nn.Module, AttentionCall]]:
        """The self-attention calls of one pass of an unmodified model, as the adapter reads them."""
        found: list[tuple[str, nn.Module, AttentionCall]] = []
        hooks = []
        for path, module in self.sites(take.model):

            def record(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path
            ) -> None:
                call = self.adapter.read(module, args, kwargs)
                assert call is not None, f"read() returned None for a call of {path} that has a cache"
                found.append((path, module, call))

            hooks.append(module.register_forward_pre_hook(record, with_kwargs=True))
        try:
            take.passes(start, [draw], frames)
        finally:
            for hook in hooks:
                hook.remove()
        assert found, "no module of attentions() is called in a pass of the model: are they the right ones?"
        return found


def differences(found: Sequence[Tensor], expected: Sequence[Tensor], allowed: float = 0.0) -> str | None:
    """Describes the first difference between two videos; `None` if they are equal.

    Args:
        found: outputs of passes.
        expected: as many.
        allowed: the largest difference over the root mean square of an output; 0: equal bit for bit.
    """
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"pass {number}: {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}"
        if not torch.equal(a, b) and not (apart := gap(b.detach(), a.detach())) <= allowed:
            limit = f", Host.rounding allows {allowed:.3g}" if allowed else ""
            return (
                f"pass {number} of {len(found)} differs by up to {apart:.3g} of the root mean square{limit} "
                "(three passes per chunk)"
            )
    return None


def same(found: Sequence[Tensor], expected: Sequence[Tensor], hint: str, allowed: float = 0.0) -> None:
    """Asserts that both videos are equal; the hint says what to check if not."""
    apart = differences(found, expected, allowed)
    assert apart is None, f"{apart}: {hint}"


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and plain numbers inside caches, with their paths."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from leaves(value, f"{path}[{name!r}]")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{path}[{number}]")
    elif isinstance(tree, nn.Module):
        yield from leaves(dict(tree.named_buffers()), path)
    elif is_dataclass(tree) or (hasattr(tree, "__dict__") and not isinstance(tree, Tensor)):
        yield from leaves(vars(tree), path)
    elif isinstance(tree, Tensor | bool | int):
        yield path, tree


def counters(caches: Any) -> dict[str, int | bool | list[Any]]:
    """The counters in a base model's caches: whole numbers and flags."""
    found: dict[str, int | bool | list[Any]] = {}
    for path, leaf in leaves(caches):
        if not isinstance(leaf, Tensor):
            found[path] = leaf
        elif not (leaf.is_floating_point() or leaf.is_complex()):
            found[path] = leaf.tolist()
    return found


def held_bytes(caches: Any) -> int:
    """Bytes of all allocations inside caches."""
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for _, leaf in leaves(caches)
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values())


def tensors(take: Take) -> list[tuple[str, Tensor]]:
    """The tensors in a timeline's caches, by path."""
    return [(path, leaf) for path, leaf in leaves(take.caches) if isinstance(leaf, Tensor)]


@contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings that a check provokes on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
