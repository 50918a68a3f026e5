"""What commands check before they import torch, which takes seconds: names of presets, places for files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from headforcing.errors import OptionError

PRESETS = (
    "full",
    "sliding_window",
    "streaming_llm",
    "infinity_rope",
    "memrope",
    "deep_forcing",
    "head_forcing",
    "pyramid_forcing",
    "dummy_forcing",
    "forcing_kv",
)
"""Names of the presets, in their order."""


def check_preset(name: str | None) -> None:
    """Refuses a preset that does not exist.

    Raises:
        OptionError: there is no such preset.
    """
    if name is not None and name not in PRESETS:
        raise OptionError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")


def check_entrant(name: str) -> None:
    """Refuses what is neither a preset nor a file.

    Raises:
        OptionError: it is neither.
    """
    if name not in PRESETS and not Path(name).is_file():
        raise OptionError(
            f"{name!r} is neither a preset nor a role-map file: the presets are {', '.join(PRESETS)}"
        )


def check_out(folder: Path) -> None:
    """Makes a folder, and checks that files can be written there.

    Raises:
        OptionError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = "is a file" if folder.is_file() else f"cannot be written ({error.strerror})"
        raise OptionError(f"{folder} {what}: choose another --out") from error
