"""Entrants of a comparison on the demo model: presets, role-map files, and the controls of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch

from headforcing.demo.measured import demo_preset
from headforcing.demo.model.attention import DemoConfig
from headforcing.errors import OptionError
from headforcing.measure.memory import Steady, steady, stored_bytes
from headforcing.measure.sizes import ITEMSIZES, ModelSize
from headforcing.roles import SlidingWindow
from headforcing.roles.base import bounded
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.maps.role_map import RoleMap

Kind = Literal["entrant", "as many attended", "as many bytes", "as many attended and bytes", "shuffled"]
SHUFFLES = 2
"""Draws of a shuffle; each video is averaged over them."""


@dataclass(frozen=True)
class Entrant:
    """A policy for the heads of the demo model.

    Attributes:
        name: for tables and pictures.
        draws: the map; several for a random control.
        kind: whether it is a control, and which.
    """

    name: str
    draws: tuple[RoleMap, ...]
    kind: Kind = "entrant"

    @property
    def roles(self) -> RoleMap:
        """The map, or the first draw."""
        return self.draws[0]

    @property
    def bounded(self) -> bool:
        """Whether positions stay in the range the model was trained on, however long the video."""
        return all(map(bounded, self.roles.counts()))


def entrant(name: str, config: DemoConfig) -> Entrant:
    """A preset by name, or a role-map file, named after the file without its suffix.

    Raises:
        OptionError: it is neither.
        RoleMapError: the file is not a role map.
        RoleMapMismatchError: the map is for another model.
        WindowError: a role requires more frames than the demo was trained on.
    """
    if name in PRESETS:
        found = demo_preset(name, config.window, config.chunk)
    elif Path(name).is_file():
        found, name = RoleMap.load(name), Path(name).stem
    else:
        raise OptionError(
            f"{name!r} is neither a preset nor a role-map file: the presets are {', '.join(PRESETS)}"
        )
    return Entrant(name, (found.fit(config.layers, config.heads, config.window, config.chunk),))


def stored_frames(roles: RoleMap, config: DemoConfig) -> float | None:
    """Stored frames in a long video, current chunk included, mean over the heads; `None` is all."""
    return _mean(roles, config, lambda found: found.stored)


def attended_frames(roles: RoleMap, config: DemoConfig) -> float | None:
    """Attended frames in a noisy pass, as for `stored_frames`."""
    return _mean(roles, config, lambda found: found.attended)


def streaming(frames: int, config: DemoConfig) -> RoleMap:
    """StreamingLLM on frames: the first ones and the last ones, for all heads.

    The sink has as many frames as a chunk, or all but one of the stored frames if these are fewer.
    """
    sink = min(config.chunk, max(1, frames - config.chunk - 1))
    return RoleMap.uniform(SlidingWindow(frames, sink=sink), config.layers, config.heads)


def shuffled(roles: RoleMap, seed: int) -> RoleMap:
    """The same roles in every layer, on random heads of that layer; a head may get its own role again."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(row), generator=generator).tolist() for row in roles.layers]
    rows = zip(roles.layers, orders, strict=True)
    return RoleMap(tuple(tuple(row[head] for head in order) for row, order in rows))


def scattered(roles: RoleMap, seed: int) -> RoleMap:
    """The same roles on random heads of the model."""
    flat = [role for row in roles.layers for role in row]
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed)).tolist()
    layers, heads = roles.shape
    return RoleMap(
        tuple(tuple(flat[order[layer * heads + head]] for head in range(heads)) for layer in range(layers))
    )


def controls(contender: Entrant, config: DemoConfig) -> list[Entrant]:
    """The controls of an entrant: StreamingLLM with its frames or bytes, and its own roles shuffled.

    Frames are those attended to in a noisy pass, rounded; bytes are those of the `ring` store, as close as
    whole frames allow. Neither exceeds the window: an entrant that stores more has a smaller control. An
    entrant that stores every frame has none. Roles are shuffled within each layer, if heads differ.
    """
    attended = attended_frames(contender.roles, config)
    if attended is None:
        return []
    least, most = config.chunk + 1, config.window
    alike = min(max(round(attended), least), most)
    size = _size(config)
    wanted, whole = (
        stored_bytes(size, "ring", roles) for roles in (contender.roles, streaming(most, config))
    )
    nearest = math.ceil(Fraction((wanted or 0) * most, whole or 1) - Fraction(1, 2))  # frames take the same
    heavy = min(max(nearest, least), most)
    kinds: dict[Kind, int] = {"as many attended": alike, "as many bytes": heavy}
    if alike == heavy:
        kinds = {"as many attended and bytes": alike}
    found = [
        Entrant(f"sink + recent, {frames} frames", (streaming(frames, config),), kind)
        for kind, frames in kinds.items()
    ]
    found = [control for control in found if control.roles != contender.roles]
    draws = tuple(shuffled(contender.roles, seed) for seed in range(SHUFFLES))
    if len(contender.roles.counts()) > 1:
        found.append(Entrant(f"{contender.name}, shuffled in each layer", draws, "shuffled"))
    return found


def _mean(roles: RoleMap, config: DemoConfig, pick: Callable[[Steady], Fraction]) -> float | None:
    total = Fraction()
    for role, heads in roles.counts().items():
        found = steady(role, config.window, config.chunk)
        if found is None:
            return None
        total += heads * pick(found)
    layers, heads = roles.shape
    return float(total / (layers * heads))


def _size(config: DemoConfig) -> ModelSize:
    """The size of the demo model, in float32."""
    return ModelSize(
        config.layers,
        config.heads,
        config.dim // config.heads,
        window=config.window,
        chunk=config.chunk,
        grid=config.grid,
        itemsize=ITEMSIZES["fp32"],
    )
