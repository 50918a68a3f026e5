"""How many bytes the keys and values of a model take, counted before it is loaded.

For one stream of one video; multiply by videos, CFG branches and experts. Plain arithmetic where a role keeps
whole frames only, otherwise counted on a real store with small tensors (`headforcing.measure.steady`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from headforcing.errors import OptionError

if TYPE_CHECKING:
    from headforcing.roles import HeadRole
    from headforcing.roles.maps.role_map import RoleMap

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of one number, by the name of its type."""
BUFFERS = {"ring": 3, "lean": 2}
"""Stores that have a slot for every frame that a role may keep: keys before RoPE, values; rotated keys."""
FRAME_ID = 8
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
        return BUFFERS["ring"] * self.head_bytes // 2 + FRAME_ID

    def kv_bytes(self, roles: RoleMap) -> int | None:
        """Keys and values of what is kept and of the own chunk; `None` is without bound.

        Whole frames by the capacity of a role; blocks that grow and come to an end at the moment when all
        heads together hold most. Without copies that a store makes for looking.

        Raises:
            OptionError: what a role keeps beside whole frames cannot be told for so many patches.
            WindowError: a role that has to be simulated does not fit the window.
        """
        from headforcing.measure.steady import keeps_beside

        return self._most(None, roles, keeps_beside, (self.head_bytes, 0))

    def stored_bytes(self, store: str, roles: RoleMap) -> int | None:
        """What `status().stored_bytes` says of a full store at the end of a chunk, at most.

        `None` is without bound. Counted from the capacity of roles where a store has slots and copies nothing
        for them; all else is simulated.

        Args:
            store: name of the store.
            roles: roles that fit the window.

        Raises:
            OptionError: there is no such store, or what it holds cannot be told from the size of a head.
            WindowError: a role that has to be simulated does not fit the window.
        """
        from headforcing.measure.steady import keeps_beside
        from headforcing.stores import store_class

        store_class(store)  # refuses unknown names, also where nothing is simulated

        def moves(role: HeadRole) -> bool:
            return store not in BUFFERS or keeps_beside(role) or (store == "ring" and packs(role))

        return self._most(store, roles, moves, (BUFFERS.get(store, 0) * self.head_bytes // 2, FRAME_ID))

    def ring_bytes(self, roles: RoleMap) -> int | None:
        """The same of the `ring` store."""
        return self.stored_bytes("ring", roles)

    def _most(
        self, store: str | None, roles: RoleMap, moves: Callable[[HeadRole], bool], slot: tuple[int, int]
    ) -> int | None:
        """Most bytes held at once: of a slot, per head and per role; roles that move are simulated."""
        from headforcing.measure.steady import held_bytes

        if any(role.capacity(self.chunk) is None for role in roles.counts()):
            return None
        resting, moving = 0, []
        for layer in roles.layers:
            for role in dict.fromkeys(layer):
                heads = layer.count(role)
                if moves(role):
                    held = held_bytes(store, role, self.window, self.chunk, self.itemsize)
                    moving.append(held.of(heads, self.tokens_per_frame, self.head_dim))
                else:
                    slots = (role.capacity(self.chunk) or 0) + self.chunk
                    resting += slots * (heads * slot[0] + slot[1])
        most = max((sum(held, Fraction()) for held in zip(*moving, strict=True)), default=Fraction())
        if most.denominator != 1:
            raise OptionError(
                f"{self.tokens_per_frame} tokens per frame cannot be merged or cut as the roles want: they "
                f"would hold {float(most)} bytes; give a number that their patches divide"
            )
        return resting + int(most)


def packs(role: HeadRole) -> bool:
    """Whether the `ring` store holds a copy of what the role sees beside what it keeps."""
    from headforcing.roles import HeadRole  # torch, which a help text does not wait for

    partly = role.clean_window is not None or type(role).visible is not HeadRole.visible
    return partly or "query" in role.depends_on


def _wan(layers: int, heads: int) -> ModelSize:
    """Wan2.1 at 480 x 832 pixels, in the chunks of Self Forcing.

    Documented: layers, heads of 128 channels, 8 x 8 pixels of the VAE and 2 x 2 of those per patch in the
    configuration of Wan2.1 (arXiv:2503.20314); window and chunk in that of Self Forcing (arXiv:2506.08009).
    """
    return ModelSize(layers, heads, 128, window=21, chunk=3, tokens_per_frame=math.prod(WAN_480P))


WAN_480P = (480 // 8 // 2, 832 // 8 // 2)
MODELS = {
    "wan-1.3b": _wan(30, 12),
    "wan-14b": _wan(40, 40),
    "demo": ModelSize(6, 4, 32, window=21, chunk=3, tokens_per_frame=16, itemsize=ITEMSIZES["fp32"]),
}
"""Sizes of known models by name: Wan2.1 at 480p in bf16, and the embedded demo."""

GRIDS = {"wan-1.3b": WAN_480P, "wan-14b": WAN_480P, "demo": (4, 4)}
"""Height and width of a frame of these models in patches."""
