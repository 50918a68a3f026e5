"""What commands check before they import torch, which takes seconds: presets, prompts, places for files."""

from __future__ import annotations

import os
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


def check_prompt(text: str) -> None:
    """Refuses a prompt that the demo model does not understand.

    Raises:
        OptionError: a word is missing, unknown or out of place.
    """
    from headforcing.demo.world.words import prompt_words

    try:
        prompt_words(text)
    except ValueError as error:
        raise OptionError(f"{text!r}: {error}") from None


def check_out(folder: Path) -> None:
    """Checks that files can be written to a folder, which need not exist; nothing stays behind.

    Raises:
        OptionError: they cannot.
    """
    whole = folder.absolute()
    there = next(place for place in (whole, *whole.parents) if os.path.exists(place))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OptionError(
            f"{folder} cannot be written ({there}: {error.strerror}): choose another --out"
        ) from error
