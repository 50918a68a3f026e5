"""The conformance kit: does an adapter fulfil the contract of `headforcing.Adapter`?

    >>> from tests.hosts.self_forcing import SelfForcingHost
    >>> report = check_adapter(None, SelfForcingHost(), only=["fits", "layers_in_order"])
    >>> report.ok, [result.name for result in report.results]
    (True, ['fits', 'layers_in_order'])

The author of an adapter writes a `Host`: a tiny model and the calls its pipeline makes. The kit runs it with
and without head forcing. Checks go from single methods of the adapter to whole videos, so fix the first one
that fails; later failures may be consequences of it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from headforcing.adapters.base import Adapter, find_adapter
from headforcing.errors import OptionError
from headforcing.testing.checks import compile as checks_compile
from headforcing.testing.checks import host as checks_host
from headforcing.testing.checks import leaving as checks_leaving
from headforcing.testing.checks import life as checks_life
from headforcing.testing.checks import parity as checks_parity
from headforcing.testing.checks import reading as checks_reading
from headforcing.testing.checks import rotation as checks_rotation
from headforcing.testing.host import Host
from headforcing.testing.kit import Caught, Kit, Skipped

__all__ = ["Host", "Report", "Result", "check_adapter", "check_names"]

Progress = Callable[[int, int, str], None]
"""Called before each check with its number, how many there are, and its name."""
Outcome = Literal["passed", "failed", "skipped"]

_CHECKS: tuple[Callable[[Kit], None], ...] = (
    *checks_host.CHECKS,
    *checks_reading.CHECKS,
    *checks_rotation.CHECKS,
    *checks_parity.CHECKS,
    *checks_life.CHECKS,
    *checks_compile.CHECKS,
    *checks_leaving.CHECKS,
)
_NEEDED = ("host_repeats_itself", "host_depends_on_its_input", "host_starts_again", "fits", "layers_found")
"""Without these no other check makes sense."""


@dataclass(frozen=True)
class Result:
    """The result of one check.

    Attributes:
        name: of the check.
        proves: what is known if it passes.
        outcome: passed, failed or skipped.
        reason: why it failed and what to check, or why it was skipped.
        seconds: how long it took.
        compared: passes of an applied model that were compared with the unmodified one.
        apart: the largest difference among them, over the root mean square of the output; 0: they are equal
            bit for bit. More only up to `Host.rounding`.
    """

    name: str
    proves: str
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0
    compared: int = 0
    apart: float = 0.0

    @property
    def measured(self) -> str:
        """What a check that passed has measured, in words; empty: it compared no passes."""
        if not self.compared or self.outcome != "passed":
            return ""
        many = f"{self.compared} pass{'es' * (self.compared != 1)}"
        if not self.apart:
            return f"equal bit for bit in {many}"
        return f"equal to rounding in {many}: differences up to {self.apart:.2g} of the root mean square"


@dataclass(frozen=True)
class Report:
    """The results of all checks.

    Attributes:
        adapter: name of the adapter.
        host: class of the host.
        results: in the order of the checks.
    """

    adapter: str
    host: str
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Result, ...]:
        """The checks that failed; begin with the first."""
        return tuple(result for result in self.results if result.outcome == "failed")

    @property
    def rounded(self) -> tuple[Result, ...]:
        """The checks that passed because of `Host.rounding`."""
        return tuple(result for result in self.results if result.outcome == "passed" and result.apart)

    def count(self, outcome: Outcome) -> int:
        """The number of checks with this outcome."""
        return sum(result.outcome == outcome for result in self.results)

    def raise_if_failed(self) -> None:
        """For tests.

        Raises:
            AssertionError: a check failed; the message is the report.
        """
        if self.failed:
            raise AssertionError(str(self))

    @property
    def summary(self) -> str:
        """How many checks passed, how many of them only to rounding, failed, were skipped."""
        outcomes: tuple[Outcome, ...] = ("passed", "failed", "skipped")
        counts = ", ".join(f"{self.count(name)} {name}" for name in outcomes)
        return f"{counts}; {len(self.rounded)} passed only to rounding" if self.rounded else counts

    def __str__(self) -> str:
        lines = [f"{self.adapter} with {self.host}: {self.summary}"]
        for result in self.results:
            if result.outcome != "passed" or result.apart:
                lines.append(f"  {result.outcome} {result.name}: {result.reason or result.measured}")
            if result.outcome == "failed":
                lines.append(f"    it proves: {result.proves}")
        return "\n".join(lines)


def _silent(done: int, total: int, name: str) -> None:
    """Shows no progress."""


def check_names() -> tuple[str, ...]:
    """The names of all checks, in order."""
    return tuple(check.__name__ for check in _CHECKS)


def check_adapter(
    adapter: Adapter | None,
    host: Host,
    *,
    only: Sequence[str] | None = None,
    stop: bool = False,
    progress: Progress = _silent,
) -> Report:
    """Runs the checks; exceptions inside them become failures.

    Args:
        adapter: what is checked; `None`: the adapter of the host, or else the one that fits its model.
        host: runs the model.
        only: names of checks to run; default all.
        stop: skip what comes after the first failure.
        progress: called before each check.

    Raises:
        OptionError: there is no such check, or `host` is not a `Host`.
        UnsupportedModelError: no adapter is given and none fits.
    """
    if not isinstance(host, Host):
        raise OptionError(
            f"host is {host!r:.80}: expected an instance of a subclass of headforcing.testing.Host"
        )
    if unknown := sorted(set(only or ()) - set(check_names())):
        raise OptionError(f"no check is called {unknown[0]!r}: expected one of {', '.join(check_names())}")
    adapter = adapter or host.adapter or find_adapter(host.model())
    if not isinstance(adapter, Adapter):
        raise OptionError(
            f"adapter is {adapter!r:.80}: expected an instance of a subclass of headforcing.Adapter"
        )
    chosen = [check for check in _CHECKS if only is None or check.__name__ in only]
    needed = tuple(check_names() if stop else _NEEDED)
    results = tuple(_run(Kit(adapter, host), chosen, needed, progress))
    return Report(adapter.name, type(host).__name__, results)


def _run(
    kit: Kit, checks: Sequence[Callable[[Kit], None]], needed: Sequence[str], progress: Progress
) -> Iterator[Result]:
    with torch.no_grad(), Caught():  # an error here shows again in a check
        kit.anchored = kit.calls(kit.plain(), 0)[0][2].anchor is not None
    broken: str | None = None
    for number, check in enumerate(checks):
        progress(number, len(checks), check.__name__)
        if broken is not None:
            yield _result(check, "skipped", f"requires {broken}")
            continue
        result = _one(kit, check)
        if result.outcome == "failed" and result.name in needed:
            broken = result.name
        yield result
    progress(len(checks), len(checks), "done")


def _one(kit: Kit, check: Callable[[Kit], None]) -> Result:
    started = time.perf_counter()
    kit.compared, kit.apart = 0, 0.0
    with torch.no_grad(), Caught() as caught:
        check(kit)
    seconds, error = time.perf_counter() - started, caught.error
    if error is None:
        proves = inspect.getdoc(check) or ""
        return Result(check.__name__, proves, "passed", "", seconds, kit.compared, kit.apart)
    if isinstance(error, Skipped):
        return _result(check, "skipped", str(error), seconds)
    said = (
        str(error) if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__}: {error}"
    )
    return _result(check, "failed", f"{said}{_where(error)}", seconds)


def _result(check: Callable[[Kit], None], outcome: Outcome, reason: str, seconds: float = 0.0) -> Result:
    return Result(check.__name__, inspect.getdoc(check) or "", outcome, reason, seconds)


def _where(error: Exception) -> str:
    """The innermost line that raised, unless it is the check itself."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or isinstance(error, AssertionError):
        return ""
    code = trace.tb_frame.f_code
    return f" (in {code.co_name}, {code.co_filename}:{trace.tb_lineno})"
