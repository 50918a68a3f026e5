"""What an adapter notes on a call in `project` is there in `output`, and in no other call."""

from __future__ import annotations

import functools
import threading
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from headforcing.adapters.base import Adapter
from headforcing.integrations.anyflow_far import AnyFlowFAR
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import Local
from headforcing.testing import check_adapter
from headforcing.testing.kit import Kit
from tests.hosts import find_host


class Noting(Adapter):
    """In front of an adapter: the note of a call is a tensor of what it projects."""

    notes: ClassVar[list[int]] = []

    def project(self, module: nn.Module, call: Any) -> Any:
        assert "note" not in call.arguments, "of another call"
        parts = super().project(module, call)  # type: ignore[safe-super]
        call.arguments["note"] = parts[2].sum(), threading.get_ident()
        self.notes.append(id(call.arguments))
        return parts

    def rotate(self, x: Any, call: Any, *more: Any) -> Any:
        assert "note" in call.arguments, "it is there for queries and keys, of whichever heads"
        return super().rotate(x, call, *more)  # type: ignore[safe-super]

    def output(self, module: nn.Module, out: Any, call: Any, memo: Any) -> Any:
        note, thread = call.arguments.pop("note")
        assert torch.equal(note, super().project(module, call)[2].sum())  # type: ignore[safe-super]
        assert thread == threading.get_ident()
        return super().output(module, out, call, memo)  # type: ignore[safe-super]


class OnSelfForcing(Noting, SelfForcing):
    """One operator per call under a compiler."""


class OnAnyFlow(Noting, AnyFlowFAR):
    """A clean pass is split into chunks."""


@pytest.fixture(autouse=True)
def no_notes() -> None:
    Noting.notes.clear()


CHECKS = ["rewritten_chunk", "two_caches_in_turn", "threads_are_independent", "compiled_is_one_operator"]
TRAINS = ["gradients_pass_through", "training_passes_through"]


def test_on_every_call_of_a_model_also_in_a_graph() -> None:
    check_adapter(OnSelfForcing(), find_host("self_forcing"), only=CHECKS).raise_if_failed()
    assert len(Noting.notes) > 50


def test_on_every_chunk_of_a_split_call() -> None:
    host = find_host("anyflow_far")
    if reason := host.missing():
        pytest.skip(reason)
    kit = Kit(OnAnyFlow(), host)
    with torch.no_grad():
        take, chunk = kit.forced(), host.chunk
        take.passes(0, (1, 0))
        take.passes(chunk, (1,))
        Noting.notes.clear()
        take.passes(chunk, (0,))
    assert len(Noting.notes) == 2 * host.layers, "two chunks in every layer"


def test_training_leaves_no_note() -> None:
    check_adapter(OnSelfForcing(), find_host("self_forcing"), only=TRAINS).raise_if_failed()
    assert Noting.notes == []


def test_blocks_that_are_checkpointed() -> None:
    """In training the original runs, also when a block is computed again; else every call has its note."""
    host = find_host("self_forcing")
    kit = Kit(OnSelfForcing(), host)
    grads = []
    for take in (kit.plain(), kit.forced(Local())):
        for block in take.model.blocks:  # type: ignore[union-attr]
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        with torch.no_grad():
            take.passes(0, (1, 0))
        take.model.requires_grad_(True).train()
        out = host.uncached(take.model)
        assert out is not None
        out.square().mean().backward()
        grads.append([each.grad for each in take.model.parameters() if each.grad is not None])
    assert len(Noting.notes) == 2 * host.layers
    assert grads[0]
    assert all(map(torch.equal, *grads))


class Forgets(OnSelfForcing):
    """Notes go to one dict for all calls."""

    shared: ClassVar[dict[str, Any]] = {}

    def read(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = super().read(module, args, kwargs)
        if call is not None:
            self.shared.update({"k": 0, **call.arguments})
            vars(call)["arguments"] = self.shared
        return call

    def output(self, module: nn.Module, out: Any, call: Any, memo: Any) -> Any:
        note = call.arguments["note"]
        y = super().output(module, out, call, memo)
        call.arguments["note"] = note
        return y


def test_a_note_that_stays_is_found() -> None:
    (result,) = check_adapter(Forgets(), find_host("self_forcing"), only=["rewritten_chunk"]).results
    assert result.outcome == "failed"
    assert "of another call" in result.reason
