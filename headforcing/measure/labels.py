"""Role maps from labels, with their origin, and controls for labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch

from headforcing.errors import OptionError, RoleMapMismatchError
from headforcing.measure.classifiers import Classification, table
from headforcing.measure.profile import HeadProfile
from headforcing.roles import HeadRole
from headforcing.roles.maps.origin import Measurement, Origin, Scalar
from headforcing.roles.maps.role_map import RoleMap


def measured_map(
    found: Classification,
    profile: HeadProfile,
    roles: Mapping[str, HeadRole] | None = None,
    *,
    stability: Mapping[str, Scalar] | None = None,
    notes: Mapping[str, Scalar] | None = None,
    seeds: Sequence[int] | None = None,
) -> RoleMap:
    """The role map of a classification or a control, with its origin and all open numbers filled in.

    Args:
        found: the labels.
        profile: the profile they come from.
        roles: role of every label; default: those of the classification.
        stability: `StabilityReport.summary()`.
        notes: anything else to store in the map.
        seeds: of noise and sampling; default: the seed of the profile's protocol, if it has one.

    Raises:
        RoleMapError: a label has no role.
        RoleMapMismatchError: the labels are for another model.
        WindowError: a role requires more frames than the model was trained on.
    """
    facts = profile.facts.model
    if (len(found.labels), len(found.labels[0])) != profile.shape:
        raise RoleMapMismatchError(
            f"the labels are for {len(found.labels)} layers x {len(found.labels[0])} heads, the profile is "
            f"of {facts.layers} x {facts.heads}: classify this profile"
        )
    measurement = Measurement(
        method=found.method,
        settings=dict(found.settings),
        metric=found.metrics,
        profile=profile.hash,
        prompts=profile.facts.prompts,
        videos=len(profile.video.unique()),
        seeds=_seeds(profile) if seeds is None else tuple(seeds),
        library=version("headforcing"),
    )
    origin = Origin(
        model=facts, measurement=measurement, stability=dict(stability or {}), notes=dict(notes or {})
    )
    known = dict(found.roles if roles is None else roles)
    named = RoleMap.from_labels(found.labels, known, origin)
    return named.fit(facts.layers, facts.heads, facts.window, facts.chunk)


def _seeds(profile: HeadProfile) -> tuple[int, ...]:
    seed = profile.facts.protocol.get("seed")
    return (seed,) if type(seed) is int else ()


def random(found: Classification, seed: int) -> Classification:
    """The same labels on random heads of the model; a head may get its own label again."""
    flat = _flat(found)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed)).tolist()
    return _control(found, "random", [flat[head] for head in order], seed=seed)


def shuffled_within_layer(found: Classification, seed: int) -> Classification:
    """The same labels in every layer, on random heads of that layer, which preserves dependence on depth.

    A head may get its own label again.
    """
    generator = torch.Generator().manual_seed(seed)
    flat: list[str] = []
    for row in found.labels:
        flat += [row[head] for head in torch.randperm(len(row), generator=generator).tolist()]
    return _control(found, "shuffled_within_layer", flat, seed=seed)


def inverted(found: Classification) -> Classification:
    """The same labels, with the fewest frames for the heads that had the most.

    Heads are sorted by the number of frames their role stores; a role with an open number takes the rest of
    the window and comes last, as do roles that store everything. Roles with equal numbers are sorted in the
    order of `found.roles`. Heads of one role are sorted by margin: if no role stores more, the most certain
    head is last; if none stores fewer, it is first; otherwise the margin does not say on which side the
    boundary lies and is ignored. Then by index. Head number i in this order gets the label of head number
    n - 1 - i; if both have the same label, they keep it.
    """
    names = list(found.roles)
    frames = {name: _frames(role) for name, role in found.roles.items()}
    labels = _flat(found)
    fewest, most = min(frames[label] for label in labels), max(frames[label] for label in labels)
    margin = found.margin.nan_to_num(0.0).flatten().tolist()

    def need(head: int) -> tuple[float, int, float, int]:
        label = labels[head]
        side = (frames[label] == most) - (frames[label] == fewest)
        return frames[label], names.index(label), side * margin[head], head

    order = sorted(range(len(labels)), key=need)
    flat = [""] * len(order)
    for head, other in zip(order, reversed(order), strict=True):
        flat[head] = labels[other]
    return _control(found, "inverted", flat)


def all_one(found: Classification, label: str) -> Classification:
    """One label for every head.

    Raises:
        OptionError: the classification has no such label.
    """
    if label not in found.roles:
        raise OptionError(f"unknown label {label!r}: {found.method} has {', '.join(found.roles)}")
    return _control(found, f"all {label}", [label] * found.margin.numel())


def _control(found: Classification, name: str, flat: list[str], **settings: Scalar) -> Classification:
    return dataclasses.replace(
        found,
        method=f"{name} of {found.method}",
        labels=table(flat, len(found.labels[0])),
        margin=torch.full_like(found.margin, torch.nan),
        settings={**found.settings, **settings},
    )


def _flat(found: Classification) -> list[str]:
    return [label for row in found.labels for label in row]


def _frames(role: HeadRole) -> float:
    """Stored frames; infinite for an unbounded role, or one that takes the rest of the window."""
    numbers = {f.name for f in dataclasses.fields(role)} - {"clean_window"}
    open_ended = any(getattr(role, name) is None for name in numbers)
    kept = None if open_ended else role.capacity(0)
    return math.inf if kept is None else float(kept)
