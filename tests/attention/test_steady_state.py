"""Once its memory is full, a layer reads nothing back, keeps nothing more and does the same work for ever.

No single tool sees every read of the host. A dispatch mode sees `item()`, `bool()` and every operator
whose result depends on data, but not `tolist()` and `numpy()` of CPU tensors. Tensors on the meta
device have no data, so there all of these raise; it is the stricter of the two.

Each `check_*` is a function of a layer, so that the planted bugs below sit the same check.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import headforcing as hf
from benchmarks.meta_layer import returns_views
from headforcing.adapters import rope
from headforcing.attention.backends.sdpa import attend as sdpa
from headforcing.demo.model.attention import DemoCausalSelfAttention, DemoConfig, rope_table
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.episodic import ThresholdFifo, Uniform
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.memrope import AVERAGES, Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from headforcing.stores import KVStore, checks
from headforcing.stores.lean import LeanStore
from headforcing.stores.ring import RingStore
from headforcing.stores.rotated import RotatedBank
from tests.planted import with_banks

WINDOW, CHUNK, TOKENS, DIM = 12, 3, 2, 4
ROPE_ROWS = 32
SOME_BYTES = 16 * 1024  # the interpreter's own bookkeeping, far less than 1 KiB per chunk
WARM_UP = 16  # chunks: the memory is full after 4, absolute positions leave the RoPE table after 11

ROLES: dict[str, HeadRole] = {
    "anchor": Anchor(1),
    "anchor with recent": Anchor(1, recent=2),
    "local": Local(1),
    "memory, max-min": Memory(1, 4, 4),
    "memory, threshold": Memory(1, 4, 4, ThresholdFifo()),
    "memory, uniform": Memory(1, 4, 4, Uniform()),
    "streaming": SlidingWindow(WINDOW, sink=3),
    "absolute": SlidingWindow(WINDOW, positions="absolute"),
}
BESIDE: dict[str, HeadRole] = {
    "dynamic": Dynamic(pieces=TOKENS),
    "dynamic, compact": Dynamic(2, pieces=1, positions="compact"),
    "averages": Averaging(WINDOW),
    "participating": Participating(WINDOW, sink=3, recent=3, chosen=1),
}
"""Roles that have a compressed history."""
EVERY_ROLE = (*ROLES.values(), Anchor(1))  # the heads of the anchor role are not neighbours
ROWS = {**{name: (role, role) for name, role in {**ROLES, **BESIDE}.items()}, "every role": EVERY_ROLE}
OTHER_WORK = ("memory, uniform", "participating", "every role")
FIXED = {name: row for name, row in ROWS.items() if name not in OTHER_WORK}
WAVE, STRIDED = (kind(near=9, far=WINDOW) for kind in (Wave, Strided))
VEIL = Veil(near=9, far=WINDOW, block=2, patch=1)
PYRAMID = {"wave": (WAVE, WAVE), "strided": (STRIDED, STRIDED), "veil": (VEIL, WAVE)}


def rows(*tables: dict[str, Any]) -> Any:
    """One test per row; roles that "every role" has in one layer are alone in the long run only."""
    alone = dict.fromkeys(ROLES, pytest.mark.slow)
    named = {name: row for table in tables for name, row in table.items()}
    found = [pytest.param(row, id=name, marks=alone.get(name, ())) for name, row in named.items()]
    return pytest.mark.parametrize("row", found)


def in_stores(*tables: dict[str, Any], fast: Sequence[str]) -> Any:
    """One test per row and store; all but those named are in the long run only."""
    found = []
    for name, row in {name: row for table in tables for name, row in table.items()}.items():
        for kind, store in {"ring": RingStore, "lean": LeanStore}.items():
            marks = () if f"{name}-{kind}" in fast else pytest.mark.slow
            found.append(pytest.param(row, store, id=f"{name}-{kind}", marks=marks))
    return pytest.mark.parametrize(("row", "store"), found)


each_row, every_row = rows(ROWS), rows(ROWS, PYRAMID)
both_stores = pytest.mark.parametrize("store", [RingStore, LeanStore], ids=["ring", "lean"])
lean_at_length = pytest.mark.parametrize(
    "store", [RingStore, pytest.param(LeanStore, marks=pytest.mark.slow)], ids=["ring", "lean"]
)
at_length = pytest.mark.parametrize("chunks", [30, pytest.param(1000, marks=pytest.mark.slow)])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU with CUDA")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are tiny here: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Layer:
    """One head-forced attention layer, its host's cache, and a video that goes on and on."""

    def __init__(
        self,
        row: Sequence[HeadRole] = EVERY_ROLE,
        *,
        adapter: SelfForcing | None = None,
        store: type[KVStore] = RingStore,
        device: str = "cpu",
        passes: int = 3,
        addresses: bool = True,
    ) -> None:
        config = DemoConfig(
            dim=DIM * len(row), heads=len(row), chunk=CHUNK, window=WINDOW, rope_rows=ROPE_ROWS
        )
        model = nn.ModuleList([DemoCausalSelfAttention(config)]).eval().requires_grad_(False).to(device)
        self.buffers: set[tuple[int, ...]] = set()
        self.addresses = addresses
        self.handle = hf.apply_head_forcing(
            model, [row], adapter=adapter, window=WINDOW, store=store, backend=self._attend
        )
        self.module, self.passes, self.start = model[0], passes, 0
        self.freqs = rope_table(config).to(device)
        self.grid = torch.tensor([[CHUNK, 1, TOKENS]])  # metadata on the host, as upstream has it
        shape = (1, WINDOW * TOKENS, len(row), DIM)
        self.cache = {name: torch.zeros(shape, device=device) for name in ("k", "v")}
        for name in ("global_end_index", "local_end_index"):
            self.cache[name] = torch.zeros(1, dtype=torch.long, device=device)
        generator = torch.Generator().manual_seed(0)
        self.inputs = [
            torch.randn(1, CHUNK * TOKENS, config.dim, generator=generator).to(device) for _ in range(7)
        ]

    def write(self, number: int) -> None:
        """Pass `number` over the chunk that has its turn."""
        x = self.inputs[(self.start + number) % len(self.inputs)]
        with torch.no_grad():
            self.module(x, None, self.grid, self.freqs, None, self.cache, self.start * TOKENS)

    def each_pass(self) -> Iterator[int]:
        """The passes over one chunk; the next chunk has its turn when they are through."""
        yield from range(self.passes)
        self.start += CHUNK

    def run(self, chunks: int) -> Layer:
        """Goes on with the video."""
        for _ in range(chunks):
            for number in self.each_pass():
                self.write(number)
        return self

    def warm(self) -> Layer:
        """Fills the memory, for which one pass over a chunk is enough."""
        passes, self.passes = self.passes, 1
        self.run(WARM_UP)
        self.passes = passes
        return self

    def _attend(self, parts: Any, num_heads: int) -> Tensor:
        at = {(*x.shape, x.data_ptr() if self.addresses else 0) for part in parts for x in (part.k, part.v)}
        self.buffers |= at
        return sdpa(parts, num_heads)


