"""Faults at every operator of torch and at every line of the package, one at a time."""

from __future__ import annotations

import linecache
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from torch.utils._python_dispatch import TorchDispatchMode

from tests.examples import CI, examples

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / part) for part in ("headforcing/stores", "headforcing/roles"))
PASSES = (
    *OURS,
    *(str(ROOT / part) for part in ("headforcing/attention", "headforcing/adapters", "integrations")),
)

Kind = Literal["before", "after", "line"]
"""An operator that does nothing but fail, one that fails when it is done, and a line of Python."""


class Fault(BaseException):
    """What is raised; like Ctrl-C, no `except Exception` stops it."""


class _Operators(TorchDispatchMode):
    def __init__(self, at: int | None, after: bool) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.at, self.after = at, after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(len(self.seen))
        due = len(self.seen) - 1 == self.at
        if due and not self.after:
            raise Fault(f"before {func}")
        out = func(*args, **(kwargs or {}))
        if due:
            raise Fault(f"after {func}")
        return out


class Lines:
    """Does something at one line of the files below `where`: raises."""

    def __init__(self, at: int | None, where: Sequence[str]) -> None:
        self.seen: list[Any] = []
        self.at, self.where = at, tuple(where)

    def __enter__(self) -> Lines:
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def arrive(self, place: str) -> None:
        """What happens there."""
        raise Fault(place)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self.where) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            code = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            if code.lstrip().startswith("with "):  # also seen on the way out, where no interrupt is delivered
                return self._line
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) - 1 == self.at:
                self.arrive(f"{frame.f_code.co_filename}:{frame.f_lineno}: {code.strip()}")
        return self._line


def meet(
    kind: Kind, at: int | None, act: Callable[[], Any], where: Sequence[str] = OURS
) -> tuple[list[Any], str | None]:
    """Acts with a fault at one operator or line: what was met, and where the fault was, if there was one."""
    injector = Lines(at, where) if kind == "line" else _Operators(at, kind == "after")
    try:
        with injector:
            act()
    except Fault as fault:
        return injector.seen, str(fault)
    return injector.seen, None


def places(seen: Sequence[Any], least: int, seed: int = 0) -> list[int]:
    """Where to fail: each operator and line once in the long run, `least` of them, drawn, in the fast one."""
    dice = random.Random(seed)
    order = dice.sample(range(len(seen)), len(seen))
    each = sorted({seen[at]: at for at in order}.values())
    return each if examples(CI) > CI else dice.sample(each, min(least, len(each)))
