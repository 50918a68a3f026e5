"""torch.compile: attention runs eagerly between a fixed number of graphs, however long and deep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing.adapter import find_adapter
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow
from headforcing.testing import Rig
from headforcing.testing.hosts import find_host

MIXED: tuple[HeadRole, ...] = (Local(), Anchor(), Memory(), SlidingWindow(6, positions="absolute"))
ORDERS = pytest.mark.parametrize("first", ["roles first", "compile first"])
WARM, CHUNKS = 2, 30


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def apply(model: Any) -> None:
    """Other roles in every layer, so that layers are not alike."""
    modules = [module for _, module in find_adapter(model).attentions(model)]
    heads, _ = find_adapter(model).heads(modules[0])
    turned = [MIXED[layer % 4 :] + MIXED[: layer % 4] for layer in range(len(modules))]
    hf.apply_head_forcing(model, [[row[head % 4] for head in range(heads)] for row in turned])


def graphs() -> dict[str, Any]:
    """What dynamo has made so far: graphs, frames, reasons for breaks."""
    counted = torch._dynamo.utils.counters
    breaks = sum(counted["graph_break"].values())
    return {"graphs": counted["stats"]["unique_graphs"], "frames": dict(counted["frames"]), "breaks": breaks}


def compiled(model: nn.Module, first: str) -> Any:
    if first == "roles first":
        apply(model)
    wrapper = torch.compile(model, backend="eager")
    if first == "compile first":
        apply(wrapper)
    return wrapper


@torch.no_grad()
def passes(host: Any, model: Any, caches: Any, chunks: range) -> list[Tensor]:
    step = host.chunk
    return [host.call(model, caches, chunk * step, step, draw) for chunk in chunks for draw in (1, 0)]


@ORDERS
@pytest.mark.parametrize("name", ["self_forcing", "causvid", "longlive"])
def test_nothing_is_compiled_after_the_second_chunk(name: str, first: str) -> None:
    host = find_host(name)
    model = compiled(host.model(), first)
    caches = host.caches(model)
    got = passes(host, model, caches, range(WARM))
    warm = graphs()
    assert warm["graphs"] > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += passes(host, model, caches, range(WARM, WARM + CHUNKS))
    assert graphs() == warm
    eager = host.model()
    apply(eager)
    expected = passes(host, eager, host.caches(eager), range(WARM + CHUNKS))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("what", ["model", "blocks"])
def test_a_deeper_model_has_no_more_graphs(what: str) -> None:
    """More than dynamo would recompile before it gave up, were every layer a case of its own."""
    counts = []
    for layers in (2, torch._dynamo.config.recompile_limit + 2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        rig = Rig(9, layers=layers)
        apply(rig.model)
        caches, own = rig.caches(), rig.model
        if what == "model":
            rig.model = torch.compile(own, backend="eager")  # type: ignore[assignment]
        else:
            for block in own.blocks:
                block.compile(backend="eager")
        rig.video(caches, 3)
        counts.append(graphs()["graphs"])
    assert counts[0] == counts[1] > 0
