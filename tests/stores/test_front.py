"""Compressed tokens and whole frames, read as attention reads both: every store beside the reference."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headforcing.adapters.rope import rotate
from headforcing.errors import HeadForcingError, RoleError
from headforcing.roles import HeadRole, Local, Memory
from headforcing.roles.base import sees_compressed
from headforcing.roles.compressed import CompressedHistory, Past
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import AVERAGES, Averaging
from headforcing.roles.pyramid_forcing import Veil
from headforcing.roles.reward_forcing import EmaSink
from headforcing.stores import KVStore, store_class
from headforcing.stores.buffers import joined
from headforcing.stores.ring import RingStore
from headforcing.stores.rotated import RotatedBank
from headforcing.stores.switch import Switch
from headforcing.types import Chunk, Encode, FrameTable, Heads, Phase, Truncation
from tests.examples import examples
from tests.planted import with_banks
from tests.strategies import GRID, kinds, queries

WINDOW, CHUNK, DIM = 12, 4, 12
PATCHES = GRID[0] * GRID[1]
ANGLES = torch.linspace(0.1, 3.0, 64 * DIM // 2, dtype=torch.float64).view(64, -1)
TABLE = torch.polar(torch.ones_like(ANGLES), ANGLES)
BESIDE = [kinds(WINDOW, CHUNK)[kind] for kind in (Averaging, EmaSink, Participating, Dynamic, Veil)]
KINDS = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)]


def encode(x: Tensor, positions: Sequence[float], patch: int = 1) -> Tensor:
    return rotate(x, TABLE, positions, *GRID, patch)


@dataclass(frozen=True)
class Blinking(HeadRole):
    """Another role that sees less in some passes, and compressed tokens in all of them."""

    role: HeadRole = Local(1)  # noqa: RUF009 - frozen
    blind: Phase = "clean"
    step: int = 2

    @property
    def depends_on(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("phase", *self.role.depends_on)

    def visible(self, table: FrameTable, phase: Phase) -> Sequence[int]:
        rows = self.role.visible(table, phase)
        return rows[:: self.step] if phase == self.blind else rows

    def capacity(self, chunk: int) -> int | None:
        return self.role.capacity(chunk)

    def retain(self, table: FrameTable) -> Any:
        return self.role.retain(table)

    def positions_of(self, frames: Any, chunk: int, window: int, query: Any = None, gap: int = 0) -> Any:
        if query is not None:
            return self.role.positions_of(frames, chunk, window, query=query)
        return tuple(range(gap, gap + len(frames)))

    def compressed(self) -> CompressedHistory | None:
        return self.role.compressed()


class Asking(CompressedHistory):
    """Single tokens of the last chunk: which, and how many, differs by query frame."""

    def __init__(self, said: int | None) -> None:
        self.said = said
        self.held: tuple[Tensor, Tensor] | None = None

    def max_tokens(self, patches: int) -> int | None:
        return self.said

    def add(self, past: Past) -> None:
        self.held = past.k[:, -1:].clone(), past.v[:, -1:].clone()

    def view(self, start: int, query: int | None, encode: Encode) -> Any:
        if self.held is None:
            return None
        first = 0 if query is None else query - start
        k, v = encode(self.held[0], (first,)).to(self.held[1].dtype), self.held[1]
        return k.flatten(1, 2)[:, first : 2 * first + 1], v.flatten(1, 2)[:, first : 2 * first + 1]

    def clear(self) -> None:
        self.held = None

    def tensors(self) -> Iterator[Tensor]:
        yield from self.held or ()


@dataclass(frozen=True)
class Curious(Veil):
    """A role whose query frames see different tokens."""

    near: int = 9
    far: int = WINDOW
    block: int = 1
    said: int | None = None

    def compressed(self) -> CompressedHistory:
        return Asking(self.said)


def beside() -> st.SearchStrategy[HeadRole]:
    """Roles that have a compressed history, alone or in another one."""
    plain = st.one_of(*BESIDE, st.builds(Curious, st.integers(0, 2), said=st.sampled_from([None, CHUNK, 9])))
    cut = st.builds(
        lambda role, newest: replace(role, clean_window=newest), plain, st.integers(CHUNK, WINDOW)
    )
    blinking = st.builds(
        lambda role, blind, step: Blinking(role=role, blind=blind, step=step),
        *(plain, st.sampled_from(["denoise", "clean"]), st.integers(2, 4)),
    )
    return st.one_of(plain, cut, blinking, st.sampled_from([Local(2), Memory(1, 3, 2)]))


class Side:
    """The same video in every store."""

    def __init__(self, row: Sequence[HeadRole], dice: random.Random, others: Sequence[type[KVStore]]) -> None:
        heads = {role: [head for head, one in enumerate(row) if one == role] for role in row}
        self.heads = {role: Heads(own, len(row)) for role, own in heads.items()}
        classes = (store_class("reference"), *others)
        self.stores = [cls(self.heads, window=WINDOW, layer=0) for cls in classes]
        self.dice, self.count, self.seed = dice, len(row), 0
        self.new_video()

    @property
    def next(self) -> int:
        return self.stores[0].frames_so_far

    def new_video(self) -> None:
        self.batch, self.kinds = self.dice.randint(1, 2), self.dice.choice(KINDS)

    def drawn(self, frames: int, dtype: torch.dtype) -> Tensor:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, frames, PATCHES, self.count, DIM, generator=generator).to(dtype)

    def each(self, act: Any) -> bool:
        """Whether all stores did it; they agree."""
        refused = []
        for store in self.stores:
            try:
                act(store)
            except HeadForcingError as error:
                refused.append(type(error))
        assert not refused or refused == refused[:1] * len(self.stores)
        return not refused

    def write(self, start: int, length: int, **more: Any) -> None:
        """Some passes over a chunk, each looked at in some phases."""
        for _ in range(self.dice.randint(1, 3)):
            k, v, q = (self.drawn(length, self.kinds[at]) for at in (0, 1, 0))
            chunk = Chunk(start, k, v, GRID, q, **more)
            if not self.each(functools.partial(KVStore.write, chunk=chunk)):
                return
            for phase in self.dice.choice(["", "d", "c", "dc", "cd", "dcd"]):
                self.look("denoise" if phase == "d" else "clean")

    def look(self, phase: Phase) -> None:
        expected, *seen = ([*self.parts(store, phase)] for store in self.stores)
        for parts in seen:
            for (role, k, v), (_, right_k, right_v) in zip(parts, expected, strict=True):
                assert k.dtype == right_k.dtype == self.kinds[1], role
                assert torch.equal(k, right_k), role
                assert torch.equal(v, right_v), role

    def parts(self, store: KVStore, phase: Phase) -> Iterator[tuple[HeadRole, Tensor, Tensor]]:
        """What all roles attend to; nothing is read before every role and query frame has looked."""
        assert store.pending is not None
        for role in self.heads:
            for query in queries(role, store.pending):
                view = store.view(role, phase, encode, query)
                tokens = store.view_compressed(role, encode, query) if sees_compressed(role, phase) else None
                k, v = view.k.flatten(1, 2), view.v.flatten(1, 2)
                if tokens is not None:
                    k, v = joined(tokens[0], k), joined(tokens[1], v)
                yield role, k, v


def chunk(side: Side) -> None:
    side.write(side.next, side.dice.randint(1, CHUNK))


def again(side: Side) -> None:
    if (pending := side.stores[0].pending) is not None:
        side.write(pending.start, len(pending))


def overlapping(side: Side) -> None:
    if (pending := side.stores[0].pending) is not None:
        start = side.dice.randint(pending.start, pending.stop)
        side.write(start, max(pending.stop - start, side.dice.randint(1, CHUNK)))


def rolling(side: Side) -> None:
    start = side.next
    for _ in range(3):
        side.write(start, side.dice.randint(1, CHUNK), rolling=True)


def commit(side: Side) -> None:
    side.each(KVStore.commit)


def reset(side: Side) -> None:
    side.each(KVStore.reset)
    side.new_video()


def new_video(side: Side) -> None:
    if side.next > CHUNK:
        side.new_video()
        side.write(0, side.dice.randint(1, CHUNK))


def mark(side: Side) -> None:
    side.each(lambda store: store.scenes.mark("scene"))


def switch(side: Side) -> None:
    mode = side.dice.choice(["cut", "smooth", "recall", "recache"])
    frames = side.dice.randint(1, CHUNK) if mode == "recache" else 0
    tiers = side.dice.choice([(), ("sink",), ("sink", "episodic")]) if mode == "cut" else ()
    asked = Switch(mode, tiers, "scene" if mode == "recall" else None, frames)
    if side.each(lambda store: store.check_switch(asked)):
        side.each(lambda store: store.scenes.ask(asked))
        side.write(side.next - frames, frames or side.dice.randint(1, CHUNK))


def emptied(side: Side) -> None:
    if (pending := side.stores[0].pending) is not None:
        edit = Truncation(side.dice.randint(0, 2))
        side.each(lambda store: store.edit(edit, pending.start))
        side.write(pending.start, len(pending))


ACTS = [*[chunk] * 7, again, overlapping, rolling, commit, reset, new_video, mark, switch, switch, emptied]


def check_it_reads_the_same(row: Sequence[HeadRole], seed: int, steps: int, *others: type[KVStore]) -> None:
    dice = random.Random(seed)
    side = Side(row, dice, others)
    with dice.choice([torch.no_grad, torch.inference_mode])():
        for _ in range(steps):
            dice.choice(ACTS)(side)


@settings(max_examples=examples(30, nightly=500))
@given(st.lists(beside(), min_size=1, max_size=4), st.integers(0, 2**20), st.integers(1, 20))
def test_every_store_reads_the_same(row: list[HeadRole], seed: int, steps: int) -> None:
    check_it_reads_the_same(row, seed, steps, store_class("lean"), store_class("ring"))


def run(row: Sequence[HeadRole], store: type[KVStore], chunks: int = 5) -> Side:
    side = Side(row, random.Random(0), [store])
    for _ in range(chunks):
        side.write(side.next, CHUNK)
        side.look("denoise")
    return side


@pytest.mark.parametrize("said", [None, CHUNK])
def test_query_frames_that_see_different_tokens_do_not_write_over_each_other(said: int | None) -> None:
    run([Curious(said=said)], RingStore)


def test_more_tokens_than_were_promised_are_refused() -> None:
    with pytest.raises(RoleError, match=r"shows \d tokens .* at most 1: mend Asking.max_tokens"):
        run([Curious(said=1)], RingStore)


@pytest.mark.parametrize("store", ["reference", "lean", "ring"])
def test_keys_beside_frames_are_of_the_type_that_is_attended_to(store: str) -> None:
    """Some hosts normalise keys in float32 and keep values in bfloat16."""
    for role in (
        Averaging(),
        Participating(8, 1, 2, 1),
        Dynamic(),
        Veil(far=WINDOW, near=9, block=2, patch=1),
    ):
        side = Side([role], random.Random(0), [store_class(store)])
        side.kinds = KINDS[2]
        for _ in range(5):
            side.write(side.next, 3)
            side.look("denoise")


@pytest.mark.parametrize("store", ["lean", "ring"])
def test_room_comes_back_at_once_after_a_cut(store: str) -> None:
    role = Averaging(WINDOW)
    side = Side([role], random.Random(0), [store_class(store)])
    slots = []
    for number in range(40):
        if number == 20:
            side.each(lambda store: store.scenes.ask(Switch("cut")))
        side.write(side.next, 1)
        side.look("denoise")
        slots.append(side.stores[1]._banks[role].buffers["v"].shape[1])
    before, after = [sorted(set(part)) for part in (slots[:20], slots[20:])]
    assert before == after == [WINDOW - AVERAGES, WINDOW]


# Planted bugs -------------------------------------------------------------------------------------


class Crowded(RotatedBank):
    """Puts the compressed tokens of all query frames in one place."""

    def prepend(self, query: int | None, tokens: Any) -> Any:
        return super().prepend(None if query is None else 0, tokens)


class Shy(RingStore):
    """Forgets that it has to look again when frames come or go."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compressed.forget_views = lambda: None


class Shifted(RotatedBank):
    """Puts compressed tokens as if there were one more."""

    def prepend(self, query: int | None, tokens: Any) -> Any:
        put = super().prepend(query, tokens)
        return tuple(x.as_strided(x.shape, x.stride(), x.storage_offset() - DIM) for x in put)


PLANTED = [
    (with_banks(Crowded), Curious(said=CHUNK)),
    (Shy, Averaging(8)),
    (with_banks(Shifted), Averaging(8)),
]


@pytest.mark.parametrize(("store", "role"), PLANTED)
def test_tokens_that_lie_where_they_must_not_are_found(store: type[KVStore], role: HeadRole) -> None:
    with pytest.raises(AssertionError):
        run([role], store, chunks=8)
