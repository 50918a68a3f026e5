"""Metrics of a generated demo video, against the ground truth of its scene.

Every function takes `video` `[B, 3, T, 24, 24]` in [-1, 1], its `Scene` and the absolute index `start` of its
first frame, and returns one value per video and frame, `[B, T]`, so that policies can be compared video by
video. NaN means that there is nothing to measure in this frame; average with `nanmean`.

There is no PSNR of whole frames: the phase of a sprite's path drifts within some twenty frames, and a sprite
at another place is not an error. PSNR is not a library's because it is that of masked pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headforcing.demo.world.camera import VIEW
from headforcing.demo.world.scene import Rendering, Scene, render

OPEN_SHARE = 0.8
CURTAIN_SHARE = 0.6
COLOUR_RADIUS = 0.35
MIN_SATURATION = 0.35
GHOST_SATURATION = 0.5
VISIBLE_PIXELS = 15
SPRITE_PIXELS = (12, 75)
STRIDE = 3


def background_psnr(video: Tensor, scene: Scene, start: int = 0, *, columns: Tensor | None = None) -> Tensor:
    """PSNR of the texture in dB, over the best pixels of each frame.

    Sprites and curtain hide a part of the texture, and their position is not evaluated. So each frame is
    scored on its best 80 % of pixels, 60 % if the scene has a curtain.

    Args:
        video: `[B, 3, T, 24, 24]` in [-1, 1].
        scene: its scene.
        start: absolute index of the first frame.
        columns: `[B, T, 24]` bool, evaluate only these columns of the view, for example
            `scene.camera.seen(num_chunks)`; there is no ground truth for what a video invents. Frames
            without any such column are NaN.
    """
    truth = _truth(video, scene, start).background
    errors = ((_unit(video) - _unit(truth)) ** 2).mean(1)  # [B, T, 24, 24]
    if columns is None:
        judged = torch.ones_like(errors, dtype=torch.bool)
    else:
        judged = columns[:, :, None].expand_as(errors)
    ranked = errors.masked_fill(~judged, torch.inf).flatten(2).sort(-1).values
    share = torch.where(scene.curtain == 1, CURTAIN_SHARE, OPEN_SHARE)[:, None]
    count = (share * judged.flatten(2).sum(-1)).long()  # [B, T]
    best = torch.arange(ranked.shape[-1], device=video.device) < count[..., None]
    error = ranked.masked_fill(~best, 0.0).sum(-1) / count
    return -10 * torch.log10(error + 1e-8)


def sprite_identity(video: Tensor, scene: Scene, start: int = 0) -> Tensor:
    """Share of the visible sprites that have the right colour and about the right size.

    A sprite counts as visible if the ground truth shows at least 15 of its pixels; frames without a
    visible sprite are NaN.
    """
    truth = _truth(video, scene, start)
    shown = _matches(_unit(truth.video), truth).flatten(3).sum(-1) >= VISIBLE_PIXELS
    asked = shown & _exists(scene)  # [B, T, 2]
    found = _found(_matches(_unit(video), truth))
    return (asked & found).sum(-1) / asked.sum(-1).float().masked_fill(~asked.any(-1), torch.nan)


def speed_ratio(video: Tensor, scene: Scene, start: int = 0) -> Tensor:
    """Speed of the sprites over their true mean speed: 0 is frozen, 1 is right.

    Measured over a distance of three frames, if a sprite is found in both; otherwise, and in the first three
    frames, NaN. Two sprites are averaged. The video must have more than three frames.
    """
    truth = _truth(video, scene, start)
    matches = _matches(_unit(video), truth)
    found = _found(matches) & _exists(scene)  # [B, T, 2]
    moved = _travel(_centroid(matches))
    usable = found[:, STRIDE:] & found[:, :-STRIDE]
    true = _travel(truth.sprite_centre).mean(1, keepdim=True).clamp(min=1e-3)
    ratio = (moved / true).masked_fill(~usable, torch.nan).nanmean(-1)
    blank = ratio.new_full((ratio.shape[0], STRIDE), torch.nan)
    return torch.cat([blank, ratio], 1)


def _truth(video: Tensor, scene: Scene, start: int) -> Rendering:
    """The ground truth of a video."""
    frames = torch.arange(start, start + video.shape[2], device=video.device)
    return render(scene, frames)


def _unit(video: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clipped as a display would."""
    return ((video + 1) / 2).clamp(0, 1)


def _exists(scene: Scene) -> Tensor:
    """Which sprites a scene has, `[B, 1, 2]` bool."""
    return torch.stack([torch.ones_like(scene.two), scene.two], -1)[:, None] == 1


def _saturation(image: Tensor) -> Tensor:
    """Largest minus smallest channel, `[B, T, 24, 24]`."""
    return image.amax(1) - image.amin(1)


def _matches(image: Tensor, truth: Rendering) -> Tensor:
    """Pixels of each sprite's colour, `[B, T, 2, 24, 24]` bool, of an image in [0, 1]."""
    colours = truth.sprite_colour.permute(0, 3, 1, 2)[..., None, None]  # [B, 3, T, 2, 1, 1]
    distance = (image[:, :, :, None] - colours).square().sum(1).sqrt()
    return (distance < COLOUR_RADIUS) & (_saturation(image) > MIN_SATURATION)[:, :, None]


def _found(matches: Tensor) -> Tensor:
    """Sprites of about the right size, `[B, T, 2]` bool."""
    pixels = matches.flatten(3).sum(-1)
    return (pixels > SPRITE_PIXELS[0]) & (pixels < SPRITE_PIXELS[1])


def _centroid(matches: Tensor) -> Tensor:
    """Mean x and y of the matching pixels, `[B, T, 2, 2]`."""
    grid = torch.arange(VIEW, device=matches.device) + 0.5
    weight = matches.float()
    total = weight.flatten(3).sum(-1).clamp(min=1)
    across, down = (weight * grid).flatten(3).sum(-1), (weight * grid[:, None]).flatten(3).sum(-1)
    return torch.stack([across, down], -1) / total[..., None]


def _travel(path: Tensor) -> Tensor:
    """Distance over three frames, `[B, T - 3, 2]`, of a path `[B, T, 2, 2]`."""
    step = path[:, STRIDE:] - path[:, :-STRIDE]
    return step.square().sum(-1).sqrt()
