"""A short name for the attention weights of a model, to notice that roles belong to other weights.

Every parameter, and every buffer that a checkpoint holds, of the causal self-attentions counts. Values are
rounded to bfloat16 first, so that the float32 and the bfloat16 copy of one checkpoint have the same
fingerprint; LoRA layers inside of an attention are weights, too. One number per tensor is computed where the
weights are, and only those numbers are hashed: it is a guard against mistakes, not against forgery.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from headforcing.adapters.base import Adapter
from headforcing.roles.maps.strict_json import digest

_PIECE = 1 << 22
_PER_WORD = {torch.bfloat16: 4, torch.int64: 1}
_STEP, _SPREAD = -7046029254386353131, -4658895280553007687  # odd, so multiplying loses nothing (SplitMix64)


def fingerprint(model: nn.Module, adapter: Adapter) -> str | None:
    """`sha256:...` of the attention weights; `None` where some of them cannot be read, see `unreadable`."""
    if unreadable(model, adapter) is not None:
        return None
    found: dict[str, Tensor] = {}
    for layer, (_, module) in enumerate(adapter.attentions(model)):
        for name, tensor in _tensors(module):
            plain = name.replace("_orig_mod.", "")  # torch.compile's wrapper around a part of the attention
            found[f"{layer}.{plain} {list(tensor.shape)}"] = _mixed(tensor.detach())
    table = [[name, int(number)] for name, number in sorted(found.items())]
    return digest(json.dumps(table).encode())


def unreadable(model: nn.Module, adapter: Adapter) -> str | None:
    """What some attention weights are that cannot be read as they were when measured; `None`: all can.

    Weights that were quantised, cast to eight bits, sharded or sent elsewhere are other numbers, or are not
    here. Nothing is gathered or dequantised: processes would wait for each other, and rounded weights differ.
    """
    for path, module in adapter.attentions(model):
        for name, tensor in _tensors(module):
            if (kind := _foreign_kind(tensor)) is not None:
                return f"{kind}, such as {path}.{name}"
        for name, part in module.named_modules():
            if getattr(part, "weight", None) is not None and not any(True for _ in _tensors(part)):
                return f"no parameters (quantised, or flattened by FSDP), such as {path}.{name}.weight"
    return None


def is_half(model: nn.Module, adapter: Adapter) -> bool:
    """Whether some weights are float16, whose smallest numbers are rounded more than those of bfloat16."""
    tensors = (tensor for _, module in adapter.attentions(model) for _, tensor in _tensors(module))
    return any(tensor.dtype == torch.float16 for tensor in tensors)


def _foreign_kind(tensor: Tensor) -> str | None:
    """In the plural, what a weight is that is no plain tensor of numbers; `None`: it is one."""
    if tensor.is_meta:
        return "meta tensors"
    if getattr(tensor, "_fsdp_flattened", False):
        return "sharded by FSDP"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"quantised or sharded ({type(tensor).__name__})"
    if tensor.layout is not torch.strided:
        return f"stored as {tensor.layout}"
    if tensor.numel() == 0:
        return "empty (sharded, or not brought yet)"
    numbers = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return f"stored as {tensor.dtype}"
    return None if numbers or tensor.dim() < 2 else f"packed as {tensor.dtype}"


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by dotted name; caches that a base model registers are neither."""
    yield from module.named_parameters()
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}".removeprefix("."), buffer


def _mixed(tensor: Tensor) -> Tensor:
    """Sum of all 64-bit words, each scrambled with its place; int64 wraps around alike on every device.

    The scrambling is one to one, so a change inside a single word always changes the sum; any other
    change does, but for a chance of 2**-64.
    """
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    kind = torch.bfloat16 if flat.is_floating_point() else torch.int64
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    first = 0
    for piece in flat.split(_PIECE):
        rows = -(-len(piece) // _PER_WORD[kind])
        padded = torch.zeros(rows * _PER_WORD[kind], dtype=kind, device=flat.device)
        padded[: len(piece)] = piece
        words = padded.view(torch.int64)
        words += torch.arange(first + 1, first + rows + 1, device=flat.device).mul_(_STEP)
        words ^= words >> 32
        words *= _SPREAD
        words ^= words >> 29
        total += words.sum()
        first += rows
    return total
