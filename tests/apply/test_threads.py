"""Calls of the handle from another thread at any line of a pass: all layers follow at one chunk, or none."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import headforcing as hf
from headforcing.errors import HeadForcingError
from headforcing.roles import Anchor, HeadRole, Local, Memory
from headforcing.stores.switch import Switch
from tests.examples import CI, examples
from tests.faults import PASSES, Lines, places
from tests.hosts.rig import Rig

ROLES: list[HeadRole] = [Local(3), Anchor(1, recent=1), Memory(1, 2, 2), Local(2, sink=1)]
PASSES_OF = list(itertools.product(range(0, 12, 3), (1, 0)))
"""First frame and draw of every pass; draw 0 is the clean one."""
Ask = Callable[[hf.HeadForcing], Any]
ASKS: dict[str, Ask] = {
    "cut": lambda handle: handle.switch_prompt("cut", keep=("sink",)),
    "smooth": lambda handle: handle.switch_prompt("smooth"),
    "recache": lambda handle: handle.switch_prompt("recache", frames=3),
    "mark": lambda handle: (handle.mark("a"), handle.switch_prompt("recall", mark="a")),
    "reset": hf.HeadForcing.reset,
    "commit": hf.HeadForcing.commit,
    "remove": hf.HeadForcing.remove,
    "status": lambda handle: (str(handle.status()), handle.marks, handle.frames(0, 0)),
}


class Asking(Lines):
    """Asks in another thread when this one is at a line, and waits for the answer a moment."""

    def __init__(self, at: int | None, ask: Callable[[], Any]) -> None:
        super().__init__(at, PASSES)
        self.refused: list[HeadForcingError] = []
        self.errors: list[Exception] = []
        self.ask = ask
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        try:
            self.ask()
        except HeadForcingError as error:
            self.refused.append(error)
        except Exception as error:
            self.errors.append(error)

    def arrive(self, place: str) -> None:
        self.thread.start()
        self.thread.join(0.05)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self.thread.ident is not None:
            self.thread.join()


def applied() -> tuple[Rig, hf.HeadForcing, Any]:
    rig = Rig(9)
    return rig, hf.apply_head_forcing(rig.model, [ROLES, ROLES[::-1]]), rig.caches()


def asked_before(ask: Ask | None, when: int) -> list[Tensor]:
    """The video where nobody asks in the middle of a pass."""
    rig, handle, caches = applied()
    outs = []
    for start, draw in PASSES_OF:
        if ask is not None and (start, draw) == (when, 1):
            ask(handle)
        outs.append(rig.call(caches, start, 3, draw=draw))
    return outs


@functools.cache
def undisturbed() -> list[Tensor]:
    return asked_before(None, 0)


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def check(what: str, when: tuple[int, int], least: int) -> None:
    """Asks at some lines of the pass `when`."""
    ask, expected = ASKS[what], [undisturbed()]
    if what not in ("status", "reset", "commit", "remove"):
        expected += [asked_before(ask, when[0] + later) for later in (0, 3)] if what != "recache" else []

    def run(at: int | None) -> tuple[Asking, list[Tensor] | HeadForcingError]:
        rig, handle, caches = applied()
        asking, outs = Asking(at, lambda: ask(handle)), []
        try:
            for start, draw in PASSES_OF:
                if (start, draw) == when:
                    with asking:
                        outs.append(rig.call(caches, start, 3, draw=draw))
                else:
                    outs.append(rig.call(caches, start, 3, draw=draw))
        except HeadForcingError as error:
            return asking, error
        return asking, outs

    for at in places(run(None)[0].seen, least, seed=len(what)):
        asking, outs = run(at)
        assert not asking.errors, asking.errors
        if isinstance(outs, HeadForcingError):
            assert what in ("reset", "commit", "recache"), (asking.seen[at], outs)
            assert not asking.refused, (asking.seen[at], outs)
        elif asking.refused:
            assert equal(outs, expected[0]), (what, asking.seen[at], "refused, but not without effect")
        elif what != "remove":
            assert any(equal(outs, one) for one in expected), (what, asking.seen[at])


FAST_ASKS = ("cut", "recache", "commit", "remove")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what in FAST_ASKS else pytest.mark.slow) for what in ASKS]
)
def test_whoever_asks_in_the_middle_of_a_pass_all_layers_follow_at_one_chunk(what: str) -> None:
    if examples(CI) > CI:
        for when in ((6, 1), (6, 0), (3, 1)):
            check(what, when, 0)
    else:
        check(what, (6, 1), 2)


def test_requests_that_go_to_the_layers_one_by_one_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: hf.HeadForcing, mode: Any, **rest: Any) -> None:
        for _, stream in self._streams():
            stream.store.scenes.ask(Switch(mode, **rest))

    monkeypatch.setattr(hf.HeadForcing, "switch_prompt", wrong)
    with pytest.raises(AssertionError, match="cut"):
        check("cut", (6, 1), 30)
