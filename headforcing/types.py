"""The data of one attention call, and the letters of its shapes.

Shapes, everywhere: `B` batch, `F` frames of the chunk, `P` tokens per frame, `L = F*P`, `H` heads,
`Hr` heads of one role, `n` frames in a view, `D` head dim, `C` model dim. Frame numbers are absolute
latent frame indices; lengths are in frames unless a name says tokens or bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

_Made = TypeVar("_Made")
Phase = Literal["denoise", "clean"]
"""`"denoise"`: a noisy pass. `"clean"`: the clean pass that writes the cache."""

Tier = Literal["sink", "episodic", "recent"]
"""What a stored frame is to a role: one of the first, the chosen, or the last."""

Encode = Callable[..., Tensor]
"""Rotates keys or queries `[B, n, P, Hr, D]` to `n` temporal positions with the RoPE of the base model.

Called with both; with a third, `patch`, only where squares of patches were merged into one."""

Grid = tuple[int, int]
"""Patches of a frame, height and width."""


@dataclass(frozen=True)
class Chunk:
    """The frames denoised together, as one layer sees them.

    Attributes:
        start: absolute index of the first frame.
        k: keys after normalisation and before RoPE, `[B, F, P, H, D]`.
        v: values, `[B, F, P, H, D]`.
        grid: height and width of a frame in patches, for roles that merge patches.
        q: queries before RoPE, likewise, for roles that select tokens by them.
        rolling: whether it may come again with more or fewer frames after its first ones, as where several
            chunks are denoised at once; those before the next chunk are committed.
        shift: how far the base model moves its frames on the temporal axis, in frames.
        alone: whether its frames are recomputed without any history.
    """

    start: int
    k: Tensor
    v: Tensor
    grid: Grid | None = None
    q: Tensor | None = None
    rolling: bool = False
    shift: float = 0
    alone: bool = False

    @property
    def frames(self) -> range:
        """Absolute indices of the frames."""
        return range(self.start, self.start + self.k.shape[1])


@dataclass(frozen=True)
class Pin:
    """First frames of a later shot, which the base model keeps in place of its sink.

    Attributes:
        begin: the first of them.
        frames: how many the base model keeps.
        always: first frames of the video that it keeps as well.
    """

    begin: int
    frames: int
    always: int = 0


@dataclass(frozen=True)
class Truncation:
    """The base model emptied its cache before it recomputes the pending chunk.

    Attributes:
        keep: first frames of the video that it kept.
    """

    keep: int = 0


Edit = Pin | Truncation
"""What the base model did to its cache between two calls."""


@dataclass(frozen=True)
class FrameTable:
    """The stored frames one role may choose from, oldest first.

    A role answers with rows of this table, so it cannot ask for a frame that was evicted.

    Attributes:
        frames: absolute frame indices, ascending. `None` marks a row that was chosen by its content
            on the device: which frame it is differs per sample and is not known here.
        new: how many of the last rows were committed just now.
        chunk: frames in the chunk that begins.
        keys: fetches keys before RoPE of the given rows, `[B, rows, P, Hr, D]`. Only content-based
            roles call it.
        start: first frame of the chunk that begins, or that attends.
        query: the frame of the query, for roles that depend on it.
        pin: first frames of a later shot, where they are the sink.
        gap: positions that compressed tokens take, as in `CompressedHistory.gap`; 0 while there are none.
    """

    frames: tuple[int | None, ...]
    new: int
    chunk: int
    keys: Callable[[Sequence[int]], Tensor] = field(repr=False, compare=False)
    start: int = 0
    query: int | None = None
    pin: Pin | None = None
    gap: int = 0

    def __len__(self) -> int:
        return len(self.frames)

    def always(self, count: int) -> tuple[int, ...]:
        """Rows of first frames of the video, `count` at most, that a pin keeps beside those of its shot."""
        held = range(0 if self.pin is None else min(count, self.pin.always))
        return tuple(row for row, frame in enumerate(self.frames) if frame in held)

    def first(self, count: int) -> tuple[int, ...]:
        """Rows of the `count` frames that the video, or its pinned shot, begins with."""
        if self.pin is None:
            return tuple(range(min(count, len(self))))
        pinned = range(self.pin.begin, self.pin.begin + min(count, self.pin.frames))
        return tuple(row for row, frame in enumerate(self.frames) if frame in pinned)


@dataclass(frozen=True)
class Selection:
    """Rows of a `FrameTable` that stay, oldest first: `before`, then `chosen`, then `after`.

    Attributes:
        before: rows known without looking at keys.
        chosen: rows picked by content, `[B, m]` on the device, ascending; `m` is known, they are not.
        after: rows known without looking at keys.
    """

    before: tuple[int, ...]
    chosen: Tensor | None = None
    after: tuple[int, ...] = ()

    def frames(self, table: FrameTable) -> tuple[int | None, ...]:
        """Frame indices of the selected rows, `None` for the chosen ones."""
        unknown = 0 if self.chosen is None else self.chosen.shape[1]
        kept = [table.frames[row] for row in self.before]
        return (*kept, *[None] * unknown, *[table.frames[row] for row in self.after])


@dataclass(frozen=True)
class KVView:
    """The whole frames that one role attends to in one call, current chunk last.

    Attributes:
        frames: absolute frame indices (`None`: chosen by content).
        positions: the temporal RoPE position of each frame; whole numbers unless the base model shifts them.
        k: rotated keys, `[B, n, P, Hr, D]`.
        v: values, `[B, n, P, Hr, D]`.
    """

    frames: tuple[int | None, ...]
    positions: tuple[float, ...]
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class AttentionCall:
    """One call of a self-attention module.

    Attributes:
        x: hidden states, `[B, L, C]`.
        start: absolute index of the chunk's first frame.
        grid: frames, height and width of the chunk in patches, `(F, h, w)`.
        anchor: the object whose life is the life of the timeline (for Self Forcing the key tensor
            of the cache); `None` where the base model has no cache object.
        arguments: the original call by parameter name, for the adapter. A dict of this call alone: what
            `project` puts into it, `output` finds there.
        phase: which pass this is, where some role requires it.
        repeats: whether a call that ends where the video ends, but begins before its last chunk, means that
            the base model recomputes these frames, as after a new prompt (KV recache).
        emptied: whether the base model kept nothing but the recomputed frames.
        rolling, shift: see `Chunk`.
        heads: whose queries or keys are rotated, where a model rotates heads differently; `None`: all.
        rotary_cache: rotation factors of the RoPE table, for all roles of this call, where they are not kept
            from call to call; see `rope.rotate`.
    """

    x: Tensor
    start: int
    grid: tuple[int, int, int]
    anchor: object | None
    arguments: dict[str, Any] = field(repr=False)
    phase: Phase = "denoise"
    repeats: bool = False
    emptied: bool = False
    rolling: bool = False
    shift: float = 0
    heads: Heads | None = None
    rotary_cache: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens_per_frame(self) -> int:
        """Patches in one frame, `P`."""
        return self.grid[1] * self.grid[2]

    def of_heads(self, heads: Heads) -> AttentionCall:
        """The same call, queries or keys being those of some heads."""
        twin = object.__new__(type(self))  # what `dataclasses.replace` does takes ten times as long
        twin.__dict__.update(self.__dict__, heads=heads)
        return twin


@dataclass(frozen=True)
class TracedCall:
    """What `torch.compile` must know of a call that becomes one operator of its graph.

    Attributes:
        arguments: by name, without what the adapter does not read.
        like: what the forward returns has this shape, and its dtype unless autocast says otherwise.
        writes: tensors of the base model that are written, keys and values excluded.
        numbers: how many whole numbers the forward returns after it.
    """

    arguments: Mapping[str, Any]
    like: Tensor
    writes: tuple[Tensor, ...] = ()
    numbers: int = 0


class Heads:
    """A set of heads of one layer, and how to take them out of a tensor and put them back.

    Args:
        indices: head numbers, ascending.
        num_heads: heads in the layer, `H`.
    """

    def __init__(self, indices: Sequence[int], num_heads: int) -> None:
        self.indices = tuple(indices)
        self.everything = self.indices == tuple(range(num_heads))
        self._runs = [slice(first, last) for first, last in runs(self.indices)]

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, x: Tensor) -> Tensor:
        """The heads' part of `x`, `[..., H, D] -> [..., Hr, D]`; a view where they are neighbours."""
        if len(self._runs) == 1:
            return x[..., self._runs[0], :]
        return x.index_select(-2, numbers_on(x.device, self.indices))

    def take_into(self, out: Tensor, x: Tensor) -> None:
        """Writes the heads' part of `x [..., H, D]` to `out [..., Hr, D]`, both of one dtype."""
        if len(self._runs) == 1:
            out.copy_(x[..., self._runs[0], :])
        else:
            torch.index_select(x, -2, numbers_on(x.device, self.indices), out=out)

    def put(self, out: Tensor, part: Tensor) -> None:
        """Writes `part [..., Hr, D]` to the heads' places in `out [..., H, D]`."""
        if len(self._runs) == 1:
            out[..., self._runs[0], :] = part
        else:
            out.index_copy_(-2, numbers_on(out.device, self.indices), part.to(out.dtype))


