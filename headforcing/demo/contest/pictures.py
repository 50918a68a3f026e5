"""The pictures of a comparison: the drift of every entrant, and frames of its first video."""

from __future__ import annotations

from typing import Any

import torch

from headforcing.demo.contest.compare import make_scene
from headforcing.demo.contest.contest import FPS, Contest
from headforcing.demo.show.draw import draw_sheet
from headforcing.demo.show.story import INK, TRUTH, Story, Track, pixels
from headforcing.demo.world.camera import CHUNK, TOWN
from headforcing.demo.world.scene import render
from headforcing.measure.plots.drift import drift_curves, drift_panels

FEW = 4
"""Largest number of curves in one picture."""
LABEL = "background PSNR, dB"


def drift(found: Contest) -> Any:
    """A matplotlib figure: one picture for a few entrants, otherwise a panel each, with controls if any."""
    values = {result.entrant.name: result.psnr.numpy() for result in found.entrants}
    controls = {
        result.entrant.name: control.psnr.numpy()
        for result in found.entrants
        for control in found.controls_of(result)
        if "attended" in control.entrant.kind
    }
    if len(values) <= FEW and not controls:
        return drift_curves(values, found.trained, LABEL).figure
    what = "first and last frames, as many attended"
    return drift_panels(values, found.trained, LABEL, controls or None, what)[0].figure


def sheet(found: Contest) -> Any:
    """A Pillow image: the ground truth and every entrant, a row each, with the first seed."""
    setting = found.setting
    scene = make_scene(setting.seeds[:1], setting.chunks, camera=setting.camera)
    tracks = [Track("Ground truth", TRUTH, pixels(render(scene, torch.arange(found.frames)).video[0]))]
    for result in found.entrants:
        psnr = result.psnr[0].double().numpy()
        tracks.append(Track(result.entrant.name.replace("_", " "), INK, pixels(result.video), psnr))
    given = setting.given * CHUNK
    story = Story(
        tuple(tracks),
        headline=f"One scene, one noise, {found.frames / found.trained:.1f} × the trained length",
        byline=f"camera {setting.camera} · seed {setting.seeds[0]} · continues {given} rendered frames · "
        "72 × 48 pixels, enlarged · background PSNR to the ground truth",
        fps=FPS,
        trained=found.trained,
        given=given,
        camera=scene.camera.offset(torch.arange(found.frames))[0].double().numpy() / TOWN,
    )
    return draw_sheet(story)
