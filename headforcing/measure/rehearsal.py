"""One layer of a model, rehearsed on the `meta` device at its real size, where nothing is computed.

The layer is the self-attention of Self Forcing (arXiv:2506.08009) as the demo model has it, with weights and
inputs that are not there, and runs as it would run: dense, or head-forced with a real store. So what it takes
is counted, whatever the store and the roles do. Of softmax attention there is the result alone, as of a fused
kernel that needs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headforcing.apply import apply_head_forcing
from headforcing.apply.handle import HeadForcing
from headforcing.demo.model.attention import DemoCausalSelfAttention, DemoConfig, rope_table
from headforcing.errors import OptionError
from headforcing.measure.census import Census, Known, Remembering, ResultAlone
from headforcing.measure.footprint import ModelSize
from headforcing.measure.steady import DTYPES, steady
from headforcing.roles import HeadRole
from headforcing.stores import KVStore, store_class
from headforcing.types import Grid


@dataclass(frozen=True)
class Rehearsed:
    """What one layer takes once a video is long, in bytes.

    Attributes:
        stored: held by the store after a chunk, at most; of the dense layer, by the host's cache.
        work: tensors made in one pass and alive at once, at most, its output among them. Not the input, the
            weights, what is stored, and scratch space inside kernels.
        released: of the host's cache, let go by head forcing.
    """

    stored: int
    work: int
    released: int


def rehearse(
    row: Sequence[HeadRole],
    size: ModelSize,
    grid: Grid,
    *,
    videos: int = 1,
    store: str = "ring",
    known: Known | None = None,
) -> Rehearsed:
    """Runs one layer until its memory is full, and then through every chunk that differs.

    Args:
        row: a role for every head, fitted to the window and bounded; none: the dense rolled window.
        size: of the model; `tokens_per_frame` is that of the grid.
        grid: height and width of a frame in patches.
        videos: of a batch, `B`.
        store: name of the store.
        known: what operators return, from layers rehearsed before; what this one asks of them is added.

    Raises:
        OptionError: there is no such store, or no type of so many bytes.
        StreamShapeError: a role cannot merge or cut such patches.
    """
    layer = Layer(size, grid, videos)
    handle = layer.force(row, unchecked(store)) if row else None
    work, stored, full = 0, 0, _full(row, size)
    noisy, clean = torch.tensor([1.0]), torch.tensor([0.0])
    remembering = Remembering({} if known is None else known)
    with torch.no_grad(), ResultAlone(), remembering:
        for chunk in range(full):
            layer(chunk, clean)
        for chunk in range(full, full + _cycle(row, size)):
            for time in (noisy, clean):  # the first pass commits, moves and rotates
                with Census() as census:
                    layer(chunk, time)
                work = max(work, census.most)
            held = layer.cache_bytes if handle is None else handle.status().stored_bytes
            stored = max(stored, held)
    return Rehearsed(stored, work, 0 if handle is None else handle.status().released_bytes)


class Layer(nn.Module):
    """A host of one layer: its cache, its input, and a clock for roles that ask for the phase.

    Args:
        size: of the model.
        grid: height and width of a frame in patches.
        videos: of a batch, `B`.
        device: where its tensors are; not on `meta`, they hold whatever was there.
    """

    def __init__(self, size: ModelSize, grid: Grid, videos: int = 1, device: str = "meta") -> None:
        super().__init__()
        if size.itemsize not in DTYPES:
            raise OptionError(f"numbers of {size.itemsize} bytes: expected 2 or 4 to rehearse a layer")
        dtype, dim, tokens = DTYPES[size.itemsize], size.heads * size.head_dim, size.tokens_per_frame
        config = DemoConfig(dim=dim, layers=1, heads=size.heads, chunk=size.chunk, window=size.window)
        with torch.device(device):
            attention = DemoCausalSelfAttention(config).to(dtype)
            self.x = torch.empty(videos, size.chunk * tokens, dim, dtype=dtype)
            shape = (videos, size.window * tokens, size.heads, size.head_dim)
            self.cache = {name: torch.empty(shape, dtype=dtype) for name in ("k", "v")}
        attention.max_attention_size = size.window * tokens
        for name in ("global_end_index", "local_end_index"):  # hosts read them, so they are on the CPU
            self.cache[name] = torch.zeros(1, dtype=torch.long)
        self.sizes, self.freqs = torch.tensor([[size.chunk, *grid]]), rope_table(config).to(device)
        self.size, self.step = size, size.chunk * tokens
        self.time_embedding, self.blocks = nn.Identity(), nn.ModuleList([attention])
        self.eval().requires_grad_(False)

    def forward(self, chunk: int, t: Tensor) -> Tensor:
        """One pass over a chunk, `[B, L, C]`; the clean one at time 0."""
        lengths = torch.full((len(self.x),), self.step)
        out: Tensor = self.blocks[0](
            self.x, lengths, self.sizes, self.freqs, None, self.cache, chunk * self.step
        )
        return out

    def force(self, row: Sequence[HeadRole], store: type[KVStore]) -> HeadForcing:
        """Head forcing on the layer."""
        return apply_head_forcing(
            self, [list(row)], window=self.size.window, chunk=self.size.chunk, store=store
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of the host's keys and values."""
        return sum(self.cache[name].nbytes for name in ("k", "v"))


def unchecked(store: str) -> type[KVStore]:
    """A store that does not look for NaN: only numbers can be some.

    Raises:
        OptionError: there is no such store.
    """
    found = store_class(store)

    def check(self: KVStore) -> None:
        """Nothing to see."""

    return type(found.__name__, (found,), {"check": check})


def _full(row: Sequence[HeadRole], size: ModelSize) -> int:
    """Chunks after which every memory is full and evicts."""
    most = max((role.capacity(size.chunk) or 0 for role in row), default=0)
    return -(-(most + 2 * size.window) // size.chunk)


def _cycle(row: Sequence[HeadRole], size: ModelSize) -> int:
    """Chunks after which what the roles hold and see repeats."""
    found = [steady(role, size.window, size.chunk) for role in dict.fromkeys(row)]
    return math.lcm(*(1 if one is None else one.cycle for one in found))
