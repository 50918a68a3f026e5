"""The content of the demo's pictures: videos, numbers and colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headforcing.demo.world.camera import TOWN, WIDTH

Pixels = NDArray[np.uint8]

# Okabe and Ito's palette, safe for colour-blind readers; the curves differ in dash as well.
TRUTH, WINDOW, FORCING, THIRD = "#E8E6DF", "#E69F00", "#56B4E9", "#CC79A7"
ROLE_COLOURS = (FORCING, "#009E73", THIRD, "#F0E442", "#D55E00", "#0072B2")
PAPER, PANEL, INK, FAINT, RULE = "#11151A", "#171C23", "#ECEEF0", "#98A1AC", "#343C47"


def pixels(video: Tensor) -> Pixels:
    """Frames `[T, 48, 72, 3]` of a video `[3, T, 48, 72]` in [-1, 1]."""
    levels: Pixels = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    return levels


@dataclass(frozen=True)
class Track:
    """One video of the comparison.

    Attributes:
        name: its caption.
        colour: of caption, frame and curve.
        video: `[T, 48, 72, 3]`.
        psnr: dB per frame, NaN if there is nothing to measure; `None` for the ground truth.
    """

    name: str
    colour: str
    video: Pixels
    psnr: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Story:
    """The content of the pictures: the tracks, and what they have in common.

    Attributes:
        tracks: the ground truth, then the policies.
        headline: the large line.
        byline: the small line.
        fps: frames per second.
        trained: frames of the training videos.
        given: first frames that every policy gets.
        camera: left edge of the view per frame, as a share of the town; `None`: it stands still.
        view: width of the view, as a share of the town.
    """

    tracks: tuple[Track, ...]
    headline: str
    byline: str
    fps: int
    trained: int
    given: int
    camera: NDArray[np.float64] | None = None
    view: float = WIDTH / TOWN

    @property
    def frames(self) -> int:
        """Frames of the videos."""
        return len(self.tracks[0].video)


@dataclass(frozen=True)
class Held:
    """The stored frames of one head over time.

    Attributes:
        name: the panel's title.
        held: per chunk, the numbers of the stored frames while the chunk is generated.
    """

    name: str
    held: tuple[tuple[int, ...], ...]
