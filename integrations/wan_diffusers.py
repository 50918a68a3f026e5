"""Wan of diffusers, the bidirectional one that AR models are distilled from: it has no past.

Its facts: all frames of the video are in every call and attend to each other; neither the transformer nor
the processors of its attention are told of a cache, nor at which frame a call begins.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from headforcing.adapters.base import parameter_names

PARTS = {"patch_embedding", "rope", "condition_embedder", "blocks"}
FORWARD = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
OPTIONS = ("return_dict", "attention_kwargs")
PROCESSOR = ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb")


def refuse(model: nn.Module) -> str | None:
    """Why a transformer that is given the whole video cannot be served."""
    for module in model.modules():
        if module._modules.keys() >= PARTS and parameter_names(module) == (*FORWARD, *OPTIONS):
            blocks = module.get_submodule("blocks").children()
            attentions = [getattr(block, "attn1", None) for block in blocks]
            if attentions and all(_takes(attention) == PROCESSOR for attention in attentions):
                return (
                    "it is bidirectional: all frames are in every call and attend to each other, so no frame "
                    "is in the past and none is remembered. Load a model that was distilled from it to be "
                    "autoregressive (Self Forcing, LongLive, CausVid, ...), in the class of its repository"
                )
    return None


def _takes(attention: Any) -> tuple[str, ...]:
    """What the processor of an attention is called with."""
    processor = getattr(attention, "processor", None)
    return tuple(inspect.signature(processor).parameters) if callable(processor) else ()
