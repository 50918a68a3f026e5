"""What training asks of the demo model, and generating does not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from headforcing.demo.model.attention import grid_phases
from headforcing.demo.model.model import DemoBlock, DemoModel


def init_weights(model: DemoModel, generator: torch.Generator) -> None:
    """Weights to start training from: every block is the identity and the output is zero."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            std = parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(model.position_embedding, std=0.3, generator=generator)
    nn.init.normal_(model.text_position, std=0.02, generator=generator)
    nn.init.normal_(model.text_embedding.weight, std=0.5, generator=generator)
    nn.init.normal_(model.place_embedding.weight, std=0.25, generator=generator)
    zeros = [model.head.weight, model.time_projection.weight]
    for block in model.blocks:
        zeros += [block.self_attn.o.weight, block.cross_attn.o.weight]
        zeros += list(block.ffn[2].parameters())
        nn.init.zeros_(block.modulation)
        block.modulation.data[[2, 5]] = 1.0
    for weight in zeros:
        nn.init.zeros_(weight)


def predict_chunks(
    model: DemoModel, clean: Tensor, noisy: Tensor, which: Sequence[int], t: Tensor, context: Tensor
) -> Tensor:
    """Predicts some chunks of a video, each from its noisy self and the clean chunks before it.

    Args:
        model: the demo model.
        clean: context `[B, 48, F, 4, 6]`.
        noisy: the chunks to predict, one after the other, `[B, 48, K · chunk, 4, 6]`.
        which: their numbers, ascending.
        t: their noise levels, `[B, K]`.
        context: word ids `[B, chunks, W]` of the whole video.

    Returns:
        Clean latents, shaped like `noisy`.
    """
    config = model.config
    before = max(which)
    rows = [*range(before), *which]
    prompts = context[:, rows]
    latents = torch.cat([clean[:, :, : before * config.chunk], noisy], 2)
    levels = torch.cat([t.new_zeros(len(t), before), t], 1).repeat_interleave(config.chunk, 1)
    tokens = model._embed(latents, prompts)
    shifts, words = model._condition(levels, prompts)
    by_row = [grid_phases(model.freqs, (config.chunk, *config.grid), row * config.chunk) for row in rows]
    phases = torch.stack(by_row).to(tokens.device)  # [R, L, D / 2]
    turns = torch.stack([phases.real, phases.imag]).to(tokens.dtype)
    ends = [*range(1, before + 1), *which]
    tokens = rearrange(tokens, "b (r l) c -> b r l c", r=len(rows))
    shifts = rearrange(shifts, "b (r f) s c -> b r f s c", r=len(rows))
    for block in model.blocks:
        tokens = _block(block, tokens, shifts, words, turns, before, ends)
    return model._latents(tokens[:, before:].flatten(1, 2))


def _block(
    block: DemoBlock,
    x: Tensor,
    shifts: Tensor,
    words: Tensor,
    turns: Tensor,
    before: int,
    ends: Sequence[int],
) -> Tensor:
    """One block on rows of tokens `[B, R, L, C]`; the first `before` rows are the clean chunks."""
    q, k, v = _project(block, x, shifts, turns)
    seen = _attend_rows(q, k, v, before, ends)
    return _rest(block, x, seen, shifts, words)


def _shifted(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm of `[B, R, L, C]`, then the modulation `[B, R, F, C]` of its frames."""
    normed = functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    by_frame = normed.unflatten(2, (scale.shape[2], -1))
    return (by_frame * (1 + scale[:, :, :, None]) + shift[:, :, :, None]).flatten(2, 3)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    return (x.unflatten(2, (gate.shape[2], -1)) * gate[:, :, :, None]).flatten(2, 3)


def _project(block: DemoBlock, x: Tensor, shifts: Tensor, turns: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values `[B, R, H, L, D]`, rotated."""
    attention = block.self_attn
    shift, scale = (shifts + block.modulation).to(x.dtype).unbind(3)[:2]
    h = _shifted(x, scale, shift)
    found = (attention.norm_q(attention.q(h)), attention.norm_k(attention.k(h)), attention.v(h))
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)) for part in found)
    q, k = _rotate(q, turns), _rotate(k, turns)
    return tuple(part.transpose(2, 3) for part in (q, k, v))


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate interleaved pairs of `[B, R, L, H, D]` by cosines and sines `[2, R, L, D / 2]`."""
    cos, sin = turns[:, :, :, None]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, before: int, ends: Sequence[int]) -> Tensor:
    """Each row attends to the clean rows before it and to itself, `[B, R, H, L, D]`."""
    clean = [part[:, :before].transpose(1, 2).flatten(2, 3) for part in (k, v)]  # [B, H, before · L, D]
    length, found = q.shape[3], []
    for row, end in enumerate(ends):
        past = [part[:, :, : end * length] for part in clean]
        if row >= before:
            past = [torch.cat([old, own[:, row]], 2) for old, own in zip(past, (k, v), strict=True)]
        found.append(_attend(q[:, row], *past))
    return torch.stack(found, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over `[B, H, L, D]`; written out on the CPU, where SDPA's backward is slow."""
    if q.is_cuda:
        return functional.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v


def _rest(block: DemoBlock, x: Tensor, seen: Tensor, shifts: Tensor, words: Tensor) -> Tensor:
    """The block behind its self-attention."""
    _, _, gate, shift_mlp, scale_mlp, gate_mlp = (shifts + block.modulation).to(x.dtype).unbind(3)
    x = x + _gated(block.self_attn.o(seen.transpose(2, 3).flatten(3)), gate)
    normed = functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    x = x + block.cross_attn(normed.flatten(0, 1), words).view_as(x)
    return x + _gated(block.ffn(_shifted(x, scale_mlp, shift_mlp)), gate_mlp)
