"""The check of a backend: attention in float64, with an error budget.

Example:
    >>> from headforcing.attention.backends.sdpa import attend
    >>> check_backend(attend)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headforcing.attention.part import Attend, Part, num_queries
from headforcing.types import Heads

WORSE = 2
"""How many times the error of the plainest computation a backend may have, on top of the float32 bound."""


@dataclass(frozen=True)
class Group:
    """Heads that attend to the same keys.

    Attributes:
        heads: which of the layer these are.
        keys: how many keys they attend to, `M`.
        spare: unused tokens of the buffer after them.
        alone: whether every frame of queries attends by itself, to one key more than the one before it.
    """

    heads: tuple[int, ...]
    keys: int
    spare: int = 0
    alone: bool = False


@dataclass(frozen=True)
class Arrangement:
    """Parts as a store might return them, with random content.

    Attributes:
        groups: every head once, in all groups together.
        batch: samples, `B`.
        frames: frames of queries, `F`.
        patches: queries of a frame, `P`.
        dim: channels per head, `D`.
        shared: whether keys lie in one storage and values in another, with each head's tokens in adjacent
            rows; otherwise every part has its own tensors, with the heads of a token adjacent.
    """

    groups: tuple[Group, ...]
    batch: int = 1
    frames: int = 2
    patches: int = 5
    dim: int = 16
    shared: bool = True

    @property
    def num_heads(self) -> int:
        """Heads of the layer, `H`."""
        return sum(len(group.heads) for group in self.groups)

    def parts(self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Part]:
        """The parts; what is not attended to is `NaN`, so that a result which depends on it shows."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        readings = [(group, *reading) for group in self.groups for reading in self._readings(group)]
        sizes = [(self.batch, len(group.heads), keys + group.spare) for group, _, keys in readings]
        sides = [self._buffers(sizes, draw) for _ in ("k", "v")]
        parts = []
        for (group, rows, keys), k, v in zip(readings, *sides, strict=True):
            heads = Heads(group.heads, self.num_heads)
            q = draw(self.batch, rows.stop - rows.start, len(heads), self.dim)
            k[:, keys:], v[:, keys:] = torch.nan, torch.nan
            parts.append(Part(heads, q, k[:, :keys], v[:, :keys], rows))
        return parts

    def _readings(self, group: Group) -> list[tuple[slice, int]]:
        """Query rows that attend to the same, and to how many keys."""
        if not group.alone:
            return [(slice(0, self.frames * self.patches), group.keys)]
        starts = range(0, self.frames * self.patches, self.patches)
        return [(slice(at, at + self.patches), group.keys + number) for number, at in enumerate(starts)]

    def _buffers(self, sizes: Sequence[tuple[int, int, int]], draw: Callable[..., Tensor]) -> list[Tensor]:
        """Buffers for keys or values `[B, M, Hr, D]` of `(B, Hr, M)`."""
        if not self.shared:
            return [draw(batch, tokens, heads, self.dim) for batch, heads, tokens in sizes]
        flat = draw(sum(math.prod(size) for size in sizes), self.dim)
        pieces = flat.split([math.prod(size) for size in sizes])
        return [piece.view(*size, -1).transpose(1, 2) for piece, size in zip(pieces, sizes, strict=True)]


ARRANGEMENTS = (
    Arrangement((Group((0, 1, 2), keys=30),)),
    Arrangement((Group((0, 2), 7), Group((1,), 150), Group((3, 4), 64)), batch=2),
    Arrangement((Group((1, 3), 20, spare=9), Group((0, 2), 130, spare=3)), batch=2),
    Arrangement((Group((2,), 12, alone=True), Group((0, 1), 40)), frames=3),
    Arrangement((Group((0, 2), 33, spare=4), Group((1,), 3)), batch=2, shared=False),
    Arrangement((Group((1,), 5, alone=True), Group((0, 2), 300)), frames=3, patches=130),
)
"""One role; heads of three lengths; buffers that are not full; reading per query frame; many storages; more
queries than a kernel takes at once."""


