"""The demo world: 24x24 videos in closed form, so that ground truth exists at any frame.

A video is a smooth random texture, one or two bouncing sprites and, sometimes, a dark curtain that
sweeps over everything. The texture is a strip twice as wide as the view, and a camera pans over it:
two pixels per frame, one patch per chunk. So content enters, leaves and returns, which tests the
memory. Sprites and curtain are in view coordinates.

Every chunk has its own prompt: nine words (see `words.py`) and an end mark. The last two words are
the camera pose, so a model knows where it looks and only has to remember what is there.

Videos are `[B, 3, T, 24, 24]` float32 in [-1, 1]; `frames` are absolute frame indices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as functional
from torch import Tensor

from headforcing.demo.world.camera import CHUNK, STRIP, VIEW, CameraSchedule, Draw
from headforcing.demo.world.words import COLOURS, CURTAINS, PALETTES, POSES, SHAPES, SPEEDS, WORD_ID
from headforcing.demo.world.words import PROMPT_WORDS as PROMPT_WORDS
from headforcing.demo.world.words import WORDS as WORDS
from headforcing.demo.world.words import format_prompt as format_prompt
from headforcing.demo.world.words import parse_prompt as parse_prompt

RADIUS = 3.3
CURTAIN_WIDTH = 7.0
CURTAIN_SHADE = 0.10
NEVER = 10**6

_PALETTE_RGB = ((0.62, 0.52, 0.38), (0.34, 0.46, 0.60), (0.36, 0.50, 0.36), (0.50, 0.38, 0.50))
_COLOUR_RGB = (
    (0.95, 0.10, 0.10),
    (0.10, 0.90, 0.15),
    (0.12, 0.20, 1.00),
    (1.00, 0.92, 0.10),
    (0.95, 0.10, 0.90),
    (0.10, 0.92, 0.95),
)


@dataclass(frozen=True)
class Scene:
    """Everything that defines a batch of videos; see `sample_scene`.

    Attributes:
        palette, curtain, fast, two: `[B]` long: texture palette; 0/1 switches.
        texture: `[B, 4, 5, 9]` control points: three colour channels and one of brightness.
        curtain_start, curtain_speed: `[B]` pixels, pixels per frame.
        shape, colour: `[B, 2, 2]` long: sprite, then before/after the prompt switch.
        tint: `[B, 2, 3]` hue jitter of each sprite.
        position, velocity: `[B, 2, 2]` sprite, then x and y, at frame 0 (pixels per frame).
        switch: `[B]` long, the chunk of the prompt switch (`NEVER`: none).
        camera: position of the view.
    """

    palette: Tensor
    curtain: Tensor
    fast: Tensor
    two: Tensor
    texture: Tensor
    curtain_start: Tensor
    curtain_speed: Tensor
    shape: Tensor
    colour: Tensor
    tint: Tensor
    position: Tensor
    velocity: Tensor
    switch: Tensor
    camera: CameraSchedule

    def to(self, device: torch.device | str) -> Scene:
        """The same scene on another device."""
        return Scene(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def sprites(self, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """Shape and colour ids, each `[B, T, 2]`, that the prompts of the chunks `[T]` ask for."""
        after = (chunks[None] >= self.switch[:, None])[..., None]
        pair = (self.shape, self.colour)
        shape, colour = (torch.where(after, ids[:, None, :, 1], ids[:, None, :, 0]) for ids in pair)
        return shape, colour

    def prompts(self, chunks: Tensor) -> Tensor:
        """Prompt word ids `[B, T, PROMPT_WORDS]` of the chunks `[T]`."""
        shape, colour = self.sprites(chunks)
        pose, motion = self.camera.at(chunks)
        two = self.two[:, None] == 1
        columns = [
            (self.palette[:, None] + WORD_ID[PALETTES[0]]).expand_as(pose),
            (self.curtain[:, None] + WORD_ID[CURTAINS[0]]).expand_as(pose),
            (self.fast[:, None] + WORD_ID[SPEEDS[0]]).expand_as(pose),
            shape[..., 0] + WORD_ID[SHAPES[0]],
            colour[..., 0] + WORD_ID[COLOURS[0]],
            torch.where(two, shape[..., 1] + WORD_ID[SHAPES[0]], WORD_ID["none"]),
            torch.where(two, colour[..., 1] + WORD_ID[COLOURS[0]], WORD_ID["none"]),
            pose + WORD_ID[POSES[0]],
            motion + WORD_ID["still"],
            torch.full_like(pose, WORD_ID["<end>"]),
        ]
        return torch.stack(columns, -1)


def sample_scene(
    batch: int,
    generator: torch.Generator,
    *,
    num_chunks: int = 7,
    camera: CameraSchedule | None = None,
    curtain_share: float = 0.5,
    two_share: float = 0.5,
    switch_share: float = 0.35,
    pan_share: float = 0.6,
) -> Scene:
    """Draw a batch of scenes on the CPU.

    Args:
        batch: number of videos.
        generator: a CPU generator, the only source of randomness.
        num_chunks: the range in which the prompt switches and the drawn camera moves.
        camera: use this schedule; by default one is drawn (`CameraSchedule.sample`).
        curtain_share: share of the videos with a curtain.
        two_share: share with two sprites.
        switch_share: share where a sprite changes shape or colour at a chunk.
        pan_share: share of the drawn cameras that move.
    """
    draw = Draw(batch, generator)
    fast = draw.integer(2)
    speed = torch.where(fast == 1, 1.15, 0.5)[:, None] * (0.9 + 0.2 * draw.uniform(2))
    angle = 2 * math.pi * draw.uniform(2)
    shape, colour, two = draw.integer(4, 2), draw.integer(6, 2), draw.uniform() < two_share
    colour[:, 1] = (colour[:, 0] + 1 + draw.integer(5)) % 6
    shapes, colours = shape[..., None].repeat(1, 1, 2), colour[..., None].repeat(1, 1, 2)
    index, which = torch.arange(batch), draw.integer(2) * two
    by_shape, turn = draw.integer(2), 1 + draw.integer(3)
    shapes[index, which, 1] = (shapes[index, which, 1] + by_shape * turn) % 4
    colours[index, which, 1] = (colours[index, which, 1] + (1 - by_shape) * turn) % 6
    switches = draw.uniform() < switch_share
    return Scene(
        palette=draw.integer(4),
        curtain=(draw.uniform() < curtain_share).long(),
        fast=fast,
        two=two.long(),
        texture=draw.normal(4, 5, 9),
        curtain_start=draw.uniform() * (VIEW - CURTAIN_WIDTH),
        curtain_speed=(0.7 + 0.4 * draw.uniform()) * draw.sign(),
        shape=shapes,
        colour=colours,
        tint=(draw.uniform(2, 3) - 0.5) * 0.16,
        position=RADIUS + (VIEW - 2 * RADIUS) * draw.uniform(2, 2),
        velocity=speed[..., None] * torch.stack([angle.cos(), angle.sin()], -1),
        switch=torch.where(switches, 1 + draw.integer(max(num_chunks - 1, 1)), NEVER),
        camera=camera or CameraSchedule.sample(batch, num_chunks, generator, pan_share=pan_share),
    )


@dataclass(frozen=True)
class Rendering:
    """A rendered batch and its ground truth.

    Attributes:
        video: `[B, 3, T, 24, 24]` in [-1, 1].
        background: the same without sprites and curtain: the strip as the camera sees it.
        sprite_colour: `[B, T, 2, 3]` in [0, 1].
        sprite_centre: `[B, T, 2, 2]` x and y in pixels.
        curtain: `[B, T, 24, 24]` opacity.
    """

    video: Tensor
    background: Tensor
    sprite_colour: Tensor
    sprite_centre: Tensor
    curtain: Tensor


def strip(scene: Scene) -> Tensor:
    """The whole texture, `[B, 3, 24, 48]` in [0, 1]."""
    size = (VIEW, STRIP)
    field = functional.interpolate(scene.texture, size=size, mode="bilinear", align_corners=True)
    base = field.new_tensor(_PALETTE_RGB)[scene.palette][..., None, None]
    return (base + 0.16 * field[:, 3:] + 0.05 * field[:, :3]).clamp(0.08, 0.85)


def render(scene: Scene, frames: Tensor) -> Rendering:
    """Draw the absolute frames `[T]` (long, any order) of a scene, on the scene's device."""
    frames = frames.to(scene.palette.device)
    columns = scene.camera.offset(frames)[..., None] + torch.arange(VIEW, device=frames.device)
    index = columns[:, None, :, None].expand(-1, 3, -1, VIEW, -1)  # [B, 3, T, 24, 24]
    background = strip(scene)[:, :, None].expand(-1, -1, len(frames), -1, -1).gather(-1, index)
    shape, colour = scene.sprites(frames // CHUNK)
    rgb = background.new_tensor(_COLOUR_RGB)[colour] + scene.tint[:, None]
    rgb = rgb.clamp(0, 1)  # [B, T, 2, 3]
    times = frames.float()
    path = scene.position[:, None] + scene.velocity[:, None] * times[:, None, None]
    centre = _bounce(path, RADIUS, VIEW - RADIUS)  # [B, T, 2, 2]
    image = background
    for sprite in range(2):
        cover = _sprite_cover(shape[:, :, sprite], centre[:, :, sprite])
        cover = (cover * (scene.two[:, None, None, None] if sprite else 1))[:, None]
        ink = rgb[:, :, sprite].transpose(1, 2)[..., None, None]
        image = image * (1 - cover) + ink * cover
    curtain = _curtain_cover(scene, times)
    image = image * (1 - curtain[:, None]) + CURTAIN_SHADE * curtain[:, None]
    return Rendering(image * 2 - 1, background * 2 - 1, rgb, centre, curtain)


def _bounce(path: Tensor, low: float, high: float) -> Tensor:
    """Reflect an endless straight path at two walls."""
    width = high - low
    phase = torch.remainder(path - low, 2 * width)
    return low + torch.where(phase > width, 2 * width - phase, phase)


def _sprite_cover(shape: Tensor, centre: Tensor) -> Tensor:
    """Opacity `[B, T, 24, 24]` of shapes `[B, T]` at centres `[B, T, 2]`, anti-aliased."""
    grid = torch.arange(VIEW, device=centre.device) + 0.5
    right = grid - centre[..., 0, None, None]
    down = grid[:, None] - centre[..., 1, None, None]
    across, along = (right.abs().expand(*down.shape[:-1], VIEW), down.abs().expand(*down.shape[:-1], VIEW))
    arm_across = torch.maximum(across - 1.1 * RADIUS, along - 0.38 * RADIUS)
    arm_along = torch.maximum(along - 1.1 * RADIUS, across - 0.38 * RADIUS)
    distances = [
        (across.square() + along.square()).sqrt() - RADIUS,
        torch.maximum(across, along) - 0.88 * RADIUS,
        across + along - 1.3 * RADIUS,
        torch.minimum(arm_across, arm_along),
    ]
    index = shape[None, ..., None, None].expand(1, *across.shape)
    return (0.5 - torch.stack(distances).gather(0, index)[0]).clamp(0, 1)


def _curtain_cover(scene: Scene, times: Tensor) -> Tensor:
    """Opacity `[B, T, 24, 24]` of the curtain at the times `[T]`."""
    path = scene.curtain_start[:, None] + scene.curtain_speed[:, None] * times
    left = _bounce(path, 0.0, VIEW - CURTAIN_WIDTH)[..., None]
    grid = torch.arange(VIEW, device=times.device) + 0.5
    edges = (grid + 0.5 - left).clamp(0, 1) * (left + CURTAIN_WIDTH - grid + 0.5).clamp(0, 1)
    return (edges * scene.curtain[:, None, None])[:, :, None].expand(-1, -1, VIEW, -1)
