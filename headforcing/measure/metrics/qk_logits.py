"""Mean logit before the softmax, of the last query frame on every history frame.

The series over frame age from which Pyramid Forcing (arXiv:2605.13111) derives sign and period. From the
paper, through a third party: logits before the softmax, last query frame, mean per frame. Our choice: the
logits include RoPE and the scale `1/sqrt(D)`; only RoPE can change a sign.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from headforcing.measure.metrics import Look, Metric


class QKLogits(Metric):
    """`by_age` `[B, H, window - 1]`; entry `a - 1` is the frame `a` frames before the chunk."""

    name = "qk_logits"

    def measure(self, look: Look) -> Mapping[str, Tensor]:
        """See `Metric.measure`."""
        last = look.logits[:, :, look.query_frames == look.chunk - 1]
        return {"by_age": look.by_age(last.mean(2))}


METRIC = QKLogits
