"""The kit on a model with everything that porters stumbled over, and what it says of it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from headforcing.cli import app
from headforcing.errors import StreamShapeError
from headforcing.roles import Local, SlidingWindow
from headforcing.testing import Host, check_adapter
from headforcing.testing.conformance import Report
from headforcing.testing.kit import Kit
from tests.faults import PASSES, Kind, meet, places
from tests.testing.ripple import WINDOWS, RippleAdapter, RippleHost, RippleOnSDPA

SKIPPED = {
    "host_takes_batches": "takes one sample",
    "batch_of_two": "takes one sample",
    "rotation_keeps_the_dtype": "does not run in torch.bfloat16: AssertionError('float32 only')",
    "dense_parity_bf16": "does not run in torch.bfloat16: AssertionError('float32 only')",
    "parity_through_eviction_bf16": "does not run in torch.bfloat16: AssertionError('float32 only')",
    "other_dtype_refused": "does not run in torch.bfloat16: AssertionError('float32 only')",
    "clock_tells_the_clean_pass": "clock() returns None",
    "counters_move": "no counters",
    "edited_cache_refused": "no counters",
    "prompt_switch_takes_effect": "switch_prompt is refused",
    "compiled_is_one_operator": "between two graphs",
}


def sit(only: str, host: Host | None = None, adapter: Any = None) -> Any:
    (result,) = check_adapter(adapter, host or RippleHost(), only=[only]).results
    return result


@pytest.mark.parametrize("host", [RippleHost(), RippleOnSDPA()], ids=["its kernel", "SDPA"])
def test_it_passes_and_what_it_cannot_do_is_skipped_with_the_reason(host: RippleHost) -> None:
    report = check_adapter(None, host)
    report.raise_if_failed()
    reasons = {result.name: result.reason for result in report.results if result.outcome == "skipped"}
    assert reasons.keys() == SKIPPED.keys()
    assert [name for name, reason in SKIPPED.items() if reason not in reasons[name]] == []
    compared = [result for result in report.results if result.compared]
    assert len(compared) > 10
    assert len(report.rounded) == (len(compared) if host.rounding else 0)
    for result in report.results:
        assert 0 <= result.apart <= (0.05 if result.name == "autocast" else host.rounding)
        how = "equal to rounding in" if result.apart else "equal bit for bit in"
        assert result.measured.startswith(how if result.compared else "")
        assert (result.measured in str(report)) is (not result.compared or bool(result.apart))
    assert ("passed only to rounding" in str(report)) is bool(host.rounding)


def test_the_command_says_what_was_measured() -> None:
    said = {}
    for host in ("RippleHost", "RippleOnSDPA"):
        command = ["check", f"tests.testing.ripple:{host}", "--only", "fits,first_chunk", "--quiet"]
        answer = CliRunner().invoke(app, command)
        assert answer.exit_code == 0, answer.output
        said[host] = " ".join(answer.output.replace("│", " ").split())
    assert "2 passed, 0 failed, 0 skipped; 1 passed only to rounding" in said["RippleHost"]
    assert "Measured: equal to rounding in 1 pass" in said["RippleHost"]
    assert "2 passed, 0 failed, 0 skipped" in said["RippleOnSDPA"]
    assert "Measured: equal bit for bit in 1 pass" in said["RippleOnSDPA"]
    assert "rounding" not in said["RippleOnSDPA"]


# Rounding hides nothing ---------------------------------------------------------------------------


class TooSmall(RippleHost):
    rounding = 1e-12


class TooLarge(RippleHost):
    rounding = 10.0


def test_rounding_has_a_limit_that_is_said() -> None:
    result = sit("first_chunk", TooSmall())
    assert result.outcome == "failed"
    assert "of the root mean square, Host.rounding allows 1e-12" in result.reason
    assert not result.measured


def test_rounding_that_would_hide_other_roles_is_refused() -> None:
    assert sit("another_role_shows").outcome == "passed"
    result = sit("another_role_shows", TooLarge())
    assert result.outcome == "failed"
    assert "is Host.rounding of 10 too large" in result.reason


class LittleOff(RippleAdapter):
    """Off by little, but by more than rounding."""

    def output(self, module: Any, out: Tensor, call: Any, memo: Any) -> Any:
        y, first = super().output(module, out, call, memo)
        return y * (1 + 1e-4), first


class NoGate(RippleAdapter):
    def output(self, module: Any, out: Tensor, call: Any, memo: Any) -> Any:
        call.arguments["gate"] = torch.ones(())
        return super().output(module, out, call, memo)


class NoFirst(RippleAdapter):
    """The values of its own layer in place of those of the first."""

    def output(self, module: Any, out: Tensor, call: Any, memo: Any) -> Any:
        y, _ = super().output(module, out, call, memo)
        v = module.to_v(call.x).unflatten(-1, (2, -1)).transpose(1, 2)
        return y, v


@pytest.mark.parametrize("bug", [LittleOff, NoGate, NoFirst])
@pytest.mark.parametrize("host", [RippleHost(), RippleOnSDPA()], ids=["its kernel", "SDPA"])
def test_a_bug_is_no_rounding(bug: type[RippleAdapter], host: RippleHost) -> None:
    assert sit("first_chunk", host, bug()).outcome == "failed"


class NaN(RippleAdapter):
    def output(self, module: Any, out: Tensor, call: Any, memo: Any) -> Any:
        return super().output(module, out * float("nan"), call, memo)


def test_no_number_is_no_rounding() -> None:
    assert sit("first_chunk", TooLarge(), NaN()).outcome == "failed"


class Drifts(RippleHost):
    """Every call differs from the one before, by less than its rounding."""

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().call(model, caches, start, frames, draw) * (1 + 1e-6 * self.calls)


@pytest.mark.parametrize(
    "name", ["host_repeats_itself", "training_passes_through", "host_works_after_remove"]
)
def test_the_original_is_compared_bit_for_bit(name: str) -> None:
    assert sit(name).outcome == "passed"
    assert sit(name, Drifts()).outcome == "failed"


# Layers with different windows --------------------------------------------------------------------


class OneWindow(RippleAdapter):
    def own_memory(self, model: nn.Module) -> Any:
        return [SlidingWindow(6, positions="absolute") for _ in WINDOWS]


class OneWindowHost(RippleHost):
    memory = SlidingWindow(6, positions="absolute")  # type: ignore[assignment]


def test_the_memory_of_every_layer_is_compared() -> None:
    assert sit("own_memory_is_the_hosts", None, OneWindow()).outcome == "failed"
    assert sit("own_memory_is_the_hosts", OneWindowHost(), OneWindow()).outcome == "passed"
    assert sit("parity_through_eviction", OneWindowHost()).outcome == "failed"


# What the untouched model cannot do ---------------------------------------------------------------


class SecondChunkFails(RippleOnSDPA):
    """Fails in bfloat16 after the first chunk."""

    def call(self, model: nn.Module, caches: Any, start: int, frames: int, draw: int) -> Tensor:
        low = next(model.parameters()).dtype == torch.bfloat16
        if low and start:
            raise RuntimeError("expected mat1 and mat2 to have the same dtype")
        return super().call(copy.deepcopy(model).float(), caches, start, frames, draw)


class FailsLow(RippleAdapter):
    def project(self, module: Any, call: Any) -> Any:
        raise StreamShapeError("never")


def test_an_adapter_is_blamed_only_for_what_the_host_can_do() -> None:
    blamed = sit("dense_parity_bf16", SecondChunkFails(), FailsLow())
    assert (blamed.outcome, "same dtype" in blamed.reason) == ("skipped", True)
    assert sit("dense_parity", SecondChunkFails(), FailsLow()).outcome == "failed"


# Between project and output -----------------------------------------------------------------------


class Leaks(RippleAdapter):
    """What belongs to a call is on the adapter."""

    def project(self, module: Any, call: Any) -> Any:
        parts = super().project(module, call)
        self.gates = getattr(self, "gates", {})
        call.arguments["gate"] = self.gates.setdefault(id(module), call.arguments["gate"])
        return parts


def test_state_of_another_call_is_found() -> None:
    assert sit("rewritten_chunk", None, Leaks()).outcome == "failed"


@pytest.mark.parametrize("kind", ["before", "after", "line"])
def test_a_pass_that_failed_is_made_again_with_state_of_its_own(kind: Kind) -> None:
    host = RippleOnSDPA()
    kit, role = Kit(host.adapter, host), Local(1, sink=1)

    def standing() -> Any:
        take = kit.forced(role)
        take.passes(0, (1, 0))
        return take, lambda: take.passes(1, (1,))

    with torch.no_grad():
        expected = standing()[1]()
        seen, _ = meet(kind, None, standing()[1], PASSES)
        for at in places(seen, 12):
            take, act = standing()
            meet(kind, at, act, PASSES)
            assert all(map(torch.equal, take.passes(1, (1,)), expected)), at


def test_state_is_kept_where_graphs_break() -> None:
    host = RippleOnSDPA()
    kit = Kit(host.adapter, host)
    torch._dynamo.reset()
    with torch.no_grad():
        take = kit.forced(kit.memory)
        take.model.compile(backend="eager")
        assert all(map(torch.equal, take.video(6), kit.truth(6)))
    torch._dynamo.reset()


def test_reports_of_exact_hosts_are_as_before() -> None:
    report = Report("a", "h", check_adapter(None, RippleOnSDPA(), only=["fits", "first_chunk"]).results)
    assert str(report) == "a with h: 2 passed, 0 failed, 0 skipped"
    assert dataclasses.asdict(report)["results"][1]["apart"] == 0