def stream_of(device: torch.device) -> int | None:
    """The CUDA stream that work on a device goes to now, 0 on other devices; `None`: a graph is captured."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return int(torch.cuda.current_stream(device).cuda_stream)


class OncePerStream(Generic[_Made]):
    """What is made for a device is kept from call to call, for every stream by itself.

    Another stream may run ahead of the one that makes it. A CUDA graph that is captured takes what there is.

    Args:
        make: called with a device and more that can be hashed.
        most: how much is kept; what was not asked for longest is dropped.
    """

    def __init__(self, make: Callable[..., _Made], most: int) -> None:
        self.make, self.most = make, most
        self._made = functools.lru_cache(maxsize=most)(_nothing_yet)

    def __call__(self, device: torch.device, *more: Any) -> _Made:
        """What `make` made.

        Raises:
            RuntimeError: a CUDA graph is captured, and it was never made.
        """
        streams: dict[int, _Made] = self._made(device, *more)
        stream = stream_of(device)
        if stream is None:
            if not streams:
                what = f"a CUDA graph is captured on {device}, which cannot make {self.make.__name__}"
                raise RuntimeError(f"{what}: run the same pass once before you capture it")
            return next(iter(streams.values()))
        if stream not in streams:
            with torch.inference_mode(False):
                streams[stream] = self.make(device, *more)
        return streams[stream]

    def cache_clear(self) -> None:
        """Forgets everything."""
        self._made.cache_clear()


def _nothing_yet(*_: Any) -> dict[int, Any]:
    return {}


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on another device; the copy to CUDA is not waited for."""
    x = x.pin_memory() if device.type == "cuda" else x
    return x.to(device, non_blocking=True)


def _indices(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    return sent(torch.tensor(numbers, dtype=torch.long, device="cpu"), device)


numbers_on = OncePerStream(_indices, 4096)
"""Numbers, a tuple, on a device, `[n]`; the copy there is not waited for."""


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending neighbours as half-open ranges: `[0, 1, 5] -> [(0, 2), (5, 6)]`."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found
