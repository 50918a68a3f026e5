"""The check of `torch.compile` on a model with head forcing applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headforcing.adapters.base import Adapter
from headforcing.testing.kit import Caught, Kit, Skipped


def compiled_is_one_operator(kit: Kit) -> None:
    """Compiled attention is one graph, where the adapter says by `traced_call` what a graph must know."""
    if type(kit.adapter).traced_call is Adapter.traced_call:
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


CHECKS: Sequence[Any] = (compiled_is_one_operator,)
