"""The moving picture of the README: the true town, the model's own window, and Head Forcing.

python benchmarks/town.py --seed 6000 --out docs/assets/town.webp
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from headforcing.demo import demo_model, demo_roles
from headforcing.demo.contest.compare import DEFAULT_CHUNKS, GIVEN_CHUNKS, Policy, make_scene, roll
from headforcing.demo.model.threads import one_thread
from headforcing.demo.show.draw import enlarge, font
from headforcing.demo.show.story import FAINT, FORCING, INK, PAPER, TRUTH, WINDOW, Pixels, pixels
from headforcing.demo.world.camera import CHUNK, HEIGHT, WIDTH
from headforcing.demo.world.scene import render

ROOT = Path(__file__).resolve().parents[1]
EVERY, FPS = 2, 16
"""Which frames are shown, and how many frames of the video pass in a second."""
PANEL, GAP, TOP, BOTTOM = (4 * WIDTH, 4 * HEIGHT), 14, 34, 30
LIMIT = 1_500_000
"""Largest size in bytes."""


@one_thread()
def tracks(seed: int, chunks: int) -> dict[str, tuple[str, Pixels]]:
    """Colour and video of every panel, by its caption."""
    model, scene = demo_model(), make_scene([seed], chunks, camera="pan")
    found = {"the true town": (TRUTH, pixels(render(scene, torch.arange(chunks * CHUNK)).video[0]))}
    policies = {"the model's own window": (WINDOW, None), "Head Forcing": (FORCING, demo_roles())}
    for name, (colour, roles) in policies.items():
        made = roll(model, Policy(name, roles), scene, chunks, seeds=[seed], given_chunks=GIVEN_CHUNKS["pan"])
        found[name] = colour, pixels(made.video[0])
    return found


def draw(shown: dict[str, tuple[str, Pixels]], frame: int, given: int, trained: int) -> Any:
    """One frame of the picture, a Pillow image."""
    width = len(shown) * (PANEL[0] + GAP) + GAP
    image = Image.new("RGB", (width, TOP + PANEL[1] + BOTTOM), PAPER)
    canvas = ImageDraw.Draw(image)
    for number, (name, (colour, video)) in enumerate(shown.items()):
        left = GAP + number * (PANEL[0] + GAP)
        canvas.text((left, TOP - 10), name, colour, font(16, "bold"), anchor="ls")
        image.paste(enlarge(video[frame], PANEL), (left, TOP))
    when = "given" if frame < given else f"{(frame + 1) / trained:.1f} × the trained length"
    canvas.text((GAP, image.height - 10), f"frame {frame}", INK, font(14, "mono"), anchor="ls")
    canvas.text((GAP + 110, image.height - 10), when, FAINT, font(14), anchor="ls")
    return image


def main() -> None:
    """Draws and writes the picture.

    Raises:
        ValueError: the file is too large.
    """
    parser = argparse.ArgumentParser(description="The moving picture of the README.")
    parser.add_argument("--seed", type=int, default=6000)
    parser.add_argument("--chunks", type=int, default=DEFAULT_CHUNKS)
    parser.add_argument("--quality", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets" / "town.webp")
    given = parser.parse_args()
    shown = tracks(given.seed, given.chunks)
    first, trained = GIVEN_CHUNKS["pan"] * CHUNK, demo_model().config.window
    frames = [draw(shown, frame, first, trained) for frame in range(0, given.chunks * CHUNK, EVERY)]
    frames[0].save(
        given.out,
        save_all=True,
        append_images=frames[1:],
        duration=1000 * EVERY // FPS,
        loop=0,
        quality=given.quality,
        method=6,
    )
    if given.out.stat().st_size > LIMIT:
        raise ValueError(
            f"{given.out} has {given.out.stat().st_size} bytes: expected {LIMIT}, lower --quality"
        )


if __name__ == "__main__":
    main()
