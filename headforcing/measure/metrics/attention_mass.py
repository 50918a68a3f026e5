"""Share of the attention on the first frame, the middle and the current chunk, and by frame age.

Documented: Head Forcing (arXiv:2605.14487, Fig. 3a) sorts heads by three attention proportions. Inferred:
that "first" is one latent frame, that "own" is the current chunk, and the mean over queries.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nan

from headforcing.measure.metrics import Look, Metric


class AttentionMass(Metric):
    """`first`, `middle`, `own` `[B, H]`, which add up to one, and `by_age` `[B, H, window - 1]`.

    If the first frame of the video is not attended to, `first` and `middle` are unknown.
    """

    name = "attention_mass"

    def measure(self, look: Look) -> Mapping[str, Tensor]:
        """See `Metric.measure`."""
        share = look.share
        own = share[..., look.history :].sum(-1)
        first, middle = share[..., 0], share[..., 1 : look.history].sum(-1)
        if look.frames[0] != 0:
            first = middle = own.new_full(own.shape, nan)
        return {"first": first, "middle": middle, "own": own, "by_age": look.by_age(share)}


METRIC = AttentionMass
