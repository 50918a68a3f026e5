"""Colours and light of the demo world: pixel art becomes tensors, for every time of day and season.

An atlas holds images `[..., height, width, 4]`: red, green, blue and cover, in [0, 1].
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from headforcing.demo.world.camera import CELL, GROUND, HEIGHT, KERB, WIDTH
from headforcing.demo.world.sprites import ACTORS, CLOUD_ROWS, CLOUDS, LANDMARKS, VERGES
from headforcing.demo.world.words import AIR, COLOURS, ROAD, SEASONS, TIMES

RGB = {
    "red": (0.89, 0.20, 0.19),
    "blue": (0.20, 0.41, 0.86),
    "yellow": (0.98, 0.81, 0.20),
    "green": (0.20, 0.66, 0.31),
    "white": (0.95, 0.95, 0.93),
    "purple": (0.60, 0.28, 0.76),
}
PAINTS = {
    "w": (0.94, 0.87, 0.74),
    "r": (0.36, 0.33, 0.42),
    "d": (0.30, 0.21, 0.17),
    "s": (0.64, 0.64, 0.68),
    "S": (0.51, 0.51, 0.56),
    "k": (0.13, 0.13, 0.17),
    "b": (0.56, 0.38, 0.26),
    "B": (0.46, 0.31, 0.21),
    "u": (0.97, 0.97, 0.96),
    "U": (0.82, 0.84, 0.88),
    "y": (0.97, 0.82, 0.30),
    "o": (0.94, 0.55, 0.20),
    "x": (0.40, 0.56, 0.75),
    "l": (0.80, 0.93, 0.96),
}
"""Colours by day; the thing's own colour and leaves come on top."""

SNOWY = "^"
LETTERS = "." + "".join(PAINTS) + "cCgG" + SNOWY
LAMPS, LIT = "xl", (1.0, 0.88, 0.44)
"""Paints that shine where it is not day, and how."""
LEAVES = ((0.18, 0.47, 0.24), (0.66, 0.47, 0.17), (0.20, 0.38, 0.34))
GRASS = ((0.42, 0.70, 0.29), (0.79, 0.64, 0.32), (0.92, 0.94, 0.97))
HILLS = (
    ((0.45, 0.61, 0.50), (0.35, 0.51, 0.44)),
    ((0.67, 0.52, 0.40), (0.55, 0.41, 0.35)),
    ((0.70, 0.76, 0.84), (0.55, 0.62, 0.73)),
)
"""Upper and lower part."""
SNOW = (0.97, 0.98, 1.0)
ASPHALT, DASH = (0.36, 0.36, 0.40), (0.95, 0.93, 0.80)
LIGHT = ((1.0, 1.0, 1.0), (1.0, 0.80, 0.72), (0.42, 0.48, 0.74))
"""What is left of each colour by day, at dusk, at night."""
SKY = (
    ((0.31, 0.59, 0.91), (0.77, 0.90, 0.98)),
    ((0.33, 0.23, 0.52), (0.99, 0.63, 0.38)),
    ((0.04, 0.05, 0.16), (0.17, 0.22, 0.43)),
)
"""Top and horizon."""
BAND, HORIZON = 4, 32
"""Rows of one shade, and where the sky reaches its last."""
DISCS = (
    (59.5, 7.5, 4.6, (1.0, 0.92, 0.35)),
    (57.5, 18.5, 6.2, (1.0, 0.50, 0.26)),
    (59.5, 8.5, 4.6, (0.96, 0.95, 0.82)),
)
"""Sun and moon: column, row, radius, colour."""
STARS = (
    (4, 3), (13, 9), (21, 2), (29, 13), (36, 5), (46, 11), (68, 2), (8, 16), (67, 17), (24, 19), (40, 15),
    (51, 3)
)  # fmt: skip
DARK = 0.8
"""The shaded side of a thing's own colour."""


@functools.cache
def _palette() -> Tensor:
    """Colour and cover of every letter, `[times, seasons, colours, letters, 4]`."""
    found = torch.zeros(len(TIMES), len(SEASONS), len(COLOURS), len(LETTERS), 4)
    for time, season, colour in itertools.product(*map(range, found.shape[:3])):
        own, leaf = RGB[COLOURS[colour]], LEAVES[season]
        paints = {**PAINTS, "c": own, "C": _shade(own), "g": leaf, "G": _shade(leaf), SNOWY: SNOW}
        for letter, rgb in paints.items():
            shines = time and letter in LAMPS
            lit = torch.tensor(LIT) if shines else torch.tensor(rgb) * torch.tensor(LIGHT[time])
            found[time, season, colour, LETTERS.index(letter)] = torch.cat([lit, torch.ones(1)])
    return found


