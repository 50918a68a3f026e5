"""Whether the weights of an attention changed in the middle of a video, told without reading them.

PyTorch counts what is written into a tensor in place, and PEFT's layers say which adapters are on. Both are
looked at, of all parameters inside of an attention, when a chunk begins. What moves weights and leaves them
as they are (offloading, sharding, casts) exchanges tensors or their storage, which counts as nothing: so
weights that are put in that way, by `load_state_dict(assign=True)` or `weight.data`, are not noticed either,
nor those outside of the attentions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headforcing.attention.guards import layers_named
from headforcing.errors import WeightsChangedWarning

BASES = {"base_layer", "original_module"}
_DIGITS = 6  # scaling an adapter up and down again rounds


_Written = tuple[str, int, int, bool]


@dataclass(frozen=True)
class Marks:
    """What is known of the weights of a module at one moment.

    Attributes:
        adapters: which adapters are on, by the name of their layer, and how strongly.
        writes: which tensor has what name, and how often it was written to. An address is used again, but
            not while the tensor is there that another takes the place of. References, also weak ones, would
            forbid others to exchange tensors (`torch.utils.swap_tensors`).
    """

    adapters: tuple[tuple[str, object], ...] = ()
    writes: tuple[tuple[_Written, int], ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> Marks:
        """Those of a module now."""
        adapters: list[tuple[str, object]] = []
        tensors: list[tuple[str, object]] = []
        parts: list[tuple[str, nn.Module | None]] = [("", module)]
        for name, part in parts:  # grows meanwhile
            if part is None:
                continue
            inside = part.__dict__
            if inside["_parameters"]:
                tensors += [(name + key, tensor) for key, tensor in inside["_parameters"].items()]
            if "merged_adapters" not in inside and "_disable_adapters" not in inside:
                parts += inside["_modules"].items()
                continue
            on, factors = _adapters(part)
            if on:
                adapters.append((name, on))
            tensors += factors.items()
            for key, child in inside["_modules"].items():
                if key in BASES:
                    parts.append((name, child))
                elif child is not None and (own := child._modules or child._parameters):
                    for one in factors:  # a dict of what each adapter has
                        found = own.get(one)
                        if isinstance(found, Tensor):
                            tensors.append((name + key, found))
                        elif found is not None and found._parameters:
                            parts.append((key, found))
        writes = [
            ((name, id(tensor), tensor._cdata, tensor.is_meta), tensor._version)
            for name, tensor in tensors
            if isinstance(tensor, Tensor) and not tensor.is_inference()  # those have no count
        ]
        return cls(tuple(adapters), tuple(writes))

    def differ(self, now: Marks) -> bool:
        """Whether an adapter was switched, or a tensor that is still there was written to."""
        if self == now:
            return False
        counts = dict(self.writes)
        written = any(counts.get(tensor, count) != count for tensor, count in now.writes)
        return written or self.adapters != now.adapters


class Watch:
    """Warns of changed weights, once of every change, however many timelines meet it."""

    def __init__(self) -> None:
        self._told: dict[int, Marks] = {}

    def begin(self) -> None:
        """A video begins: whatever its weights are, they are news no more."""
        self._told.clear()

    def look(self, start: int, layers: Iterable[tuple[int, Marks | None, Marks | None]]) -> None:
        """Compares, because a chunk begins at frame `start`.

        Args:
            start: first frame of the chunk.
            layers: number of every layer, its marks when the chunk before began, and now.
        """
        known = [(layer, before, now) for layer, before, now in layers if before is not None and now]
        changed = [
            layer
            for layer, before, now in known
            if before.differ(now) and self._told.get(layer, before).differ(now)
        ]
        if not changed:
            return
        self._told.update((layer, now) for layer, _, now in known)
        warnings.warn(
            f"{layers_named(changed)}: attention weights changed in the middle of a video, and what is "
            f"remembered of frames before {start} was made by those before. Begin a new video, or call "
            "handle.reset() and run this one from frame 0; where it is wanted, ignore this warning",
            WeightsChangedWarning,
            stacklevel=5,
        )


def _adapters(layer: Any) -> tuple[tuple[object, ...], dict[str, object]]:
    """Which adapters are on in a layer of PEFT, and the factors of those that are not merged."""
    if getattr(layer, "disable_adapters", False):
        return (), {}
    if merged := getattr(layer, "merged_adapters", None):
        return ("merged", *merged), {}
    known = getattr(layer, "scaling", {})
    factors = {name: known.get(name) for name in getattr(layer, "active_adapters", ())}
    return tuple([(name, _told(factor)) for name, factor in factors.items()]), factors


def _told(factor: object) -> object:
    """A factor that is a tensor would have to be read."""
    return round(factor, _DIGITS) if isinstance(factor, float) else None
