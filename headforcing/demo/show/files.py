"""The demo's files: written completely or not at all, never over files it did not write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headforcing.demo.show.story import Pixels

REPORT = "demo.json"
FILES = ("demo.mp4", "contact_sheet.png", "memory.png", "strip.png", REPORT)
MADE_BY = "headforcing demo"


def check_folder(
    out: Path, files: Sequence[str] = FILES, report: str = REPORT, made_by: str = MADE_BY
) -> None:
    """Creates the folder; refuses to overwrite files that the command did not write.

    Args:
        out: the folder.
        files: names the command writes.
        report: the one among them whose entry `made_by` names the command.
        made_by: the command.

    Raises:
        FileExistsError: see above.
        NotADirectoryError: there is a file of that name.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    present = [name for name in files if (out / name).exists()]
    if present and not _is_by(out / report, made_by):
        raise FileExistsError(
            f"{out} contains {', '.join(present)}, which `{made_by}` did not write: choose another --out"
        )


def replace_file(path: Path, save: Callable[[Path], Any]) -> None:
    """Saves to a temporary name and renames, so that `path` is never incomplete."""
    part = path.with_name(f".part-{path.name}")
    try:
        save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_mp4(path: Path, frames: Iterable[Pixels], size: tuple[int, int], fps: int) -> None:
    """Encodes frames as H.264 in yuv420p with BT.709 colours, ready to play while the file loads.

    Args:
        path: ends in `.mp4`.
        frames: `[height, width, 3]` each.
        size: width and height.
        fps: frames per second.
    """
    from imageio_ffmpeg import write_frames

    tags = "colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
    options = ["-crf", "18", "-preset", "veryfast", "-movflags", "+faststart", "-threads", "2"]
    options += ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,setparams={tags}"]
    writer = write_frames(
        str(path), size, fps=fps, quality=None, pix_fmt_out="yuv420p", output_params=options
    )
    writer.send(None)
    try:
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()


def _is_by(path: Path, made_by: str) -> bool:
    try:
        return bool(json.loads(path.read_text("utf-8"))["made_by"] == made_by)
    except (OSError, ValueError, KeyError, TypeError):
        return False
