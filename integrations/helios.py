"""Helios and FramePack: autoregressive over latents, without a KV cache.

Facts: every step takes the last frames as latents at several scales, embeds them again and puts them before
the chunk, so keys and values of past frames are recomputed in every step.
"""

from __future__ import annotations

from torch import nn

from headforcing.adapters.base import parameter_names

HISTORY = "latents_history_"


def refuse(model: nn.Module) -> str | None:
    """Why a transformer that receives its past as latents is not supported."""
    for module in model.modules():
        given = sorted(name for name in parameter_names(module) if name.startswith(HISTORY))
        if module._modules.keys() >= {"rope"} and len(given) > 1:
            return (
                f"it has no KV cache: each step receives the past as latents ({', '.join(given)}) and "
                "recomputes its keys and values. How much past all heads get is history_sizes of its "
                "pipeline; mask single heads with an attention processor"
            )
    return None
