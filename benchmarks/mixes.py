"""What is compared in one layer: roles of presets in whole heads, StreamingLLM at equal bytes or frames."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from attention_presets import preset_rows
from measuring import CHUNK, Case

from headforcing.errors import StreamShapeError
from headforcing.measure.memory import steady, stored_bytes
from headforcing.measure.sizes import ModelSize
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.maps.role_map import RoleMap

DENSE, IDENTITY = "dense", "identity"


@dataclass
class Mix:
    """Roles of one layer.

    Attributes:
        name: what to call them.
        roles: one per head; none: dense, as the module is.
        equals: of which other mixes it has the bytes or the frames, in words.
    """

    name: str
    roles: list[HeadRole]
    equals: list[str] = field(default_factory=list)


def plain_mixes(case: Case, contiguous: bool) -> list[Mix]:
    """Roles of Head Forcing in two mixes of 12 heads, and StreamingLLM at as many frames as the first."""
    memory = Memory(sink=1, episodic=8, recent=9)
    mix = [*[Anchor(1)] * 3, *[Local(1)] * 2, *[memory] * 7]
    short = [*[Anchor(1)] * 6, *[Local(1)] * 6]
    if not contiguous:  # roles of a trained model are scattered over the heads
        for row in (mix, short):
            random.Random(0).shuffle(row)  # noqa: S311 - a fixed order, no secret
    frames = sum(min((role.capacity(CHUNK) or 0) + CHUNK, case.window) for role in mix)
    return framed(
        case,
        Mix("anchor 3, local 2, memory 7", mix),
        Mix("anchor 6, local 6", short),
        streaming(round(frames / len(mix)), case),
    )


def preset_mixes(case: Case, contiguous: bool) -> list[Mix]:
    """A mix per preset."""
    rows = preset_rows(case.heads, case.window, CHUNK, contiguous)
    return framed(case, *(Mix(name, roles) for name, roles in rows.items()))


def beside_streaming(case: Case, names: list[str], store: str) -> tuple[list[Mix], list[str]]:
    """Presets, StreamingLLM at the bytes and at the frames of each, and reasons why some cannot be run.

    Presets whose heads are all alike have no StreamingLLM of their own.
    """
    rows = preset_rows(case.heads, case.window, CHUNK, False)
    mixes: list[Mix] = []
    others: dict[int, Mix] = {}
    reasons = []
    for name in names:
        (title,) = [title for title in rows if title.partition(":")[0] == name]
        mix = Mix(title, rows[title])
        if reason := cannot_run(mix, case):
            reasons.append(f"{case}, {title}: {reason}")
            continue
        mixes.append(mix)
        if len(set(mix.roles)) == 1:
            continue
        for kind, frames in (("bytes", equal_bytes(mix, case, store)), ("frames", equal_frames(mix, case))):
            if frames is None:
                reasons.append(
                    f"{case}, StreamingLLM at the {kind} of {title}: it would need more than the window of "
                    f"{case.window} frames"
                )
                continue
            others.setdefault(frames, streaming(frames, case)).equals.append(f"{kind} of {title}")
    return framed(case, *mixes, *(others[frames] for frames in sorted(others))), reasons


def runnable(case: Case, names: Sequence[str]) -> list[tuple[Case, list[str]]]:
    """The case with all presets, and one of a row of patches less for those that only run there.

    Where a height is odd, squares of 2 x 2 patches do not divide it: 720p has 45 x 80.
    """
    rows = preset_rows(case.heads, case.window, CHUNK, False)
    mixes = {title.partition(":")[0]: Mix(title, roles) for title, roles in rows.items()}
    less = dataclasses.replace(case, height=case.height - 1)
    there = [name for name in names if cannot_run(mixes[name], case) and not cannot_run(mixes[name], less)]
    return [(case, list(names)), *([(less, there)] if there else [])]


def framed(case: Case, *mixes: Mix) -> list[Mix]:
    """Dense attention first, then what is compared to it, and what must equal it last."""
    same = SlidingWindow(case.window, positions="absolute")
    return [Mix(DENSE, []), *mixes, Mix(IDENTITY, [same] * case.heads)]


def streaming(frames: int, case: Case) -> Mix:
    """StreamingLLM on frames; its sink is a chunk where there is room."""
    role = SlidingWindow(frames, sink=min(CHUNK, frames - CHUNK))
    return Mix(f"StreamingLLM, {frames} frames", [role] * case.heads)


def equal_frames(mix: Mix, case: Case) -> int:
    """As many frames as queries of a mix see, to the nearest."""
    found = [steady(role.fit(case.window, CHUNK), case.window, CHUNK) for role in mix.roles]
    frames = sum((one.attended for one in found if one is not None), Fraction()) / len(mix.roles)
    return min(max(round(frames), CHUNK + 1), case.window)


def equal_bytes(mix: Mix, case: Case, store: str) -> int | None:
    """Frames of StreamingLLM whose bytes in the store are nearest; `None`: more than the window would be."""
    size, roles = size_of(case), tuple(role.fit(case.window, CHUNK) for role in mix.roles)
    wanted = stored_bytes(size, store, RoleMap((roles,)))
    whole = stored_bytes(size, store, RoleMap((tuple(streaming(case.window, case).roles),)))
    assert wanted is not None  # no mix grows
    assert whole is not None
    half, frames = Fraction(1, 2), Fraction(wanted * case.window, whole)  # every frame takes as much
    return None if frames > case.window + half else max(math.ceil(frames - half), CHUNK + 1)


def size_of(case: Case) -> ModelSize:
    """One layer of a case."""
    itemsize = case.dtype.itemsize
    return ModelSize(1, case.heads, case.head_dim, case.window, CHUNK, (case.height, case.width), itemsize)


def cannot_run(mix: Mix, case: Case) -> str | None:
    """Why a mix cannot be run on a grid: what it would merge or cut does not divide."""
    for role in dict.fromkeys(mix.roles):
        if (history := role.compressed()) is not None:
            try:
                history.check((case.height, case.width))
            except StreamShapeError as error:
                return str(error)
    return None
