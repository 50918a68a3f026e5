"""Role maps that keep the same number of frames in all, so that their bytes are equal.

Roles begin with the frames that their classifier gives them. Too many: the largest memories shrink. Too
few: the smallest memories grow, and when they are full, the last frames of the other roles, evenly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from headforcing.measure.classifiers import Classification
from headforcing.measure.profile import HeadProfile
from headforcing.roles import Anchor, HeadRole, Local, Memory
from headforcing.roles.episodic import Uniform
from headforcing.roles.maps.origin import ModelFacts
from headforcing.roles.maps.role_map import RoleMap

SPREAD = {
    "anchor": Memory(3, 4, 1, Uniform()),
    "wave": Memory(1, 4, 1, Uniform()),
    "veil": Local(1, 3),
}
"""Numbers for the labels of Pyramid Forcing: its own roles cannot be made larger or smaller."""
PLAIN = {"local": Local(3), "anchor": Anchor(3, 3), "memory": Memory(3, 12, 3)}
"""Numbers for the labels of Head Forcing, in whole chunks."""


def at_budget(found: Classification, facts: ModelFacts, total: int) -> RoleMap:
    """The roles of a classification with `total` frames kept by all heads together.

    Raises:
        ValueError: even the smallest memories keep more.
    """
    own = {"head_forcing": PLAIN, "pyramid_forcing": SPREAD}
    known = own.get(found.method.rpartition(" ")[2], found.roles)
    roles = [known[label] for row in found.labels for label in row]
    most = facts.window - facts.chunk
    frames = [role.capacity(facts.chunk) or 0 for role in roles]
    memories = [place for place, role in enumerate(roles) if isinstance(role, Memory)]
    others = [place for place in range(len(roles)) if place not in memories]
    while sum(frames) > total and any(frames[place] > 1 for place in memories):
        frames[max(memories, key=lambda place: (frames[place], place))] -= 1
    for group in (memories, others):
        while sum(frames) < total and (room := [place for place in group if frames[place] < most]):
            frames[min(room, key=lambda place: (frames[place], place))] += 1
    if sum(frames) != total:
        raise ValueError(f"{found.method}: keeps {sum(frames)} frames in all, wanted {total}")
    sized = [_sized(role, count) for role, count in zip(roles, frames, strict=True)]
    return RoleMap(tuple(tuple(sized[at : at + facts.heads]) for at in range(0, len(sized), facts.heads)))


def within_budget(
    classify: Callable[..., Classification], profile: HeadProfile, total: int
) -> Classification:
    """The classification with the smallest allowed error whose roles keep at most `total` frames."""
    chunk = profile.facts.model.chunk

    def cost(error: float) -> int:
        found = classify(profile, error=error)
        return sum(found.roles[label].capacity(chunk) or 0 for row in found.labels for label in row)

    low, high = 0.0, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= total else (middle, high)
    return classify(profile, error=high)


def _sized(role: HeadRole, frames: int) -> HeadRole:
    """The role with another number of frames."""
    if isinstance(role, Local):
        return dataclasses.replace(role, recent=frames - role.sink)
    if isinstance(role, Anchor):
        return dataclasses.replace(role, recent=frames - role.sink)
    assert isinstance(role, Memory)
    sink = min(role.sink, frames)
    recent = min(role.recent or 0, frames - sink)
    return Memory(sink, frames - sink - recent, recent, update=role.update)
