"""What `status()` says is held is what the allocator holds.

On a CPU the allocator's own events are summed up, so whatever keeps memory counts, a view of something larger
or a copy kept by accident as well. On a GPU `torch.cuda.memory_allocated` says it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import headforcing as hf
from headforcing.adapters import rope
from headforcing.demo.model.attention import DemoCausalSelfAttention, DemoConfig, rope_table
from headforcing.roles import HeadRole, Local, Memory
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Veil
from headforcing.stores import STORES, store_class
from headforcing.stores.lean import LeanStore
from headforcing.stores.reference import ReferenceStore
from headforcing.stores.ring import RingStore
from headforcing.stores.switch import Switch
from headforcing.types import Chunk

STORES = sorted(STORES)
GRID, WINDOW, CHUNK, HEADS, DIM, LAYERS = (4, 6), 21, 3, 4, 8, 2
TOKENS = GRID[0] * GRID[1]
FRAME = 2 * TOKENS * DIM * 4  # keys and values of one frame in one head, float32
FULL_AFTER = 8  # chunks
A_HUNDREDTH = 0.01
COMPRESSED_OR_NOT = ("streaming_llm", "memrope")
"""Presets of both kinds; the others are in the long run."""


class Video:
    """Two head-forced layers, their host's caches, and a video that goes on and on."""

    def __init__(
        self, row: Sequence[HeadRole], store: Any, device: str = "cpu", layers: int = LAYERS
    ) -> None:
        config = DemoConfig(dim=DIM * len(row), heads=len(row), chunk=CHUNK, window=WINDOW, rope_rows=1024)
        modules = [DemoCausalSelfAttention(config) for _ in range(layers)]
        self.model = nn.ModuleList(modules).eval().requires_grad_(False).to(device)
        self.freqs = rope_table(config).to(device)
        self.grid = torch.tensor([[CHUNK, *GRID]])  # metadata on the host, as upstream has it
        shape = (1, WINDOW * TOKENS, len(row), DIM)
        self.caches = [{name: torch.zeros(shape, device=device) for name in ("k", "v")} for _ in modules]
        for cache in self.caches:
            for name in ("global_end_index", "local_end_index"):
                cache[name] = torch.zeros(1, dtype=torch.long, device=device)
        generator = torch.Generator().manual_seed(0)
        self.inputs = [
            torch.randn(1, CHUNK * TOKENS, config.dim, generator=generator).to(device) for _ in range(3)
        ]
        self.start = 0
        self.handle = hf.apply_head_forcing(self.model, [row] * layers, window=WINDOW, store=store)

    def run(self, chunks: int, passes: int = 2) -> Video:
        """Goes on with the video."""
        for _ in range(chunks):
            for number in range(passes):
                with torch.no_grad():
                    for layer, cache in zip(self.model, self.caches, strict=True):
                        x = self.inputs[number]
                        layer(x, None, self.grid, self.freqs, None, cache, self.start * TOKENS)
            self.start += CHUNK
        return self

    def tensors(self) -> Iterator[Tensor]:
        """What is the host's."""
        yield from (*self.model.parameters(), self.freqs, self.grid, *self.inputs)
        for cache in self.caches:
            yield from cache.values()

    @property
    def said(self) -> int:
        """Bytes, as the handle tells them."""
        return self.handle.status().stored_bytes


@dataclass
class Allocated:
    """Bytes of what was allocated in a block and is still there behind it, and the most at any time."""

    held: int = 0
    peak: int = 0


@contextmanager
def allocations() -> Iterator[Allocated]:
    """Follows the allocator, address by address."""
    found, live = Allocated(), {}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield found
    todo, events = list(seen.profiler.kineto_results.experimental_event_tree()), []
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            events.append(event)
    for event in sorted(events, key=lambda event: event.start_time_ns):
        fields = event.extra_fields
        if fields.alloc_size > 0:
            live[fields.ptr] = fields.alloc_size
            found.held += fields.alloc_size
            found.peak = max(found.peak, found.held)
        else:  # of what was there before, nothing is known
            found.held -= live.pop(fields.ptr, 0)


def check_said_is_held(row: Sequence[HeadRole], store: Any, go: Callable[[Video], object]) -> None:
    with allocations() as found:
        video = Video(row, store)
        go(video)
        theirs = sum(s.nbytes() for s in {x.untyped_storage() for x in video.tensors()})
        said = video.said
        rope._kept.__init__()  # rotation factors of a table belong to no video
    held = found.held - theirs
    assert abs(held - said) <= A_HUNDREDTH * said, f"held {held}, said {said}"


def row_of(name: str) -> list[HeadRole]:
    """A layer with heads of every role of a preset."""
    roles = [*PRESETS[name].roles(WINDOW, CHUNK).values()]
    return [roles[head % len(roles)] for head in range(HEADS)]


@pytest.mark.parametrize(
    "store", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("lean", "reference")), "ring"]
)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in COMPRESSED_OR_NOT else pytest.mark.slow) for n in PRESETS]
)
@pytest.mark.parametrize("chunks", [FULL_AFTER + 1, pytest.param(4 * FULL_AFTER, marks=pytest.mark.slow)])
def test_what_is_said_is_what_the_allocator_holds(name: str, store: str, chunks: int) -> None:
    check_said_is_held(row_of(name), store, lambda video: video.run(chunks))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "chunks", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(FULL_AFTER, marks=pytest.mark.slow)]
)
def test_so_it_is_before_the_memory_is_full(chunks: int, store: str) -> None:
    row = [*row_of("head_forcing"), *row_of("pyramid_forcing")]
    check_said_is_held(row, store, lambda video: video.run(chunks))


