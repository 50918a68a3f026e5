"""Helios: autoregressive over latents, without a KV cache.

Facts: every step takes the last frames as latents at three scales, embeds them again and puts them before the
chunk, so keys and values of past frames are recomputed in every step.
"""

from __future__ import annotations

from torch import nn

from headforcing.adapters.base import parameter_names

PARTS = {"patch_embedding", "rope", "blocks"}
HISTORY = {"latents_history_short", "latents_history_mid", "latents_history_long"}
_GIVEN = ", ".join(sorted(HISTORY))


def refuse(model: nn.Module) -> str | None:
    """Why a transformer that receives its past as latents is not supported."""
    for module in model.modules():
        if module._modules.keys() >= PARTS and {*parameter_names(module)} >= HISTORY:
            return (
                f"it has no KV cache: each step receives the past as latents ({_GIVEN}) and recomputes its "
                "keys and values. Set how much past all heads get with history_sizes of its pipeline; mask "
                "single heads with an attention processor"
            )
    return None