class FromHost(TorchFunctionMode):
    """Writes down tensors made of Python numbers on a device: no operator tells of the copy."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and out.device.type != "cpu":
            self.made.append(f"{func.__name__} on {out.device}")
        return out


class Operators(TorchDispatchMode):
    """Writes down every operator that runs: name, shapes, whether it reads data, whether it moves it."""

    READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[torch.Size, ...]] = []
        self.reads: list[str] = []
        self.moves: list[str] = []
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.names.append(str(func))
        self.shapes.append(tuple(x.shape for x in tensors))
        if any(tag in func.tags for tag in self.READS):
            self.reads.append(str(func))
        if len({x.device for x in tensors}) > 1:
            self.moves.append(str(func))
        if not returns_views(func):
            self.made += [(str(func), x.numel()) for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out


@contextmanager
def verdicts_left_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """First frames of the chunks checked for NaN; a verdict is the one read that is wanted, a chunk late."""
    checked: list[int] = []

    class Unread(checks.FiniteCheck):
        ready = False

        def __init__(self, sums: Tensor, heads: Any, layer: int, frames: range) -> None:
            checked.append(frames.start)

        def check(self, *_: Any) -> None:
            """Would read."""

    with monkeypatch.context() as patch:
        patch.setattr(checks, "FiniteCheck", Unread)
        yield checked


# The checks --------------------------------------------------------------------------------------


def check_no_operator_depends_on_data(layer: Layer) -> None:
    layer.warm()
    with Operators() as seen:
        layer.run(4)
    assert seen.names
    assert seen.reads == []


def check_data_is_never_read(layer: Layer) -> None:
    """For a layer on the meta device: any read of data raises, any transfer is written down."""
    layer.warm()
    with FromHost() as host, Operators() as seen:
        layer.run(4)
    assert {x.device.type for x in layer.cache.values()} == {"meta"}
    assert seen.reads == []
    assert seen.moves == []
    assert host.made == []


def work(layer: Layer) -> list[list[Any]]:
    """Operators and shapes of every pass over one chunk."""
    found = []
    for number in layer.each_pass():
        with Operators() as seen:
            layer.write(number)
        found.append([*zip(seen.names, seen.shapes, strict=True)])
    return found


def check_work_is_constant(layer: Layer) -> None:
    layer.warm()
    chunks = [work(layer) for _ in range(8)]
    assert chunks[1:] == chunks[:-1]
    rewrites = chunks[0][1:]
    assert rewrites[1:] == rewrites[:-1]


def alive() -> tuple[int, int]:
    """Tensors alive, and the bytes of their storages, each counted once; rotation factors are no layer's."""
    rope._kept.__init__()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    storages = [x.untyped_storage() for x in tensors]
    return len(tensors), sum({s._cdata: s.nbytes() for s in storages}.values())