@pytest.mark.parametrize(
    "store", ["ring", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lean", "reference"))]
)
def test_so_it_is_with_marks_and_behind_another_video(store: str) -> None:
    def go(video: Video) -> None:
        video.run(FULL_AFTER)
        video.start = 0
        video.run(FULL_AFTER)
        video.handle.mark("a")
        video.run(1)
        for _, stream in video.handle._streams():  # these layers have no prompt that a handle could switch
            stream.store.scenes.ask(Switch("smooth"))
        video.run(2)

    check_said_is_held(row_of("head_forcing"), store, go)


def most(row: Sequence[HeadRole], store: str) -> tuple[int, int]:
    """The most that is said, at any time and once a video is long."""
    video = Video(row, store)
    said = [video.run(1).said for _ in range(2 * FULL_AFTER)]
    return max(said), max(said[FULL_AFTER + 4 :])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in COMPRESSED_OR_NOT else pytest.mark.slow)
        for name in PRESETS
        if name != "full"
    ],
)
def test_the_lean_store_holds_what_the_roles_keep(name: str) -> None:
    """The most that they keep, as whole frames and beside them, current chunk included."""
    kept, lean, ring = (most(row_of(name), store) for store in ("reference", "lean", "ring"))
    assert all(one <= 1.05 * other for one, other in zip(lean, kept, strict=True))
    assert all(one < other for one, other in zip(lean, ring, strict=True))


def test_room_that_other_things_took_the_place_of_is_given_up_and_comes_back_for_the_next_video() -> None:
    said, video = [], Video([Averaging()] * HEADS, "lean")
    for _ in range(2):
        said.append([video.run(1).said for _ in range(2 * FULL_AFTER)])
        video.start = 0
    first, second = said
    assert first[-1] < first[0]
    assert second[-1] == first[-1]
    assert second[0] < first[0]
    assert max(second) == max(first)


@pytest.mark.parametrize(
    "name",
    [
        *COMPRESSED_OR_NOT,
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("head_forcing", "pyramid_forcing")),
    ],
)
def test_what_the_lean_store_rotates_is_free_when_the_layer_is_through(name: str) -> None:
    """At its peak a pass takes no more beside what is held with four layers than with two."""
    above = []
    for layers in (2, 4):
        video = Video(row_of(name), "lean", layers=layers).run(FULL_AFTER)
        with allocations() as found:
            video.run(2)
        above.append(found.peak)
    assert above[1] <= above[0] + HEADS * FRAME, above


@pytest.mark.parametrize("role", [Veil(), Averaging(), Dynamic()], ids=lambda role: type(role).__name__)
def test_the_lean_store_keeps_nothing_of_what_was_looked_at(role: HeadRole) -> None:
    held = {}
    for name in ("lean", "ring"):
        video = Video([role] * HEADS, name).run(FULL_AFTER)
        held[name] = [
            x for _, stream in video.handle._streams() for x in stream.store.compressed._views.values()
        ]
    assert held["lean"] == []
    assert held["ring"] != []


@pytest.mark.parametrize("store", STORES)
def test_what_is_held_by_hand(store: str) -> None:
    held, _ = most([Local(2)] * HEADS, store)
    slots, numbers = LAYERS * HEADS * (2 + CHUNK), LAYERS * 8 * (2 + CHUNK)
    assert held == {"ring": 1.5, "lean": 1, "reference": 1}[store] * slots * FRAME + (
        0 if store == "reference" else numbers
    )


# Planted bugs -------------------------------------------------------------------------------------


class Hoarding(RingStore):
    """Keeps the last chunk as the host brought it."""

    def _stage(self, chunk: Chunk) -> None:
        super()._stage(chunk)
        self.brought = chunk


class Clinging(ReferenceStore):
    """Says what it uses of its memory."""

    def nbytes(self) -> int:
        return sum(x[..., :1].nbytes for bank in self._banks.values() for x in bank.tensors())


class Doubling(LeanStore):
    """Rotates into memory that it keeps."""

    def view(self, role: HeadRole, *rest: Any) -> Any:
        seen = super().view(role, *rest)
        self.seen: dict[HeadRole, Tensor] = {**getattr(self, "seen", {}), role: seen.k}
        return seen


@pytest.mark.parametrize("store", [Hoarding, Clinging, Doubling], ids=lambda store: store.__name__)
def test_memory_that_is_not_said_is_found(store: Any) -> None:
    with pytest.raises(AssertionError, match="held"):
        check_said_is_held([Local(1), Memory(1, 4, 4)], store, lambda video: video.run(FULL_AFTER))


# On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU with CUDA")
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", PRESETS)
def test_what_is_said_is_what_cuda_holds(name: str, store: str) -> None:
    torch.cuda.synchronize()
    video = Video(row_of(name), store, "cuda")
    before = torch.cuda.memory_allocated()
    video.run(2 * FULL_AFTER)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before + video.handle.status().released_bytes
    assert abs(held - video.said) <= A_HUNDREDTH * video.said + 512 * LAYERS * HEADS * 8, (
        "the allocator rounds every piece up to 512 bytes"
    )


def test_every_store_of_the_folder_is_looked_at() -> None:
    assert {store_class(name) for name in STORES} == {RingStore, LeanStore, ReferenceStore}
