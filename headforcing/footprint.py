"""How many bytes the keys and values of a model take, counted before it is loaded.

Plain arithmetic for one stream of one video; multiply by videos, CFG branches and experts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headforcing.errors import OptionError

if TYPE_CHECKING:
    from headforcing.role_map import RoleMap
    from headforcing.roles import HeadRole

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of one number, by the name of its type."""
RING_BUFFERS = 3
"""The `ring` store keeps keys before RoPE, rotated keys, and values."""
RING_ID = 8
"""And the number of every frame, once per role and layer."""


@dataclass(frozen=True)
class ModelSize:
    """What the size of a model's memory hangs on.

    Attributes:
        layers: causal self-attention layers.
        heads: heads per layer.
        head_dim: channels per head, `D`.
        window: frames the model was trained on.
        chunk: frames of a chunk, `F`.
        tokens_per_frame: patches of one frame, `P`.
        itemsize: bytes of one number.

    Raises:
        OptionError: one of them is no whole number of at least 1.
    """

    layers: int
    heads: int
    head_dim: int
    window: int
    chunk: int
    tokens_per_frame: int
    itemsize: int = ITEMSIZES["bf16"]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise OptionError(f"{field.name} is {value!r}: expected a whole number, at least 1")

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
        return RING_BUFFERS * self.head_bytes // 2 + RING_ID

    def kv_bytes(self, roles: RoleMap) -> int | None:
        """Keys and values of the frames kept and the own chunk; `None` is without bound.

        Raises:
            OptionError: a role merges frames.
        """
        if merging := [role for role in roles.counts() if role.merge is not None]:
            raise OptionError(f"{merging[0]} merges frames: its blocks are not counted yet")
        kept = [role.capacity(self.chunk) for layer in roles.layers for role in layer]
        known = [frames for frames in kept if frames is not None]
        if len(known) < len(kept):
            return None
        return (sum(known) + len(kept) * self.chunk) * self.head_bytes

    def ring_bytes(self, roles: RoleMap) -> int | None:
        """What `status().stored_bytes` says of a full `ring` store; `None` is without bound.

        Raises:
            OptionError: a role sees a part of what it keeps, and the store packs that part as well.
        """
        for role in roles.counts():
            if packs(role):
                raise OptionError(
                    f"{role} is packed beside what it keeps: what the store packs is not counted"
                )
        plain = self.kv_bytes(roles)
        if plain is None:
            return None
        slots = [(role.capacity(self.chunk) or 0) + self.chunk for layer in roles.layers for role in {*layer}]
        return RING_BUFFERS * plain // 2 + RING_ID * sum(slots)


def packs(role: HeadRole) -> bool:
    """Whether the `ring` store holds a copy of what the role sees beside what it keeps."""
    from headforcing.roles import HeadRole  # torch, which a help text does not wait for

    return role.reads_per_query or type(role).attend is not HeadRole.attend


def _wan(layers: int, heads: int) -> ModelSize:
    """Wan2.1 at 480 x 832 pixels, in the chunks of Self Forcing.

    Documented: layers, heads of 128 channels, 8 x 8 pixels of the VAE and 2 x 2 of those per patch in the
    configuration of Wan2.1 (arXiv:2503.20314); window and chunk in that of Self Forcing (arXiv:2506.08009).
    """
    rows, columns = 480 // 8 // 2, 832 // 8 // 2
    return ModelSize(layers, heads, 128, window=21, chunk=3, tokens_per_frame=rows * columns)


MODELS = {
    "wan-1.3b": _wan(30, 12),
    "wan-14b": _wan(40, 40),
    "demo": ModelSize(6, 4, 32, window=21, chunk=3, tokens_per_frame=16, itemsize=ITEMSIZES["fp32"]),
}
"""Sizes of known models by name: Wan2.1 at 480p in bf16, and the embedded demo."""
