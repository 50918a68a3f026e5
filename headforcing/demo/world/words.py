"""The words of the demo world: one prompt per chunk, parsed from text; torch is loaded for ids alone.

A prompt is eight words; the last two are the camera pose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TIMES = ("day", "dusk", "night")
SEASONS = ("summer", "autumn", "winter")
AIR = ("calm", "balloon", "plane")
ROAD = ("quiet", "car", "bus")
COLOURS = ("red", "blue", "yellow", "green", "white", "purple")
POSES = tuple(f"at{pose}" for pose in range(13))
MOTIONS = ("left", "still", "right")
WORDS = ("none", *TIMES, *SEASONS, *AIR, *ROAD, *COLOURS, *POSES, *MOTIONS)
PROMPT_WORDS = 8

WORD_ID = {word: index for index, word in enumerate(WORDS)}


def prompt_words(text: str) -> list[str]:
    """The words of one chunk's prompt, completed.

    The order is: time of day, season, what flies and its colour, what drives and its colour; then,
    optionally, the camera's position and motion (default: `at6 still`). `calm` and `quiet` have no colour.

    Args:
        text: for example `"day summer balloon red car blue"` or `"night winter calm bus white at0 right"`.

    Raises:
        ValueError: a word is missing, unknown or out of place; the message names the allowed ones.

    >>> prompt_words("day summer calm car blue")
    ['day', 'summer', 'calm', 'none', 'car', 'blue', 'at6', 'still']
    """
    given = text.split()
    place = 0

    def take(allowed: tuple[str, ...], what: str) -> str:
        nonlocal place
        got = given[place] if place < len(given) else "nothing"
        if got not in allowed:
            what = f"{what}: one of {', '.join(allowed)}"
            raise ValueError(f"word {place + 1} of the prompt: got {got!r}, expected the {what}")
        place += 1
        return got

    words = [take(TIMES, "time of day"), take(SEASONS, "season")]
    for kinds, what in ((AIR, "thing that flies"), (ROAD, "thing that drives")):
        words.append(take(kinds, what))
        words.append("none" if words[-1] == kinds[0] else take(COLOURS, f"colour of the {words[-1]}"))
    if place < len(given):
        words += [take(POSES, "camera position"), take(MOTIONS, "camera motion")]
    else:
        words += [POSES[len(POSES) // 2], "still"]
    if place != len(given):
        raise ValueError(
            f"the prompt has {len(given)} words, expected {place}: remove {' '.join(given[place:])!r}"
        )
    return words


def parse_prompt(text: str) -> Tensor:
    """Word ids of one chunk's prompt, `[PROMPT_WORDS]` long; see `prompt_words`.

    >>> parse_prompt("day summer calm car blue").tolist()
    [1, 4, 7, 0, 11, 14, 25, 33]
    """
    import torch

    return torch.tensor([WORD_ID[word] for word in prompt_words(text)])


def format_prompt(ids: Tensor) -> str:
    """The text of one prompt `[PROMPT_WORDS]`: the inverse of `parse_prompt`."""
    return " ".join(WORDS[int(index)] for index in ids if WORDS[int(index)] != "none")
