"""Helios: autoregressive over latents, with no KV cache to give heads a share of.

Its facts: every step takes the last frames as latents at three scales, embeds them again and puts them
before the chunk, so keys and values of the past are those of this step and nothing is carried over.
"""

from __future__ import annotations

from torch import nn

from headforcing.adapters.base import parameter_names

PARTS = {"patch_embedding", "rope", "blocks"}
HISTORY = {"latents_history_short", "latents_history_mid", "latents_history_long"}
_HANDED = ", ".join(sorted(HISTORY))


def refuse(model: nn.Module) -> str | None:
    """Why a transformer that is handed its past as latents cannot be served."""
    for module in model.modules():
        if module._modules.keys() >= PARTS and {*parameter_names(module)} >= HISTORY:
            return (
                f"it keeps no keys and values: each step is handed the past as latents ({_HANDED}) and "
                "computes it anew, so there is no memory that heads could have a part of. What it remembers "
                "is history_sizes of its pipeline, for all heads alike; what single heads look at can be "
                "masked by an attention processor"
            )
    return None
