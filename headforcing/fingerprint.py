"""A short name for the attention weights of a model, to notice that roles belong to other weights.

Every byte of every parameter and buffer of the causal self-attentions counts. Values are rounded to
bfloat16 first, so that the float32, and the bfloat16 copy of one checkpoint have the same
fingerprint. Two integer sums per tensor are computed where the weights are, and only those are hashed:
it is a guard against mistakes, not against forgery.
"""

from __future__ import annotations

import itertools
import json

import torch
from torch import Tensor, nn

from headforcing.adapter import Adapter
from headforcing.strict_json import digest

_PIECE = 1 << 22
_PRIME = 65521


def fingerprint(model: nn.Module, adapter: Adapter) -> str | None:
    """`sha256:...` of the attention weights; `None` while some of them are elsewhere (meta tensors)."""
    names: list[str] = []
    sums: list[Tensor] = []
    for layer, (_, module) in enumerate(adapter.attentions(model)):
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            if tensor.is_meta:
                return None
            names.append(f"{layer}.{name} {list(tensor.shape)}")
            sums.append(_sums(tensor.detach()).cpu())
    order = sorted(range(len(names)), key=names.__getitem__)
    table = [[names[index], *sums[index].tolist()] for index in order]
    return digest(json.dumps(table).encode())


def _sums(tensor: Tensor) -> Tensor:
    """Plain and weighted sum of the bit patterns, int64 with wrap-around: the same on every device."""
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    first = 0
    for piece in tensor.reshape(-1).split(_PIECE):
        if piece.is_floating_point() or piece.is_complex():
            real = torch.view_as_real(piece).flatten() if piece.is_complex() else piece
            bits = real.to(torch.bfloat16).view(torch.int16).long()
        else:
            bits = piece.long()
        place = torch.arange(first, first + len(bits), device=tensor.device)
        total += torch.stack([bits.sum(), (bits * (place % _PRIME + 1)).sum()])
        first += len(bits)
    return total
