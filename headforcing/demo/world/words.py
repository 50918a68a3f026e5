"""The words of the demo world: one prompt per chunk, parsed from text; torch is loaded for ids alone.

A prompt is nine words and an end mark; the last two words are the camera pose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PALETTES = ("sand", "sea", "forest", "dusk")
CURTAINS = ("clear", "curtain")
SPEEDS = ("slow", "fast")
SHAPES = ("disc", "square", "diamond", "cross")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
POSES = tuple(f"at{pose}" for pose in range(5))
MOTIONS = ("left", "still", "right")
WORDS = ("<end>", "none", *PALETTES, *CURTAINS, *SPEEDS, *SHAPES, *COLOURS, *POSES, *MOTIONS)
PROMPT_WORDS = 10

WORD_ID = {word: index for index, word in enumerate(WORDS)}


def _expect(words: list[str], index: int, allowed: tuple[str, ...], what: str) -> str:
    """`words[index]`, checked against the allowed words.

    Raises:
        ValueError: it is not allowed.
    """
    got = words[index] if index < len(words) else "nothing"
    if got not in allowed:
        raise ValueError(
            f"word {index + 1} of the prompt: got {got!r}, expected the {what}: one of {', '.join(allowed)}"
        )
    return got


def prompt_words(text: str) -> list[str]:
    """The words of one chunk's prompt, completed.

    The order is: texture, curtain, speed, shape, colour; then, optionally, a second shape and
    colour; then, optionally, the camera's position and motion (default: `at2 still`).

    Args:
        text: for example `"sea clear fast disc red"` or `"dusk curtain slow cross blue disc red
            at0 right"`.

    Raises:
        ValueError: a word is missing, unknown or out of place; the message names the allowed ones.

    >>> prompt_words("sea clear fast disc red")
    ['sea', 'clear', 'fast', 'disc', 'red', 'none', 'none', 'at2', 'still', '<end>']
    """
    given = text.split()
    slots = [(PALETTES, "texture"), (CURTAINS, "curtain"), (SPEEDS, "speed")]
    slots += [(SHAPES, "shape"), (COLOURS, "colour")]
    words = [_expect(given, index, allowed, what) for index, (allowed, what) in enumerate(slots)]
    index = len(words)
    if index < len(given) and given[index] not in POSES:
        words.append(_expect(given, index, SHAPES + POSES, "second shape or camera position"))
        words.append(_expect(given, index + 1, COLOURS, "second colour"))
        index += 2
    else:
        words += ["none", "none"]
    if index < len(given):
        words.append(_expect(given, index, POSES, "camera position"))
        words.append(_expect(given, index + 1, MOTIONS, "camera motion"))
        index += 2
    else:
        words += [POSES[len(POSES) // 2], "still"]
    if index != len(given):
        raise ValueError(
            f"the prompt has {len(given)} words, expected at most {index}: remove {' '.join(given[index:])!r}"
        )
    return [*words, "<end>"]


def parse_prompt(text: str) -> Tensor:
    """Word ids of one chunk's prompt, `[PROMPT_WORDS]` long; see `prompt_words`.

    >>> parse_prompt("sea clear fast disc red").tolist()
    [3, 6, 9, 10, 14, 1, 1, 22, 26, 0]
    """
    import torch

    return torch.tensor([WORD_ID[word] for word in prompt_words(text)])


def format_prompt(ids: Tensor) -> str:
    """The text of one prompt `[PROMPT_WORDS]`: the inverse of `parse_prompt`."""
    words = [WORDS[int(index)] for index in ids]
    return " ".join(word for word in words if word not in ("none", "<end>"))
