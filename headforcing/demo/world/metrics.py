"""Metrics of a generated demo video, against the ground truth of its scene.

Every function takes `video` `[B, 3, T, 48, 72]` in [-1, 1], its `Scene` and the absolute index `start` of its
first frame, and returns one value per video and frame, `[B, T]`, so that policies can be compared video by
video. NaN means that there is nothing to measure in this frame; average with `nanmean`.

What flies and what drives is judged by what it is, not by where: its place drifts within some twenty frames,
and another place is not an error. PSNR is not a library's because it is that of masked pixels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as functional
from torch import Tensor

from headforcing.demo.world import paint
from headforcing.demo.world.camera import CELL, CHUNK, SLOTS, WIDTH
from headforcing.demo.world.scene import Scene, render
from headforcing.demo.world.sprites import LANDMARKS
from headforcing.demo.world.words import AIR, COLOURS

ALIKE = 0.03
"""Most mean squared error, in [0, 1], at which a picture still counts as that of a thing."""
SHOWN = 0.8
"""Share of what flies that has to be in front of the landmarks to be judged."""
SEARCHED = (range(10), range(39, 43))
"""Rows at which what flies and what drives may begin."""
LANDMARK_ROWS = slice(4, 38)


def background_psnr(video: Tensor, scene: Scene, start: int = 0, *, columns: Tensor | None = None) -> Tensor:
    """PSNR of the town in dB.

    Left out are the pixels of what flies and drives, where it truly is and where the video shows it.

    Args:
        video: `[B, 3, T, 48, 72]` in [-1, 1].
        scene: its scene.
        start: absolute index of the first frame.
        columns: `[B, T, 72]` bool, evaluate only these columns of the view, for example
            `scene.camera.returning(num_chunks)`; there is no ground truth for what a video invents. Frames
            without any such column are NaN.
    """
    frames = _frames(video, start)
    truth = render(scene, frames)
    judged = ~truth.moving.any(2) & ~_moving(video, scene, frames)
    if columns is not None:
        judged &= columns[:, :, None]
    errors = (_unit(video) - _unit(truth.background)).square().mean(1)  # [B, T, 48, 72]
    error = (errors * judged).sum((2, 3)) / judged.sum((2, 3))
    return -10 * torch.log10(error + 1e-8)


def landmarks_recognised(
    video: Tensor, scene: Scene, start: int = 0, *, slots: Tensor | None = None
) -> Tensor:
    """Share of the landmarks in full view that are what they should be, in kind and colour.

    The picture in a slot is compared with every landmark of the vocabulary in every colour, at the true place
    in the true light. The nearest has to be the true one, and near enough.

    Args:
        video: see `background_psnr`.
        scene: see `background_psnr`.
        start: see `background_psnr`.
        slots: `[B, T, SLOTS]` bool, evaluate only these; by default all. Gaps are not evaluated.
    """
    frames = _frames(video, start)
    empty = replace(
        scene,
        kind=torch.full_like(scene.kind, len(LANDMARKS)),
        verge=torch.zeros_like(scene.verge),
    )
    behind, image = _unit(render(empty, frames).background), _unit(video)
    judged = ~render(scene, frames).moving.any(2) & ~_moving(video, scene, frames)
    wishes, offset = scene.wishes(frames // CHUNK), scene.camera.offset(frames)
    right = torch.full((len(video), len(frames), SLOTS), torch.nan, device=video.device)
    left = CELL * torch.arange(SLOTS, device=video.device) - offset[..., None]  # [B, T, SLOTS]
    asked = (left >= 0) & (left <= WIDTH - CELL) & (scene.kind < len(LANDMARKS))[:, None]
    if slots is not None:
        asked &= slots
    for time, season in wishes[..., :2].flatten(0, 1).unique(dim=0).tolist():
        lit = (wishes[..., 0] == time) & (wishes[..., 1] == season)
        b, t, slot = (asked & lit[..., None]).nonzero(as_tuple=True)
        columns = left[b, t, slot][:, None] + torch.arange(CELL, device=video.device)
        tiles = paint.landmarks().to(video.device)[time, season, : len(LANDMARKS)]
        front = paint.verges().to(video.device)[time, season][scene.verge[b, slot]]
        error = _tile_errors(
            _cut(image, b, t, columns),
            _cut(behind, b, t, columns),
            tiles.flatten(0, 1)[:, LANDMARK_ROWS],
            front[:, LANDMARK_ROWS],
            _cut(judged[:, None].float(), b, t, columns)[..., 0],
        )
        nearest = error.min(1)
        true = scene.kind[b, slot] * len(COLOURS) + scene.colour[b, slot]
        right[b, t, slot] = ((nearest.indices == true) & (nearest.values < ALIKE)).float()
    return right.nanmean(2)


def actors_recognised(video: Tensor, scene: Scene, start: int = 0) -> Tensor:
    """Share of what should fly and drive that is there, with the right shape and colour, anywhere.

    What flies is judged where the truth shows it mostly uncovered.
    """
    frames = _frames(video, start)
    truth, wishes = render(scene, frames), scene.wishes(frames // CHUNK)
    found = []
    for thing in range(2):
        kind, colour = wishes[..., 2 + 2 * thing], wishes[..., 3 + 2 * thing]
        whole = paint.actors().to(video.device)[0, _actor(kind, thing), 0, 0, ..., 3].sum((-1, -2))
        asked = (kind > 0) & (truth.moving[:, :, thing].sum((-1, -2)) >= SHOWN * whole)
        right = torch.full(kind.shape, torch.nan, device=video.device)
        for time in wishes[..., 0][asked].unique().tolist():
            b, t = (asked & (wishes[..., 0] == time)).nonzero(as_tuple=True)
            pictures = paint.actors().to(video.device)[time, _kinds(thing)]  # [kinds, colours, 2, h, w, 4]
            nearest = _search(video[b, :, t], pictures.flatten(0, 2), thing).flatten(2).amin(2).min(1)
            true = (kind[b, t] - 1) * len(COLOURS) + colour[b, t]
            right[b, t] = ((nearest.indices // 2 == true) & (nearest.values < ALIKE)).float()
        found.append(right)
    return torch.stack(found, -1).nanmean(-1)


def sharpness(video: Tensor, scene: Scene, start: int = 0) -> Tensor:
    """Mean difference of neighbouring pixels over that of the ground truth: below 1 is blurred."""
    truth = render(scene, _frames(video, start)).video
    return _edges(video) / _edges(truth)


def returned_slots(scene: Scene, num_chunks: int, away: int, given: int) -> Tensor:
    """The slots that the first `given` chunks showed and that are back after at least `away` frames.

    Returns:
        `[B, T, SLOTS]` bool, true where all of the slot is in view.
    """
    wanted = (scene.camera.absence(num_chunks) >= away) & known_columns(scene, num_chunks, given)
    columns = scene.camera.columns(num_chunks)
    town = torch.zeros(*columns.shape[:2], SLOTS * CELL, dtype=torch.bool, device=columns.device)
    back: Tensor = town.scatter(2, columns, wanted).unflatten(-1, (SLOTS, CELL)).all(-1)
    return back


def known_columns(scene: Scene, num_chunks: int, given: int) -> Tensor:
    """The columns of the view that the first `given` chunks showed, `[B, T, WIDTH]` bool."""
    columns = scene.camera.columns(num_chunks)
    town = torch.zeros(len(columns), SLOTS * CELL, dtype=torch.bool, device=columns.device)
    town.scatter_(1, columns[:, : given * CHUNK].flatten(1), True)
    return town[:, None].expand(-1, columns.shape[1], -1).gather(2, columns)


def _frames(video: Tensor, start: int) -> Tensor:
    return torch.arange(start, start + video.shape[2], device=video.device)


def _unit(video: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clipped as a display would."""
    return ((video + 1) / 2).clamp(0, 1)


