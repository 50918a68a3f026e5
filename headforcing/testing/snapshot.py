"""Records a model down to the bits, to compare it before and after.

Equal outputs do not prove that a patch is reversible: a leftover attribute, a parameter that became
another object, or a module replaced by an equal copy all give the same output. A snapshot
compares objects by identity and tensors by identity, address and content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Same:
    """An object compared by identity; the reference keeps its address from being reused."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} at {id(self.value):#x}>"


@dataclass(frozen=True)
class Snapshot:
    """Facts about a model by name; two snapshots are equal if nothing differs.

    A snapshot keeps the objects it names alive, so drop it before testing whether they are freed.

    Attributes:
        facts: what was found, such as `"blocks.0.attn: class"`.
    """

    facts: Mapping[str, object]

    def diff(self, later: Snapshot) -> list[str]:
        """One readable line per fact that changed, appeared or disappeared; empty if nothing did."""
        lines = []
        for name in dict.fromkeys([*self.facts, *later.facts]):
            if name not in later.facts:
                lines.append(f"{name}: gone (was {self.facts[name]!r})")
            elif name not in self.facts:
                lines.append(f"{name}: new ({later.facts[name]!r})")
            elif self.facts[name] != later.facts[name]:
                lines.append(f"{name}: {self.facts[name]!r} -> {later.facts[name]!r}")
        return lines


def snapshot(model: nn.Module) -> Snapshot:
    """Records a model: modules, classes, attributes, hooks, training flags, parameters, buffers.

    Args:
        model: any module; it is not modified.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> before = snapshot(model)
        >>> model[0].note = "left behind"
        >>> [line.partition(" (")[0] for line in before.diff(snapshot(model))]
        ['0.note: new']
    """
    facts: dict[str, object] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, fact in _facts_of(module):
            facts[f"{path}{name}" if path else name.lstrip(".")] = fact
    return Snapshot(facts)


def bits(tensor: Tensor) -> str:
    """A hash of a tensor's content (of the local shard if it is sharded); NaN equals NaN."""
    if tensor.is_meta:
        return "no content"
    flat = _own(tensor).resolve_conj().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]


def _facts_of(module: nn.Module) -> Iterator[tuple[str, object]]:
    yield ": module", Same(module)
    yield ": class", Same(type(module))
    for table in _TABLES:
        entries = module.__dict__[table]
        yield f": {table}", (Same(entries), tuple(entries))
        for name, entry in entries.items():
            if isinstance(entry, Tensor):
                yield f".{name}", (Same(entry), *_tensor_facts(entry))
            elif entry is None:
                yield f".{name}", None
    for name, value in module.__dict__.items():
        if name not in _TABLES:
            yield f".{name}", _attribute_fact(value)


def _attribute_fact(value: object) -> object:
    """Plain attributes by identity, hook tables with their entries, tensors with their content."""
    if isinstance(value, Tensor):
        return (Same(value), *_tensor_facts(value))
    if isinstance(value, Mapping):
        return (Same(value), tuple((key, Same(entry)) for key, entry in value.items()))
    return value if isinstance(value, bool | int | str | None) else Same(value)


def _tensor_facts(tensor: Tensor) -> tuple[object, ...]:
    layout = (tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device))
    spread = str(getattr(tensor, "placements", "on one device"))
    return (*layout, spread, tensor.requires_grad, _own(tensor).data_ptr(), bits(tensor))


def _own(tensor: Tensor) -> Tensor:
    """The tensor, or the local shard of a sharded one."""
    plain = tensor.detach()
    own: Tensor = plain.to_local() if hasattr(plain, "to_local") else plain
    return own
