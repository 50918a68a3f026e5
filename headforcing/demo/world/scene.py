"""The demo world: a little pixel-art town in closed form, so that ground truth exists at any frame.

A town is a row of slots with a landmark in each, under clouds and in front of hills. The vocabulary is small,
the arrangements are without end. A camera pans over it, so content enters, leaves and returns, which tests
the memory. Something may fly behind the landmarks and something may drive in front of them, both in view
coordinates. Every chunk has its own prompt (see `words.py`): the same town can be seen by day or by night, in
summer or in winter. A prompt does not say what stands where; that has to be remembered.

Videos are `[B, 3, T, 48, 72]` float32 in [-1, 1]; `frames` are absolute frame indices.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from headforcing.demo.world import paint
from headforcing.demo.world.camera import (
    CELL,
    CHUNK,
    HEIGHT,
    KERB,
    SLOTS,
    TOWN,
    WIDTH,
    CameraSchedule,
    Draw,
)
from headforcing.demo.world.sprites import CLOUDS, LANDMARKS, VERGES
from headforcing.demo.world.words import AIR, COLOURS, MOTIONS, POSES, ROAD, SEASONS, TIMES, WORD_ID

CHOICES = (TIMES, SEASONS, AIR, COLOURS, ROAD, COLOURS)
"""What a prompt asks for, in the order of its words."""
RIDGES = (20, 25, 30, 35)
"""Rows of the hills' line at the edges of slots."""
GRASS_TOP, GRASS_EDGE, DASH_ROW, SNOW_LINE, HILL_FOOT = 36, 37, 44, 27, 31
ROAD_FOOT = 47
STRIDE = 2
"""Pixels: what moves is at a multiple of it, in both directions."""
BOB = (0, 1, 2, 1)
"""Strides that what flies goes up and down, one entry per chunk."""


