"""What training asks of the demo model, and generating does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headforcing.demo.model.model import DemoModel


def init_weights(model: DemoModel, generator: torch.Generator) -> None:
    """Weights to start training from: every block is the identity and the output is zero."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            std = parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
    for table in (model.position_embedding, model.text_position):
        nn.init.normal_(table, std=0.02, generator=generator)
    nn.init.normal_(model.text_embedding.weight, std=0.5, generator=generator)
    zeros = [model.head.weight, model.time_projection.weight]
    for block in model.blocks:
        zeros += [block.self_attn.o.weight, block.cross_attn.o.weight]
        zeros += list(block.ffn[2].parameters())
        nn.init.zeros_(block.modulation)
        block.modulation.data[[2, 5]] = 1.0
    for weight in zeros:
        nn.init.zeros_(weight)


def predict_all(model: DemoModel, clean: Tensor, noisy: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """Predicts every chunk of a video from its noisy self and the clean chunks before it.

    Args:
        model: the demo model.
        clean: context `[B, 3, F, 24, 24]`.
        noisy: what is predicted from, same shape.
        t: noise levels of the noisy copy, `[B, F]`.
        context: word ids `[B, chunks, W]`.

    Returns:
        `[B, 3, F, 24, 24]`.
    """
    tokens = model._embed(torch.cat([clean, noisy], 2))
    levels = torch.cat([torch.zeros_like(t), t], 1)
    tokens = model._run(tokens, levels, context.repeat(1, 2, 1), clean.shape[2], None, None, 0)
    return model._pixels(tokens[:, tokens.shape[1] // 2 :])