def _shade(rgb: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(DARK * part for part in rgb)


def _letters(art: str, size: tuple[int, int], top: int | None, snow: bool) -> Tensor:
    """Indices into `LETTERS`, `[height, width]`: the art at a row, or with its foot on the last."""
    rows = art.split()
    image = torch.zeros(*size, dtype=torch.long)
    first = size[0] - len(rows) if top is None else top
    for y, row in enumerate(rows):
        bare = [snow and all(above[x] == "." for above in rows[:y]) for x in range(len(row))]
        line = [SNOWY if bare[x] and letter != "." else letter for x, letter in enumerate(row)]
        image[first + y, : len(row)] = torch.tensor([LETTERS.index(letter) for letter in line])
    return image


def _atlas(arts: Sequence[str], size: tuple[int, int], tops: Sequence[int | None], snow: bool) -> Tensor:
    """`[times, seasons, arts, colours, height, width, 4]`; with `snow`, things have some in winter."""
    seasons = []
    for season, name in enumerate(SEASONS):
        placed = [
            _letters(art, size, top, snow and name == "winter") for art, top in zip(arts, tops, strict=True)
        ]
        seasons.append(_palette()[:, season][:, :, torch.stack(placed)])
    return torch.stack(seasons, 1).transpose(2, 3)


@functools.cache
def landmarks() -> Tensor:
    """Every landmark, `[times, seasons, kinds + 1, colours, HEIGHT, CELL, 4]`; the last kind is a gap."""
    atlas = _atlas([*LANDMARKS.values(), ""], (GROUND, CELL), [None] * (len(LANDMARKS) + 1), snow=True)
    return torch.cat([atlas, atlas.new_zeros(*atlas.shape[:4], HEIGHT - GROUND, CELL, 4)], 4)


@functools.cache
def clouds() -> Tensor:
    """`[times, kinds, HEIGHT, CELL, 4]`."""
    atlas = _atlas(CLOUDS, (HEIGHT, CELL), CLOUD_ROWS, snow=False)[:, 0, :, 0]
    glow = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.95, 1.0, 1.0], [0.64, 0.61, 0.62, 1.0]])
    return atlas * glow[:, None, None, None]


@functools.cache
def verges() -> Tensor:
    """`[times, seasons, kinds, HEIGHT, CELL, 4]`; flowers and berries are red."""
    atlas = _atlas(VERGES, (KERB, CELL), [None] * len(VERGES), snow=True)[:, :, :, 0]
    return torch.cat([atlas, atlas.new_zeros(*atlas.shape[:3], HEIGHT - KERB, CELL, 4)], 3)


ACTOR_SIZE = (11, 16)


@functools.cache
def actors() -> Tensor:
    """What moves, `[times, kinds, colours, 2, *ACTOR_SIZE, 4]`, looking right, then left; kind 0 is nothing.

    Kinds are `AIR`, then `ROAD` without its first.
    """
    arts = ["", *(ACTORS[name] for name in (*AIR[1:], *ROAD[1:]))]
    right = _atlas(arts, ACTOR_SIZE, [0] * len(arts), snow=False)[:, 0]
    left = torch.zeros_like(right)
    for kind, art in enumerate(arts):
        wide = len(art.split()[0]) if art else 0
        left[:, kind, :, :, :wide] = right[:, kind, :, :, :wide].flip(3)
    return torch.stack([right, left], 3)


def actor_size(kind: int) -> tuple[int, int]:
    """Height and width of an actor of `actors`."""
    rows = ACTORS[(*AIR, *ROAD[1:])[kind]].split() if kind else [""]
    return len(rows), len(rows[0])


@functools.cache
def skies() -> Tensor:
    """`[times, HEIGHT, WIDTH, 3]`: sky, sun, moon and stars; they stay with the view."""
    rows, columns = torch.arange(HEIGHT).float(), torch.arange(WIDTH).float()
    found = []
    for time, (top, horizon) in enumerate(SKY):
        share = ((rows // BAND) * BAND / HORIZON).clamp(max=1)[:, None, None]
        image = torch.tensor(top) * (1 - share) + torch.tensor(horizon) * share
        image = image.expand(HEIGHT, WIDTH, 3).clone()
        if time == 2:
            for x, y in STARS:
                image[y, x] = torch.tensor((1.0, 1.0, 0.9))
        across, down, radius, colour = DISCS[time]
        distance = (columns - across) ** 2 + (rows[:, None] - down) ** 2
        disc = distance < radius**2
        if time == 2:
            disc &= (columns - across - 2.5) ** 2 + (rows[:, None] - down + 1) ** 2 >= 14
        image[disc] = torch.tensor(colour)
        found.append(image)
    return torch.stack(found)
