"""The demo model as a target of `eval_lora.py`; write such a `make` for a model of yours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headforcing.demo import DemoPipeline, demo_model, parse_prompt

CHUNKS = 14  # of 3 frames: twice the trained window


def make() -> tuple[nn.Module, Callable[[str, torch.Generator], Tensor]]:
    """The model, and a function from a prompt and a source of noise to a video `[1, 3, T, H, W]`."""
    model = demo_model()
    pipeline = DemoPipeline(model)

    def run(prompt: str, generator: torch.Generator) -> Tensor:
        words = parse_prompt(prompt).expand(1, CHUNKS, -1)
        return pipeline.generate(words, generator=generator)

    return model, run
