"""Sizes of known models, and what one frame takes in them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headforcing.errors import OptionError

if TYPE_CHECKING:
    from headforcing.types import Grid

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of one number, by the name of its type."""
FRAME_ID = 8
"""Bytes of the number of a frame, which a store holds once per role and layer."""


@dataclass(frozen=True)
class ModelSize:
    """What the size of a model's memory hangs on.

    Attributes:
        layers: causal self-attention layers.
        heads: heads per layer.
        head_dim: channels per head, `D`.
        window: frames the model was trained on.
        chunk: frames of a chunk, `F`.
        grid: height and width of a frame in patches.
        itemsize: bytes of one number.

    Raises:
        OptionError: one of them is no whole number of at least 1.
    """

    layers: int
    heads: int
    head_dim: int
    window: int
    chunk: int
    grid: Grid
    itemsize: int = ITEMSIZES["bf16"]

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self) if field.name != "grid"]
        given = {name: getattr(self, name) for name in (*names, "tokens_per_frame")}
        for name, value in given.items():
            if type(value) is not int or value < 1:
                raise OptionError(f"{name} is {value!r}: expected a whole number, at least 1")

    @property
    def tokens_per_frame(self) -> int:
        """Patches of one frame, `P`."""
        return math.prod(self.grid)

    @property
    def count(self) -> int:
        """Heads over all layers."""
        return self.layers * self.heads

    @property
    def head_bytes(self) -> int:
        """Keys and values of one frame in one head."""
        return 2 * self.tokens_per_frame * self.head_dim * self.itemsize

    @property
    def frame_bytes(self) -> int:
        """Keys and values of one frame in all heads."""
        return self.count * self.head_bytes

    @property
    def window_bytes(self) -> int:
        """Keys and values of a whole window: the dense cache of the model as it was trained."""
        return self.window * self.frame_bytes

    @property
    def ring_head_bytes(self) -> int:
        """What the `ring` store holds for one frame in one head, at most: 1.5 times, and a number."""
        return 3 * self.head_bytes // 2 + FRAME_ID


def _wan(layers: int, heads: int) -> ModelSize:
    """Wan2.1 at 480 x 832 pixels, in the chunks of Self Forcing.

    Documented: layers, heads of 128 channels, 8 x 8 pixels of the VAE and 2 x 2 of those per patch in the
    configuration of Wan2.1 (arXiv:2503.20314); window and chunk in that of Self Forcing (arXiv:2506.08009).
    """
    return ModelSize(layers, heads, 128, window=21, chunk=3, grid=WAN_480P)


WAN_480P = (480 // 8 // 2, 832 // 8 // 2)
MODELS = {
    "wan-1.3b": _wan(30, 12),
    "wan-14b": _wan(40, 40),
    "demo": ModelSize(6, 6, 32, window=21, chunk=3, grid=(4, 6), itemsize=ITEMSIZES["fp32"]),
}
"""Sizes of known models by name: Wan2.1 at 480p in bf16, and the embedded demo."""
