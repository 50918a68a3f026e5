"""The label table of Pyramid Forcing (arXiv:2605.13111): CSV, no header, a row per layer, a column per head.

-1 is Wave, 1 is Anchor, 2 is Veil. The file says nothing about the model it belongs to.

The labels get the roles of its preset (`headforcing.roles.maps.presets`).
"""

from __future__ import annotations

import re

from headforcing.errors import RoleMapError
from headforcing.roles.maps.file import MAX_BYTES
from headforcing.roles.maps.importers import Imported

LABELS = {"-1": "wave", "1": "anchor", "2": "veil"}


def read(content: bytes, source: str) -> Imported:
    """The labels of a table.

    Raises:
        RoleMapError: anything at all is wrong with it.
    """
    if len(content) > MAX_BYTES:
        raise RoleMapError(f"{source}: larger than {MAX_BYTES} bytes, which no such file requires")
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError as error:
        raise RoleMapError(f"{source}: byte {error.start} is not ASCII: expected plain integers") from error
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    rows = [line.split(",") for line in lines]
    for layer, row in enumerate(rows):
        for head, cell in enumerate(row):
            if cell not in LABELS:
                raise RoleMapError(
                    f"{source}: layer {layer} (line {layer + 1}), head {head}: {_shown(cell)}: expected -1 "
                    "(Wave), 1 (Anchor) or 2 (Veil)"
                )
        if len(row) != len(rows[0]):
            raise RoleMapError(
                f"{source}: layer {layer} (line {layer + 1}) has {len(row)} heads, layer 0 has {len(rows[0])}"
            )
    return Imported([[LABELS[cell] for cell in row] for row in rows])


def _shown(cell: str) -> str:
    if not cell:
        return "nothing"
    return cell if re.fullmatch(r"-?\d{1,9}", cell) else f"{cell[:40]!r} is not a plain integer"