@dataclass(frozen=True)
class Scene:
    """Everything that defines a batch of videos; see `sample_scene`.

    Attributes:
        asked: `[B, N, 6]` long, per chunk an index into each of `CHOICES`; the last chunk stays. The colour
            of nothing has no meaning.
        kind: `[B, SLOTS]` long, the landmark in each slot; the number of landmarks is a gap.
        colour: `[B, SLOTS]` long, of the landmarks.
        cloud, verge: `[B, SLOTS]` long.
        ridge: `[B, SLOTS + 1]` long, heights of the hills, an index into `RIDGES`.
        start: `[B, 2]` long, column at frame 0 of what flies and what drives.
        speed: `[B, 2]` long, pixels per frame.
        row: `[B]` long, of what flies.
        camera: position of the view.
    """

    asked: Tensor
    kind: Tensor
    colour: Tensor
    cloud: Tensor
    verge: Tensor
    ridge: Tensor
    start: Tensor
    speed: Tensor
    row: Tensor
    camera: CameraSchedule

    def to(self, device: torch.device | str) -> Scene:
        """The same scene on another device."""
        return Scene(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def wishes(self, chunks: Tensor) -> Tensor:
        """What the prompts of the chunks `[T]` ask for, `[B, T, 6]`; see `asked`."""
        return self.asked[:, chunks.clamp(max=self.asked.shape[1] - 1)]

    def prompts(self, chunks: Tensor) -> Tensor:
        """Prompt word ids `[B, T, PROMPT_WORDS]` of the chunks `[T]`."""
        words = [
            wish + WORD_ID[names[0]]
            for wish, names in zip(self.wishes(chunks).unbind(-1), CHOICES, strict=True)
        ]
        for thing in (2, 4):
            empty = self.wishes(chunks)[..., thing] == 0
            words[thing + 1] = torch.where(empty, WORD_ID["none"], words[thing + 1])
        pose, motion = self.camera.at(chunks)
        return torch.stack([*words, pose + WORD_ID[POSES[0]], motion + WORD_ID[MOTIONS[1]]], -1)


def sample_scene(
    batch: int,
    generator: torch.Generator,
    *,
    num_chunks: int = 7,
    camera: CameraSchedule | None = None,
    switch_share: float = 0.35,
    pan_share: float = 0.9,
) -> Scene:
    """Draw a batch of scenes on the CPU.

    Args:
        batch: number of videos.
        generator: a CPU generator, the only source of randomness.
        num_chunks: the range in which the prompt switches and the drawn camera moves.
        camera: use this schedule; by default one is drawn (`CameraSchedule.sample`).
        switch_share: share of the videos in which one word of the prompt changes at a chunk.
        pan_share: share of the drawn cameras that move.
    """
    draw = Draw(batch, generator)
    things = draw.choice((0.2, 0.4, 0.4), 2)
    first = [draw.integer(len(TIMES)), draw.integer(len(SEASONS))]
    first += [things[:, 0], draw.integer(len(COLOURS)), things[:, 1], draw.integer(len(COLOURS))]
    before = torch.stack(first, 1)
    sizes = torch.tensor([len(names) for names in CHOICES])
    turn = (1 + draw.uniform(len(CHOICES)) * (sizes - 1)).long()
    which = torch.arange(len(CHOICES)) == draw.integer(len(CHOICES), 1)
    after = torch.where(which, (before + turn) % sizes, before)
    switch = torch.where(draw.uniform() < switch_share, 1 + draw.integer(max(num_chunks - 1, 1)), num_chunks)
    late = torch.arange(num_chunks) >= switch[:, None]
    kind = draw.integer(len(LANDMARKS), SLOTS)
    return Scene(
        asked=torch.where(late[..., None], after[:, None], before[:, None]),
        kind=torch.where(draw.uniform(SLOTS) < 0.05, len(LANDMARKS), kind),
        colour=draw.integer(len(COLOURS), SLOTS),
        cloud=draw.integer(len(CLOUDS), SLOTS),
        verge=draw.integer(len(VERGES), SLOTS),
        ridge=draw.integer(len(RIDGES), SLOTS + 1),
        start=STRIDE * draw.integer(WIDTH, 2),
        speed=STRIDE * (1 + draw.integer(2, 2)),
        row=STRIDE * draw.integer(3),
        camera=camera or CameraSchedule.sample(batch, num_chunks, generator, pan_share=pan_share),
    )


def asked_by(words: Tensor) -> Tensor:
    """What a prompt `[..., PROMPT_WORDS]` asks for, `[..., 6]`: the inverse of `Scene.prompts`."""
    firsts = torch.tensor([WORD_ID[names[0]] for names in CHOICES], device=words.device)
    return (words[..., : len(CHOICES)] - firsts).clamp(min=0)


@dataclass(frozen=True)
class Rendering:
    """A rendered batch and its ground truth.

    Attributes:
        video: `[B, 3, T, 48, 72]` in [-1, 1].
        background: the same without what moves: the town as the camera sees it.
        moving: `[B, T, 2, 48, 72]` bool, the pixels that show what flies, and what drives.
    """

    video: Tensor
    background: Tensor
    moving: Tensor


def render(scene: Scene, frames: Tensor) -> Rendering:
    """Draw the absolute frames `[T]` (long, any order) of a scene, on the scene's device."""
    device = scene.kind.device
    frames = frames.to(device)
    wishes = scene.wishes(frames // CHUNK)
    columns = scene.camera.offset(frames)[..., None] + torch.arange(WIDTH, device=device)
    size = (*columns.shape[:2], HEIGHT, WIDTH)
    background = torch.empty(*size, 3, device=device)
    video, moving = torch.empty_like(background), torch.empty(*size, 2, dtype=torch.bool, device=device)
    looks = wishes[..., 0] * len(SEASONS) + wishes[..., 1]
    for look in looks.unique().tolist():
        video_of, frame_of = (looks == look).nonzero(as_tuple=True)
        videos, place = video_of.unique(return_inverse=True)
        time, season = divmod(look, len(SEASONS))
        back, front = town(scene, videos, time, season)
        seen = columns[video_of, frame_of]
        far, near = (layer[place[:, None], :, seen].transpose(1, 2) for layer in (back, front))
        far = _over(paint.skies().to(device)[time].expand(len(seen), -1, -1, -1), far)
        flying, driving = _actors(scene, video_of, frames[frame_of], wishes[video_of, frame_of])
        background[video_of, frame_of] = _over(far, near)
        video[video_of, frame_of] = _over(_over(_over(far, flying), near), driving)
        hidden = (flying[..., 3] > 0) & (near[..., 3] == 0) & (driving[..., 3] == 0)
        moving[video_of, frame_of] = torch.stack([hidden, driving[..., 3] > 0], -1)
    return Rendering(
        video.permute(0, 4, 1, 2, 3) * 2 - 1,
        background.permute(0, 4, 1, 2, 3) * 2 - 1,
        moving.permute(0, 1, 4, 2, 3),
    )


def town(scene: Scene, videos: Tensor, time: int, season: int) -> tuple[Tensor, Tensor]:
    """The whole town of the videos `[N]` in one light: clouds, and all that is nearer.

    Returns:
        Two layers `[N, 48, TOWN, 4]` in [0, 1]: red, green, blue, cover.
    """
    device = scene.kind.device
    kind, colour, cloud, verge = (
        part[videos] for part in (scene.kind, scene.colour, scene.cloud, scene.verge)
    )
    land = _land(scene.ridge[videos], time, season)
    tiles = paint.landmarks().to(device)[time, season][kind, colour]
    verges = paint.verges().to(device)[time, season][verge]
    for layer in (tiles, verges):
        side = _wide(layer)
        land = torch.where(side[..., 3:] > 0, side, land)
    return _wide(paint.clouds().to(device)[time][cloud]), land


def _land(ridge: Tensor, time: int, season: int) -> Tensor:
    """Hills, grass and road, `[N, 48, TOWN, 4]`, from heights `[N, SLOTS + 1]`."""
    light = torch.tensor(paint.LIGHT[time], device=ridge.device)

    def ink(colour: tuple[float, ...]) -> Tensor:
        return torch.tensor(colour, device=ridge.device) * light

    rows = torch.arange(HEIGHT, device=ridge.device)[:, None]
    across = torch.arange(TOWN, device=ridge.device)
    height = torch.tensor(RIDGES, device=ridge.device)[ridge].float()
    share = (across % CELL) / CELL
    line = height[:, across // CELL] * (1 - share) + height[:, across // CELL + 1] * share
    line = line.round()[:, None]  # [N, 1, TOWN]
    image = torch.zeros(len(ridge), HEIGHT, TOWN, 4, device=ridge.device)
    upper, lower = paint.HILLS[season]
    layers = (
        (rows >= line, upper),
        ((rows >= line) & (rows >= HILL_FOOT), lower),
        ((rows >= line) & (rows < line + 3) & (line < SNOW_LINE), paint.SNOW),
        (rows >= GRASS_TOP, tuple(0.94 * part for part in paint.GRASS[season])),
        (rows >= GRASS_EDGE, paint.GRASS[season]),
        (rows >= KERB, paint.ASPHALT),
        ((rows == DASH_ROW) & (across % CELL < CELL // 2), paint.DASH),
    )
    for where, colour in layers:
        full = torch.cat([ink(colour), light.new_ones(1)])
        image = torch.where(where.expand(len(ridge), HEIGHT, TOWN)[..., None], full, image)
    return image


def _actors(scene: Scene, videos: Tensor, frames: Tensor, wishes: Tensor) -> list[Tensor]:
    """What flies and what drives, each `[N, 48, 72, 4]`, at frames `[N]` of videos `[N]`."""
    device = videos.device
    atlas = paint.actors().to(device)
    sizes = torch.tensor([paint.actor_size(kind) for kind in range(atlas.shape[1])], device=device)
    rows, columns = torch.arange(HEIGHT, device=device)[:, None], torch.arange(WIDTH, device=device)
    bob = STRIDE * torch.tensor(BOB, device=device)[frames // CHUNK % len(BOB)]
    found = []
    for thing, (kind, colour) in enumerate(((2, 3), (4, 5))):
        shape = wishes[:, kind]
        shape = torch.where(shape > 0, shape + thing * (len(AIR) - 1), 0)
        high, wide = sizes[shape].unbind(-1)
        path = scene.start[videos, thing] + scene.speed[videos, thing] * frames
        left, back = _bounce(path, WIDTH - wide)
        top = torch.where(torch.tensor(thing == 0, device=device), scene.row[videos] + bob, ROAD_FOOT - high)
        down, across = rows - top[:, None, None], columns - left[:, None, None]
        picked = atlas[wishes[:, 0], shape, wishes[:, colour], back]  # [N, height, width, 4]
        inside = (down >= 0) & (down < atlas.shape[4]) & (across >= 0) & (across < atlas.shape[5])
        place = (down.clamp(0, atlas.shape[4] - 1), across.clamp(0, atlas.shape[5] - 1))
        drawn = picked[torch.arange(len(videos), device=device)[:, None, None], place[0], place[1]]
        found.append(drawn * inside[..., None])
    return found


def _bounce(path: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Reflect endless straight paths between 0 and `high`; and whether they lead back, 0 or 1."""
    phase = torch.remainder(path, 2 * high)
    return torch.where(phase > high, 2 * high - phase, phase), (phase >= high).long()


def _over(below: Tensor, above: Tensor) -> Tensor:
    """Colours `[..., 3]` under a layer `[..., 4]` whose cover is 0 or 1."""
    return torch.where(above[..., 3:] > 0, above[..., :3], below)


def _wide(tiles: Tensor) -> Tensor:
    """Tiles `[N, SLOTS, 48, CELL, 4]` side by side."""
    return tiles.transpose(1, 2).flatten(2, 3)