@dataclass(frozen=True)
class Budget:
    """The exact result, and the allowed error of a backend.

    Attributes:
        exact: attention in float64, `[B, L, H, D]`.
        allowed: the largest error, per element.
    """

    exact: Tensor
    allowed: Tensor

    def check(self, out: Tensor, what: str) -> None:
        """Checks that an output `[B, L, H, D]` is near enough.

        Raises:
            AssertionError: it is not.
        """
        assert out.shape == self.exact.shape, (
            f"{what}: {tuple(out.shape)}, expected {tuple(self.exact.shape)}"
        )
        assert out.is_contiguous(), f"{what}: strides {out.stride()}, expected a contiguous tensor"
        error = (out.double() - self.exact).abs()
        far = ~(error <= self.allowed)  # also where it is NaN
        assert not far.any(), (
            f"{what}: {int(far.sum())} of {far.numel()} are off by up to {error[far].max():.2e}, where "
            f"{self.allowed[far].min():.2e} is allowed; first at {far.nonzero()[0].tolist()}"
        )


def budget_of(parts: Sequence[Part], num_heads: int) -> Budget:
    """How far from attention in float64 a backend may be: computed from the data, without asking a kernel.

    Allowed is `WORSE` times the greatest error of the plainest correct computation, which rounds to the dtype
    after every step, and a bound for kernels that accumulate in float32. With unit roundoff `u` of the dtype
    and `w` of float32, scores `s = q·k/√D` of `D` products are off by `d <= (D + 4) w Σ|q||k|/√D`, so weights
    by a factor `exp(2d)`; they are rounded to the dtype once, summed with `M` roundings of float32, and so
    are the outputs. With `A = Σ p|v|`, what the outputs may cancel from, that is
    `(2d + 2u + 2 M w) A + u |o|`, to first order.
    """
    shape = (parts[0].q.shape[0], num_queries(parts), num_heads, parts[0].q.shape[-1])
    exact, bound, plain = (parts[0].q.new_empty(shape, dtype=torch.float64) for _ in range(3))
    u, w = torch.finfo(parts[0].q.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    for part in parts:
        q, k, v = (x.double().transpose(1, 2) for x in (part.q, part.k, part.v))
        scale = q.shape[-1] ** -0.5
        weights = (scale * q @ k.mT).softmax(-1)
        out, around = weights @ v, weights @ v.abs()
        apart = (q.shape[-1] + 4) * w * scale * (q.abs() @ k.abs().mT).amax(-1, keepdim=True)
        off = (2 * apart + 2 * u + 2 * k.shape[-2] * w) * around + u * out.abs()
        for whole, piece in ((exact, out), (bound, off), (plain, _plainest(q, k, v, part.q.dtype))):
            part.heads.put(whole[:, part.rows], piece.transpose(1, 2))
    return Budget(exact, WORSE * (plain - exact).abs().max() + bound)


def _plainest(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention of float64 tensors `[B, Hr, L or M, D]`, every step rounded to the dtype."""

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    root = q.shape[-1] ** -0.25  # PyTorch's operators scale both sides
    scores = rounded(rounded(root * q) @ rounded(root * k).mT)
    return rounded(rounded(scores.softmax(-1)) @ v)


def check_backend(
    attend: Attend,
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    dim: int = 16,
    arrangements: Sequence[Arrangement] = ARRANGEMENTS,
) -> None:
    """Checks a backend: attention within the budget, inputs not modified, repeatable.

    Args:
        attend: the backend.
        device: where to run.
        dtypes: of queries, keys and values.
        dim: channels per head.
        arrangements: parts to try.

    Raises:
        AssertionError: a check failed; the message says which.
    """
    for parts, num_heads, what in _trials(device, dtypes, dim, arrangements):
        before = [x.clone() for part in parts for x in (part.q, part.k, part.v)]
        budget = budget_of(parts, num_heads)
        with torch.no_grad():
            out = attend(parts, num_heads)
        assert out.dtype == parts[0].q.dtype, f"{what}: {out.dtype}, expected {parts[0].q.dtype}"
        budget.check(out, what)
        after = [x for part in parts for x in (part.q, part.k, part.v)]
        same = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert same, f"{what}: queries, keys or values were changed"
        with torch.inference_mode():
            budget.check(attend(parts, num_heads), f"{what}, again")


def _trials(
    device: str, dtypes: Sequence[torch.dtype], dim: int, arrangements: Sequence[Arrangement]
) -> Iterator[tuple[list[Part], int, str]]:
    for dtype, (number, arrangement) in itertools.product(dtypes, enumerate(arrangements)):
        fitting = Arrangement(**{**vars(arrangement), "dim": dim})
        what = f"arrangement {number} in {dtype} on {device}"
        yield fitting.parts(device, dtype, seed=number), fitting.num_heads, what
