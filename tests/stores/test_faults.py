"""A fault at any operator or line of what changes a store: the retry is as if there had been none."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from headforcing.errors import HeadForcingError
from headforcing.roles import Full, HeadRole, Local, Memory
from headforcing.roles.base import sees_compressed
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Veil, Wave
from headforcing.roles.reward_forcing import EmaSink
from headforcing.stores import STORES, KVStore
from headforcing.stores.bank import Bank
from headforcing.stores.buffered import BufferedBank
from headforcing.stores.compressed import CompressedHistories
from headforcing.stores.switch import Switch
from headforcing.types import Chunk, Heads, Pin, Truncation
from tests.examples import CI, examples
from tests.faults import OURS, Kind, meet, places
from tests.strategies import GRID, frame_tensor, queries

WINDOW = 12
ROWS: dict[str, list[HeadRole]] = {
    "frames": [
        Memory(1, 2, 2),
        Local(5, sink=1),
        Full(),
        Memory(1, 2, 2),
        Wave(near=9, far=WINDOW, period=2, cap=1),
    ],
    "compressed": [
        Averaging(8, sink=1),
        Veil(sink=1, near=9, far=WINDOW, blocks=1),
        EmaSink(8, sink=2),
        Participating(9, sink=1, recent=3),
        Dynamic(),
    ],
}
KINDS: tuple[Kind, ...] = ("before", "after", "line")
Step = Callable[[KVStore], None]


def encode(x: Tensor, positions: Any, patch: int = 1) -> Tensor:
    return x + 1000.0 * torch.tensor(positions, dtype=x.dtype)[:, None, None, None]


def store_of(name: str, row: Sequence[HeadRole]) -> KVStore:
    heads: dict[HeadRole, list[int]] = {}
    for head, role in enumerate(row):
        heads.setdefault(role, []).append(head)
    return STORES[name]({r: Heads(own, len(row)) for r, own in heads.items()}, window=WINDOW, layer=0)


def look(store: KVStore) -> list[Any]:
    """All that attention reads of the pending chunk."""
    found: list[Any] = []
    for role in store.heads:
        assert store.pending is not None
        for query in queries(role, store.pending):
            view = store.view(role, "denoise", encode, query)
            found.append((view.frames, view.positions, view.k.clone(), view.v.clone()))
            if sees_compressed(role, "denoise"):
                tokens = store.view_compressed(role, encode, query)
                found.append(None if tokens is None else tuple(x.clone() for x in tokens))
    return found


def chunk(
    start: int, length: int = 3, take: int = 0, batch: int = 1, rolling: bool = False, seen: bool = True
) -> Step:
    def step(store: KVStore) -> None:
        heads = sum(map(len, store.heads.values()))
        x = frame_tensor(range(start, start + length), take, batch, heads, tokens=GRID[0] * GRID[1])
        store.write(Chunk(start, x, x + 1, GRID, x + 2, rolling=rolling))
        if seen:
            look(store)

    return step


def edited(edit: Any, start: int) -> Step:
    def step(store: KVStore) -> None:
        store.edit(edit, start)
        chunk(start, take=3)(store)

    return step


def ask(switch: Switch) -> Step:
    return lambda store: store.scenes.ask(switch)


def mark(store: KVStore) -> None:
    store.scenes.mark("a")


VIDEO = [chunk(start, seen=start > 6) for start in range(0, 15, 3)]
"""Ends with a pending chunk of frames 12, 13 and 14."""
ACTS: dict[str, tuple[list[Step], Step]] = {
    "first": ([], chunk(0)),
    "again": (VIDEO, chunk(12, take=1)),
    "commit": (VIDEO, chunk(15)),
    "longer": ([chunk(0, 2), chunk(2, 2)], chunk(4, 4)),
    "by hand": (VIDEO, KVStore.commit),
    "overlap": (VIDEO, chunk(14)),
    "mark": ([*VIDEO, mark], chunk(15)),
    "continue": ([*VIDEO, ask(Switch("continue"))], chunk(15)),
    "cut": ([*VIDEO, ask(Switch("cut", ("sink",)))], chunk(15)),
    "smooth": ([*VIDEO, mark, ask(Switch("smooth"))], chunk(15)),
    "recall": ([*VIDEO[:3], mark, *VIDEO[3:], ask(Switch("recall", mark="a"))], chunk(15)),
    "recache": ([*VIDEO, ask(Switch("recache", frames=3))], chunk(12, take=2)),
    "emptied": (VIDEO, edited(Truncation(2), 12)),
    "pinned": (VIDEO, edited(Pin(12, 1), 12)),
    "window": ([chunk(0, 4, rolling=True)], chunk(2, 4, rolling=True)),
    "grown": ([chunk(0, 2, rolling=True)], chunk(0, 4, rolling=True)),
    "new video": (VIDEO, chunk(0, take=4)),
    "other shape": (VIDEO, chunk(0, take=4, batch=2)),
}


def after(store: KVStore) -> list[Any]:
    """What is stored now, and what the next chunks and another video see."""
    found: list[Any] = [store.committed, store.pending, store.prompt_pending, store.scenes.marks]
    found.append([store.frames(role) for role in store.heads])
    if store.pending is not None:
        found.append(look(store))
    batch, start = store._shape.sizes[0], store.frames_so_far  # type: ignore[union-attr]
    if store.scenes.marks:
        store.scenes.ask(Switch("recall", mark="a"))
    for begin in (start, start + 3, 0):
        chunk(begin, take=5, batch=batch, seen=False)(store)
        found += look(store)
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def before(name: str, row: Sequence[HeadRole], what: str) -> KVStore:
    """A store that is about to do an act."""
    store = store_of(name, row)
    for step in ACTS[what][0]:
        step(store)
    return store


def check(
    name: str, row: Sequence[HeadRole], what: str, kind: Kind, least: int, where: Sequence[str] = OURS
) -> None:
    """Fails at many places of an act, and acts again."""
    fresh, act = functools.partial(before, name, row, what), ACTS[what][1]
    undisturbed = fresh()
    seen, _ = meet(kind, None, lambda: act(undisturbed), where)
    expected = after(undisturbed)
    for at in places(seen, least, seed=len(what)):
        store = fresh()
        _, place = meet(kind, at, lambda: act(store), where)  # noqa: B023 - called at once
        assert place is not None
        act(store)
        assert same(after(store), expected), place


@pytest.mark.parametrize("what", ACTS)
@pytest.mark.parametrize("name", ["lean", pytest.param("reference", marks=pytest.mark.slow), "ring"])
def test_after_a_fault_anywhere_the_same_again_is_as_if_there_was_none(name: str, what: str) -> None:
    if examples(CI) > CI:
        for kind, row in itertools.product(KINDS, ROWS.values()):
            check(name, row, what, kind, 0)
        return
    dice = random.Random(name + what)
    check(name, ROWS[dice.choice(["frames", "compressed"])], what, dice.choice(KINDS), 1)


def check_all_or_nothing(
    name: str, row: Sequence[HeadRole], what: str, kind: Kind, least: int, where: Sequence[str] = OURS
) -> None:
    """Fails at many places of an act, and goes on: the act happened in all roles, or in none."""
    fresh, act = functools.partial(before, name, row, what), ACTS[what][1]
    undisturbed, undone = fresh(), fresh()
    seen, _ = meet(kind, None, lambda: act(undisturbed), where)
    expected = [after(undisturbed), after(undone)]
    for at in places(seen, least, seed=len(what)):
        store = fresh()
        _, place = meet(kind, at, lambda: act(store), where)  # noqa: B023 - called at once
        assert place is not None
        found = after(store)
        assert any(same(found, one) for one in expected), place


WHOLE = ("again", "commit", "by hand", "overlap", "cut", "smooth", "recall")
"""Acts that happen in all roles or in none; where a video begins, what was there is gone first."""


@pytest.mark.parametrize(
    "what", [one if one == "again" else pytest.param(one, marks=pytest.mark.slow) for one in WHOLE]
)
@pytest.mark.parametrize("name", ["lean", pytest.param("reference", marks=pytest.mark.slow), "ring"])
def test_after_a_fault_anywhere_an_act_happened_in_all_roles_or_in_none(name: str, what: str) -> None:
    for kind, row in itertools.product(KINDS, ROWS.values()):
        check_all_or_nothing(name, row, what, kind, 0 if examples(CI) > CI else 3)


# Planted bugs ---------------------------------------------------------------------------------------


def a_pass_is_not_finished(patch: pytest.MonkeyPatch) -> None:
    right = KVStore.__dict__["settle"]

    def wrong(self: KVStore) -> None:
        again, self._again = self._again, None  # forgotten if this is interrupted
        if again is not None:
            self._stage(again)
        right(self)

    patch.setattr(KVStore, "settle", wrong)


def test_a_pass_that_is_half_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    a_pass_is_not_finished(monkeypatch)
    with pytest.raises(AssertionError):
        check_all_or_nothing("ring", ROWS["frames"], "again", "line", 999)


def frames_move_before_all_is_allocated(patch: pytest.MonkeyPatch) -> None:
    right = BufferedBank.begin

    def wrong(self: BufferedBank, *rest: Any) -> None:
        right(self, *rest)
        self.settle()

    patch.setattr(BufferedBank, "begin", wrong)


def a_switch_writes_to_the_buffers_in_use(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("headforcing.stores.store.separate", lambda banks: None)


def a_move_that_was_interrupted_is_left_out(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Bank) -> None:
        while self.moves:
            self.moves.pop(0)()

    patch.setattr(Bank, "settle", wrong)


def compressed_tokens_change_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompressedHistories, "fork", lambda self: self)


def the_chunk_is_pending_before_it_is_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("headforcing.stores.store.fork_store", lambda store: store)


PLANTED: list[Any] = [
    (frames_move_before_all_is_allocated, "frames", "commit", "line"),
    (a_switch_writes_to_the_buffers_in_use, "frames", "mark", "line"),
    (a_move_that_was_interrupted_is_left_out, "frames", "by hand", "before"),
    (compressed_tokens_change_at_once, "compressed", "commit", "line"),
    pytest.param(
        the_chunk_is_pending_before_it_is_there, "frames", "overlap", "line", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(
    ("plant", "row", "what", "kind"), PLANTED, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    row: str,
    what: str,
    kind: Kind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, HeadForcingError, RuntimeError)):
        check("ring", ROWS[row], what, kind, 1000, [f"{OURS[0]}/store.py"])
