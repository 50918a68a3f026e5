"""Importers: head labels that other projects published, as role maps. One file each; the folder is the list.

The labels are taken exactly or not at all. What they mean are the roles of the preset of that name
(`headforcing.roles.maps.presets`), or others from the caller; the notes of the map say which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from headforcing.errors import OptionError, named_module
from headforcing.roles import HeadRole
from headforcing.roles.maps.file import read_bytes
from headforcing.roles.maps.origin import Origin, Scalar
from headforcing.roles.maps.preset import CHUNK, WINDOW
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.maps.role_map import RoleMap


@dataclass(frozen=True)
class Imported:
    """What a file says.

    Attributes:
        labels: name of the role of every head, `labels[layer][head]`.
        says: what the file says about itself, such as a profile name and a description.
    """

    labels: Sequence[Sequence[str]]
    says: Mapping[str, Scalar] = field(default_factory=dict)


def import_roles(
    path: str | Path,
    format: str,
    roles: Mapping[str, HeadRole] | None = None,
    *,
    window: int = WINDOW,
    chunk: int = CHUNK,
) -> RoleMap:
    """The role map of a file of another project.

    Args:
        path: the file.
        format: name of the importer, such as `pyramid_forcing`.
        roles: what the labels mean, where it is not to be the role of the preset.
        window: frames the model was trained on; numbers of the preset follow it.
        chunk: frames of a chunk.

    Raises:
        OptionError: there is no such importer, or it knows no label of a name in `roles`.
        RoleMapError: the file cannot be read, or anything at all is wrong with it.
        WindowError: the preset requires more frames than the window.
    """
    path = Path(path)
    read = cast(Callable[[bytes, str], Imported], named_module(__name__, format).read)
    content = read_bytes(path)
    found = read(content, str(path))
    (preset,) = (one for one in PRESETS.values() if one.importer == format)
    known, given = preset.roles(window, chunk), dict(roles or {})
    if unknown := sorted(set(given) - set(known)):
        raise OptionError(f"roles names {unknown}: {format} has the labels {', '.join(known)}")
    meaning = {**known, **given}
    notes: dict[str, Scalar] = {
        "imported": format,
        "file": path.name.encode("utf-8", "backslashreplace").decode(),
        "file_sha256": hashlib.sha256(content).hexdigest(),
        **{f"file_says_{name}": value for name, value in found.says.items()},
    }
    for name, role in meaning.items():
        notes[f"{name}_became"] = f"{role}" + ("" if name in given else ", the role of its preset")
    return RoleMap.from_labels(found.labels, meaning, Origin(notes=notes))