def _edges(video: Tensor) -> Tensor:
    """`[B, T]`."""
    return video.diff(dim=3).abs().mean((1, 3, 4)) + video.diff(dim=4).abs().mean((1, 3, 4))


def _cut(image: Tensor, b: Tensor, t: Tensor, columns: Tensor) -> Tensor:
    """Columns `[N, CELL]` of frames of `[B, C, T, 48, 72]`, `[N, rows, CELL, C]`."""
    return image.permute(0, 2, 3, 4, 1)[b[:, None], t[:, None], LANDMARK_ROWS, columns].transpose(1, 2)


def _tile_errors(image: Tensor, behind: Tensor, tiles: Tensor, front: Tensor, judged: Tensor) -> Tensor:
    """Mean squared error of every tile, painted between what is behind it and what is in front.

    Args:
        image: `[N, rows, CELL, 3]` in [0, 1].
        behind: what is there without a tile, the same shape.
        tiles: `[K, rows, CELL, 4]`.
        front: `[N, rows, CELL, 4]`.
        judged: `[N, rows, CELL]`, 1 or 0.

    Returns:
        `[N, K]`.
    """
    free = judged * (front[..., 3] == 0)
    bare = torch.where(front[..., 3:] > 0, front[..., :3], behind)
    missed = (image - bare).square().sum(-1)  # [N, rows, CELL], where there is no tile
    without = (judged * missed).flatten(1).sum(1)
    cover, ink = tiles[..., 3].flatten(1), (tiles[..., :3] * tiles[..., 3:]).flatten(1)
    change = free * (image.square().sum(-1) - missed)
    error = (
        without[:, None] + change.flatten(1) @ cover.mT - 2 * (free[..., None] * image).flatten(1) @ ink.mT
    )
    error = error + free.flatten(1) @ (tiles[..., :3].square().sum(-1) * tiles[..., 3]).flatten(1).mT
    return error / (3 * judged.flatten(1).sum(1))[:, None]


