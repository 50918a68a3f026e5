"""The check of `torch.compile` on a model with head forcing applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from headforcing.adapters.base import Adapter
from headforcing.testing.kit import Caught, Kit, Skipped
from headforcing.types import TracedCall


def compiled_is_one_operator(kit: Kit) -> None:
    """Compiled attention is one graph, where the adapter says by `traced_call` what a graph must know."""
    if not _traces(kit):
        raise Skipped("attention is served between two graphs (Adapter.traced_call)")
    take, frames = kit.forced(), 2 * kit.host.chunk
    torch._dynamo.reset()
    try:
        for path, _ in kit.sites(kit.host.model()):
            take.model.get_submodule(path).compile(backend="eager", fullgraph=True)
        with torch.no_grad(), Caught() as caught:
            outs = take.video(frames)
    finally:
        torch._dynamo.reset()
    assert caught.error is None, (
        f"compiled attention raises {caught.error!r}: traced_call() may read no tensor, and must name "
        "all that output() writes"
    )
    kit.same(outs, kit.truth(frames), "compiled: answer() must return what output() returns")


def _traces(kit: Kit) -> bool:
    """Whether the adapter says what a graph must know of a call."""
    if type(kit.adapter).traced_call is Adapter.traced_call:
        return False
    take, found = kit.plain(), list[TracedCall | None]()

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kit.adapter.traced_call(module, args, kwargs))

    _, first = kit.sites(take.model)[0]
    hook = first.register_forward_pre_hook(record, with_kwargs=True)
    with Caught():  # an error shows again in the compiled model
        take.passes(0, [0])
    hook.remove()
    return found != [None]


CHECKS: Sequence[Any] = (compiled_is_one_operator,)
