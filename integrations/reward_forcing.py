"""Reward Forcing (arXiv:2512.04678): the signature of Self Forcing; evicted frames are mixed into the sink.

Facts (4317f5a): keys are cached before RoPE and rotated to the slots of the cache; every evicted chunk is
mixed into keys and values of the sink, as an exponential moving average (`compression_alpha`, 0.999).
"""

from __future__ import annotations

from torch import nn


def refuse_lookalike(model: nn.Module) -> str | None:
    """Why an attention with such a sink is not supported."""
    for module in model.modules():
        if hasattr(module, "compression_alpha") and callable(getattr(module, "incremental_update", None)):
            return (
                "its attention mixes every evicted chunk into the sink (incremental_update, "
                f"compression_alpha {module.compression_alpha}), which no role does yet. Load its weights "
                "into Self Forcing's model, whose attention is served"
            )
    return None
