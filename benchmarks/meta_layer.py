"""A layer of the real size on the `meta` device, where nothing is computed: for counting operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headforcing.apply import apply_head_forcing
from headforcing.apply.handle import HeadForcing
from headforcing.demo.model.attention import DemoCausalSelfAttention, DemoConfig, rope_table
from headforcing.errors import OptionError
from headforcing.measure.memory import DTYPES
from headforcing.measure.sizes import ModelSize
from headforcing.roles import HeadRole


class Layer(nn.Module):
    """A host of one layer: its cache, its input, and a clock for roles that ask for the phase.

    Args:
        size: of the model.
        videos: of a batch, `B`.
        device: where its tensors are; not on `meta`, they hold whatever was there.
    """

    def __init__(self, size: ModelSize, videos: int = 1, device: str = "meta") -> None:
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
        self.sizes, self.freqs = torch.tensor([[size.chunk, *size.grid]]), rope_table(config).to(device)
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

    def force(self, row: Sequence[HeadRole], store: str) -> HeadForcing:
        """Head forcing on the layer."""
        return apply_head_forcing(
            self, [list(row)], window=self.size.window, chunk=self.size.chunk, store=store
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of the host's keys and values."""
        return sum(self.cache[name].nbytes for name in ("k", "v"))


class ResultAlone(TorchFunctionMode):
    """Softmax attention that computes nothing while entered: a tensor of the right shape."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Everything else runs as it is."""
        given: Mapping[str, Any] = kwargs or {}
        if func is scaled_dot_product_attention:
            return torch.empty_like(given.get("query", args[0] if args else None))
        return func(*args, **given)


class Outline(NamedTuple):
    """All there is to a tensor on `meta` that shares its memory with no other."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


Known = dict[Hashable, Outline]
"""What operators return, by their names and arguments."""


class Remembering(TorchDispatchMode):
    """Works out once what an operator makes of such tensors on `meta`, while entered.

    There is nothing in them, so what comes out hangs on their outlines and on the other arguments alone. All
    that may hang on more runs as it is: operators that write or return views, and those that are given a
    tensor of another device.

    Args:
        known: what was worked out before; what is worked out now is added.
    """

    def __init__(self, known: Known) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operator, or makes what it made of such arguments before."""
        given = kwargs or {}
        key = _asked(func, args, given) if _makes_one_tensor(func) else None
        if key is None:
            return func(*args, **given)
        if (known := self._known.get(key)) is not None:
            return torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
        out = func(*args, **given)
        if (outline := _outline(out, (args, given))) is not None:
            self._known[key] = outline
        return out


def returns_views(func: Any) -> bool:
    """Whether an operator returns views of what it was given, and has nothing to do."""
    kinds = [one.alias_info for one in func._schema.returns]
    return any(kind is not None and not kind.is_write for kind in kinds)


@functools.cache
def _makes_one_tensor(func: Any) -> bool:
    """Whether an operator writes to nothing and returns one tensor that is no view."""
    schema = func._schema
    kinds = [str(one.type) for one in schema.returns]
    shares = any(one.alias_info is not None for one in (*schema.arguments, *schema.returns))
    return kinds == ["Tensor"] and not schema.is_mutable and not shares


def _asked(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable | None:
    """An operator with its arguments; `None`: one of them is a tensor with numbers in it, or of a kind."""
    try:
        return func, _told(args), tuple((name, _told(value)) for name, value in kwargs.items())
    except _NotTold:
        return None


class _NotTold(Exception):
    """An argument is more than can be told."""


def _told(value: Any) -> Hashable:
    """An argument as part of a key: 1, 1.0 and True are three."""
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        if value.device.type != "meta" or value.layout is not torch.strided:
            raise _NotTold
        return value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg()
    if isinstance(value, Tensor):
        raise _NotTold
    if kind is list or kind is tuple:
        return tuple([_told(one) for one in value])
    return kind, value


def _outline(out: Tensor, given: Any) -> Outline | None:
    """What came out; `None` where a tensor made anew would be another one."""
    if type(out) is not Tensor or out.device.type != "meta" or out.layout is not torch.strided:
        return None
    twin = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
    alike = _key(out) not in {_key(x) for x in tree_leaves(given) if isinstance(x, Tensor)}
    alike = alike and out.untyped_storage().nbytes() == twin.untyped_storage().nbytes()
    alike = alike and not (out.storage_offset() or out.is_conj() or out.is_neg())
    return Outline(tuple(out.shape), out.stride(), out.dtype) if alike else None


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
