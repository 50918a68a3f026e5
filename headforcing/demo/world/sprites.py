"""The pixel art of the demo world, in `sprites.txt`: a letter is a paint, a dot is nothing.

A landmark is 12 pixels wide and stands on the ground with its last row. Paints are in `paint.py`; `c` and `C`
are the thing's own colour, light and dark. Above a cloud stands its first row in the view.
"""

from __future__ import annotations

from importlib import resources


def _read() -> dict[str, dict[str, str]]:
    """Rows of letters by group and name."""
    found: dict[str, dict[str, str]] = {}
    text = (resources.files("headforcing.demo.world") / "sprites.txt").read_text("utf-8")
    for block in text.strip().split("\n\n"):
        head, rows = block.split("\n", 1)
        group, name = head.split()
        found.setdefault(group, {})[name] = rows
    return found


_ART = _read()
LANDMARKS = _ART["landmark"]
"""What can stand in a slot of the town; every kind shows its colour."""
CLOUDS = ("", *_ART["cloud"].values())
"""Shapes in the sky above a slot; the first is none."""
CLOUD_ROWS = (0, *map(int, _ART["cloud"]))
"""First row of each cloud."""
VERGES = ("", *_ART["verge"].values())
"""Small things between the houses and the road; the first is none."""
ACTORS = _ART["actor"]
"""What moves, looking to the right."""