def check_no_tensor_stays(layer: Layer, chunks: int) -> None:
    """The garbage collector is off: what only it could free counts as growth."""
    layer.run(WARM_UP)
    gc.collect()
    gc.disable()
    try:
        stored, buffers, before = layer.handle.status().stored_bytes, set(layer.buffers), alive()
        layer.run(chunks)
        after = alive()
    finally:
        gc.enable()
    assert after == before, "tensors, bytes"
    assert layer.handle.status().stored_bytes == stored
    assert layer.buffers == buffers, "shapes and addresses of keys and values"


def check_no_object_stays(layer: Layer, chunks: int, allowed: int) -> None:
    """Python's own memory; collecting empties the interpreter's free lists."""
    tracemalloc.start()
    try:
        layer.run(chunks)  # what was made before tracing began is replaced once
        grown = [allowed + 1]
        while grown[-1] > allowed and len(grown) <= 3:  # what stays grows again, what others do does not
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            layer.run(chunks)
            gc.collect()
            grown.append(tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()
    assert grown[-1] <= allowed, f"Python memory grew by {grown[1:]} bytes in {chunks} chunks each"


def check_a_pass_makes_nothing_larger_than_its_chunk(layer: Layer) -> None:
    """From the second pass over a chunk on: no gather, no `cat`, no copy of a memory.

    Where query frames see different ones, the chunk is put beside those of each at once.
    """
    layer.warm()
    own = CHUNK * TOKENS * DIM * layer.handle.status().heads
    own *= CHUNK if any("query" in role.depends_on for role in layer.handle.roles.counts()) else 1
    for number in layer.each_pass():
        with Operators() as seen:
            layer.write(number)
        if number:
            assert seen.made
            assert [(name, size) for name, size in seen.made if size > own] == []


class Turns(SelfForcing):
    """Counts the frames that are rotated, keys and queries."""

    def __init__(self) -> None:
        self.frames = 0

    def rotate(self, x: Tensor, call: Any, positions: Sequence[int]) -> Tensor:
        self.frames += len(positions)
        return super().rotate(x, call, positions)


def turned(layer: Layer, turns: Turns) -> list[int]:
    """Frames that each pass over one chunk rotates beside the own ones of keys and queries."""
    own = 2 * CHUNK * len(layer.handle.roles.counts())
    found = []
    for number in layer.each_pass():
        turns.frames = -own
        layer.write(number)
        found.append(turns.frames)
    return found


TURNED = {Dynamic: CHUNK + 1, Averaging: AVERAGES, Participating: 2 * WINDOW}
"""Frames that are rotated beside whole ones: those that are cut and the next one, averages, candidates."""


def check_history_is_rotated_once_per_chunk(layer: Layer, turns: Turns) -> None:
    layer.warm()
    held = sum(
        (role.capacity(CHUNK) or 0) + TURNED.get(type(role), 0) for role in layer.handle.roles.counts()
    )
    for _ in range(6):
        first, *others = turned(layer, turns)
        assert 0 <= first <= held
        assert others == [0] * (layer.passes - 1)


# What we ship passes them -------------------------------------------------------------------------


@in_stores(ROWS, fast=["every role-lean", *(f"{name}-ring" for name in BESIDE)])
def test_no_operator_depends_on_data(row, store):
    check_no_operator_depends_on_data(Layer(row, store=store))


@in_stores(ROWS, PYRAMID, fast=["every role-ring", "veil-ring"])
def test_no_data_is_read_and_none_crosses_devices(row, store, monkeypatch):
    with verdicts_left_out(monkeypatch) as checked:
        layer = Layer(row, device="meta", store=store, passes=2)
        check_data_is_never_read(layer)
    assert checked == list(range(0, layer.start - CHUNK, CHUNK)), "one check for NaN per commit"


@in_stores(FIXED, fast=[f"{name}-ring" for name in ("anchor", "memory, max-min", "dynamic", "averages")])
def test_every_chunk_is_the_same_work(row, store):
    check_work_is_constant(Layer(row, store=store))


@at_length
@pytest.mark.parametrize(
    "row",
    [ROWS["memory, uniform"], pytest.param(EVERY_ROLE, marks=pytest.mark.slow)],
    ids=["uniform", "every role"],
)
def test_a_memory_spread_over_time_moves_other_rows_each_chunk_but_never_more_than_it_holds(row, chunks):
    layer = Layer(row).warm()
    firsts, rewrites = [], []
    for _ in range(chunks // 2):
        first, *others = work(layer)
        firsts.append(len(first))
        rewrites += others
    assert rewrites[1:] == rewrites[:-1]
    operators_per_row = 12  # source, target and copy for each of keys, rotated keys, values, numbers
    assert max(firsts) - min(firsts) <= operators_per_row * Memory(1, 4, 4).capacity(CHUNK)


@every_row
def test_a_pass_makes_nothing_larger_than_its_chunk(row):
    check_a_pass_makes_nothing_larger_than_its_chunk(Layer(row))


@each_row
def test_history_is_rotated_at_most_once_per_chunk(row):
    turns = Turns()
    check_history_is_rotated_once_per_chunk(Layer(row, adapter=turns), turns)


@pytest.mark.parametrize("name", ["absolute", "anchor"])
def test_history_that_stays_where_it_is_is_not_rotated_at_all(name):
    turns = Turns()
    layer = Layer([ROLES[name]], adapter=turns).warm()
    assert turned(layer, turns) == [0, 0, 0]


def test_compact_history_is_rotated_in_the_first_pass_of_a_chunk():
    turns = Turns()
    layer = Layer([ROLES["memory, max-min"]], adapter=turns).warm()
    assert turned(layer, turns) == [8, 0, 0], "all but the sink"


@pytest.mark.parametrize("name", ["absolute", "memory, max-min"])
def test_the_lean_store_rotates_all_it_shows_in_every_pass(name):
    turns = Turns()
    layer = Layer([ROLES[name]], adapter=turns, store=LeanStore).warm()
    assert turned(layer, turns) == [WINDOW - CHUNK] * 3


@at_length
def test_no_tensor_stays(chunks):
    check_no_tensor_stays(Layer(), chunks)


@at_length
@pytest.mark.parametrize(
    "row",
    [PYRAMID["wave"], pytest.param(PYRAMID["strided"], marks=pytest.mark.slow)],
    ids=["wave", "strided"],
)
def test_no_copy_stays_and_all_of_them_stay_where_they_are(row, chunks):
    check_no_tensor_stays(Layer(row), chunks)


@at_length
def test_no_tensor_stays_in_the_lean_store(chunks):
    """Rotated keys lie wherever there is room, so their addresses tell nothing; those of buffers do."""
    layer = Layer(store=LeanStore, addresses=False, passes=2).warm()
    (stream,) = layer.handle._layers[0].streams.values()
    buffers = [x.data_ptr() for bank in stream.store._banks.values() for x in bank.tensors()]
    check_no_tensor_stays(layer, chunks)
    assert [x.data_ptr() for bank in stream.store._banks.values() for x in bank.tensors()] == buffers


@at_length
@lean_at_length
@pytest.mark.parametrize(
    "role",
    [
        pytest.param(role, id=name, marks=() if name == "averages" else pytest.mark.slow)
        for name, role in BESIDE.items()
    ],
)
def test_nothing_stays_of_what_is_kept_beside_frames(role, store, chunks):
    layer = Layer([role, role], passes=2, addresses=store is RingStore, store=store)
    check_no_tensor_stays(layer, chunks)
    check_no_object_stays(layer, 2 * chunks, allowed=SOME_BYTES)


@at_length
@pytest.mark.parametrize(
    "row",
    [[ROLES["local"], ROLES["memory, threshold"]], pytest.param(EVERY_ROLE, marks=pytest.mark.slow)],
    ids=["two", "every role"],
)
def test_no_object_stays(row, chunks):
    check_no_object_stays(Layer(row, passes=2), 2 * chunks, allowed=SOME_BYTES)


@pytest.mark.slow
def test_nothing_stays_of_ten_thousand_chunks():
    names = ("local", "memory, max-min", "memory, threshold", "memory, uniform", "absolute")
    layer = Layer([ROLES[name] for name in names], passes=2)
    check_no_tensor_stays(layer, chunks=9000)
    check_no_object_stays(layer, chunks=900, allowed=64 * 1024)
    assert layer.start >= 30_000


# On a GPU -----------------------------------------------------------------------------------------


@needs_gpu
@both_stores
@every_row
def test_no_host_waits_for_a_gpu(row, store):
    layer = Layer(row, store=store, device="cuda").run(WARM_UP)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.run(8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_host_that_waits_is_found():
    layer = Layer(**reading(SEEN["item"]), device="cuda").run(WARM_UP)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            layer.run(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@both_stores
@every_row
def test_a_gpu_allocates_nothing_that_stays(row, store):
    layer = Layer(row, store=store, device="cuda", addresses=store is RingStore).run(WARM_UP)
    torch.cuda.synchronize()
    before, buffers = torch.cuda.memory_allocated(), set(layer.buffers)
    layer.run(100)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert layer.buffers == buffers


@needs_gpu
@every_row
def test_a_pass_can_be_captured_in_a_cuda_graph(row):
    """From the second pass over a chunk on, all do the same with the same memory: one is replayed."""
    layer = Layer(row, device="cuda", passes=2).run(WARM_UP)
    x, start = torch.empty_like(layer.inputs[0]), layer.start * TOKENS
    rest = (None, layer.grid, layer.freqs, None, layer.cache, start)
    with torch.no_grad():
        x.copy_(layer.inputs[0])
        expected = [layer.module(other, *rest) for other in layer.inputs[:3]]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer.module(x, *rest)
        for other, one in zip(layer.inputs, expected, strict=False):
            x.copy_(other)
            graph.replay()
            assert torch.equal(out, one)


# Planted bugs fail them ---------------------------------------------------------------------------


def reading(read: Callable[[Tensor], Any]) -> Any:
    """A layer whose adapter looks at the keys it projects."""

    class Reading(SelfForcing):
        def project(self, module: nn.Module, call: Any) -> Any:
            q, k, v = super().project(module, call)
            read(k)
            return q, k, v

    return {"row": [Local(1)], "adapter": Reading()}


SEEN: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda k: k[0, 0, 0, 0, 0].item(),
    "bool": lambda k: bool((k > 0).all()),
    "nonzero": lambda k: k[k > 0],
    "equal": lambda k: torch.equal(k, k),
}
UNSEEN: dict[str, Callable[[Tensor], Any]] = {"tolist": lambda k: k.tolist(), "numpy": lambda k: k.numpy()}
MOVES: dict[str, Callable[[Tensor], Any]] = {
    "index by list": lambda k: k[torch.tensor([0])],
    "to the host": lambda k: k.cpu(),
    "from the host": lambda k: k + torch.zeros(DIM),
    "made of numbers": lambda k: k + torch.tensor([1.0] * DIM, device=k.device),
}
META = {**SEEN, **UNSEEN, **MOVES}


@pytest.mark.parametrize("read", SEEN.values(), ids=SEEN.keys())
def test_a_read_is_found_by_its_operator(read):
    with pytest.raises(AssertionError, match="aten"):
        check_no_operator_depends_on_data(Layer(**reading(read)))


@pytest.mark.parametrize("read", UNSEEN.values(), ids=UNSEEN.keys())
def test_a_read_without_an_operator_is_not(read):
    check_no_operator_depends_on_data(Layer(**reading(read)))


@pytest.mark.parametrize("read", META.values(), ids=META.keys())
def test_a_read_or_a_transfer_is_found_on_the_meta_device(read, monkeypatch):
    found = pytest.raises((AssertionError, RuntimeError, TypeError), match=r"meta|aten")
    with verdicts_left_out(monkeypatch), found:
        check_data_is_never_read(Layer(**reading(read), device="meta"))


class Piling(RotatedBank):
    """Keeps every chunk it was ever given, and looks through all of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pile: list[Tensor] = []

    def append(self, frames: range, inside: range) -> None:
        self.pile.append(self.staged()[0].clone())
        super().append(frames, inside)
        sum(self.pile)


class Moving(RotatedBank):
    """Puts its keys into other buffers for every chunk, two in turn."""

    def begin(self, *args: Any) -> None:
        super().begin(*args)
        self.other, self.buffers["rotated"] = self.buffers["rotated"], self.buffers["rotated"].clone()


class Knotted(RotatedBank):
    """Leaves tensors to the garbage collector."""

    def append(self, frames: range, inside: range) -> None:
        super().append(frames, inside)
        knot: list[Any] = [torch.zeros(1)]
        knot.append(knot)


class Noting(RotatedBank):
    """Keeps a diary."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.diary: list[str] = []

    def append(self, frames: range, inside: range) -> None:
        super().append(frames, inside)
        self.diary.append(f"Dear diary, today I kept {frames}, and nothing else happened" + "." * 400)


class Scattered(RotatedBank):
    """Leaves compressed tokens wherever there is room."""

    def prepend(self, query: int | None, tokens: Any) -> Any:
        return tokens


class Forgetful(RingStore):
    """Does not remember where its keys were rotated to."""

    def _stage(self, chunk: Any) -> None:
        super()._stage(chunk)
        for bank in self._banks.values():
            bank._rotated_to = [None] * len(bank._rotated_to)


@pytest.mark.parametrize(
    "kind", [{"row": [Local(1)], "store": with_banks(Piling)}, {"row": [Full()]}], ids=["piling", "full"]
)
def test_work_that_grows_is_found(kind):
    with pytest.raises(AssertionError):
        check_work_is_constant(Layer(**kind))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ({"row": [Local(1)], "store": with_banks(Piling)}, "tensors, bytes"),
        ({"row": [Local(1)], "store": with_banks(Knotted)}, "tensors, bytes"),
        ({"row": [Local(1)], "store": with_banks(Moving)}, "addresses"),
        ({"row": [Full()]}, "tensors, bytes"),
    ],
    ids=["piling", "knotted", "moving", "full"],
)
def test_a_tensor_that_stays_is_found(kind, what):
    with pytest.raises(AssertionError, match=what):
        check_no_tensor_stays(Layer(**kind), chunks=30)


def test_an_object_that_stays_is_found():
    layer = Layer([Local(1)], store=with_banks(Noting), passes=1)
    with pytest.raises(AssertionError, match="Python memory grew"):
        check_no_object_stays(layer, chunks=60, allowed=SOME_BYTES)


@pytest.mark.parametrize("row", [(Averaging(WINDOW),) * 2, (VEIL, VEIL)], ids=["see", "copy"])
def test_tokens_that_are_put_together_in_every_pass_are_found(row):
    with pytest.raises(AssertionError, match="cat"):
        check_a_pass_makes_nothing_larger_than_its_chunk(Layer(row, store=with_banks(Scattered)))


@pytest.mark.parametrize("store", [Forgetful, LeanStore])
def test_rotating_more_than_the_own_chunk_makes_more(store):
    with pytest.raises(AssertionError):
        check_a_pass_makes_nothing_larger_than_its_chunk(Layer([Memory(1, 4, 4)], store=store))


def test_rotating_history_on_every_pass_is_found():
    turns = Turns()
    layer = Layer([Memory(1, 4, 4)], adapter=turns, store=Forgetful)
    with pytest.raises(AssertionError):
        check_history_is_rotated_once_per_chunk(layer, turns)