def _actor(kind: Tensor, thing: int) -> Tensor:
    """The index into `paint.actors` of what flies, or of what drives."""
    return torch.where(kind > 0, kind + thing * (len(AIR) - 1), 0)


def _kinds(thing: int) -> slice:
    """What flies, or drives, among `paint.actors`."""
    first = 1 + thing * (len(AIR) - 1)
    return slice(first, first + 2)


def _search(frames: Tensor, pictures: Tensor, thing: int) -> Tensor:
    """How far pictures of something that flies, or drives, are from frames, wherever they may be.

    Args:
        frames: `[N, 3, 48, 72]` in [-1, 1].
        pictures: `[P, height, width, 4]`.
        thing: 0 for what flies, 1 for what drives.

    Returns:
        `[N, P, rows, 72]`, mean squared error in [0, 1] over a picture's pixels, by its upper left corner;
        large where a part of it would be outside.
    """
    height, width = pictures.shape[1:3]
    rows = SEARCHED[thing]
    image = functional.pad(_unit(frames), (0, width - 1, 0, height - 1), value=1e2)
    image = image[..., rows.start : rows.stop + height - 1, :]
    ink = pictures.permute(0, 3, 1, 2)
    cover = ink[:, 3:].expand(-1, 3, -1, -1)
    shade = ink[:, :3] * cover
    error = functional.conv2d(image.square(), cover) - 2 * functional.conv2d(image, shade)
    error = error + shade.square().sum((1, 2, 3))[:, None, None]
    return error / cover.sum((1, 2, 3))[:, None, None]


def _moving(video: Tensor, scene: Scene, frames: Tensor) -> Tensor:
    """The pixels where the video shows what should fly and drive, `[B, T, 48, 72]` bool."""
    wishes = scene.wishes(frames // CHUNK)
    shown = torch.zeros(*wishes.shape[:2], *video.shape[-2:], dtype=torch.bool, device=video.device)
    for thing in range(2):
        looks = wishes[..., [0, 2 + 2 * thing, 3 + 2 * thing]]
        for time, kind, colour in looks.flatten(0, 1).unique(dim=0).tolist():
            if not kind:
                continue
            b, t = (looks == looks.new_tensor([time, kind, colour])).all(-1).nonzero(as_tuple=True)
            pictures = paint.actors().to(video.device)[time, _kinds(thing)][kind - 1, colour]
            error = _search(video[b, :, t], pictures, thing)
            best = error.flatten(1).min(1)
            back, down, across = torch.unravel_index(best.indices, error.shape[1:])
            cover = (pictures[back, ..., 3] > 0) & (best.values < ALIKE)[:, None, None]
            n, y, x = cover.nonzero(as_tuple=True)
            shown[b[n], t[n], SEARCHED[thing].start + down[n] + y, across[n] + x] = True
    return shown
