"""Bidirectional Wan of diffusers, from which AR models are distilled: it has no KV cache.

Facts: all frames of the video are in every call and attend to each other; neither the transformer nor its
attention processors get a cache or the first frame of a call.
"""

from __future__ import annotations

from torch import nn

from headforcing.adapters.base import parameter_names
from headforcing.adapters.looks import processor_names

PARTS = {"patch_embedding", "rope", "condition_embedder", "blocks"}
FORWARD = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
OPTIONS = ("return_dict", "attention_kwargs")
PROCESSOR = ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb")


def refuse(model: nn.Module) -> str | None:
    """Why a transformer that receives the whole video is not supported."""
    for module in model.modules():
        if module._modules.keys() >= PARTS and parameter_names(module) == (*FORWARD, *OPTIONS):
            blocks = module.get_submodule("blocks").children()
            attentions = [getattr(block, "attn1", None) for block in blocks]
            if attentions and all(processor_names(attention) == PROCESSOR for attention in attentions):
                return (
                    "it is bidirectional: all frames are in every call and attend to each other, so there is "
                    "no KV cache of past frames. Load an autoregressive model distilled from it (Self "
                    "Forcing, LongLive, CausVid, ...), in the class of its repository"
                )
    return None
