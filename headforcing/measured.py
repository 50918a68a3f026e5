"""From labels to a role map that says where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from headforcing.classifiers import Classification
from headforcing.errors import RoleMapMismatchError
from headforcing.origin import Measurement, Origin, Scalar
from headforcing.profile import HeadProfile
from headforcing.role_map import RoleMap
from headforcing.roles import HeadRole


def measured_map(
    found: Classification,
    profile: HeadProfile,
    roles: Mapping[str, HeadRole] | None = None,
    *,
    stability: Mapping[str, Scalar] | None = None,
    notes: Mapping[str, Scalar] | None = None,
    seeds: Sequence[int] | None = None,
) -> RoleMap:
    """The roles of a classification, or of a control, with every number filled in and their origin.

    Args:
        found: the labels.
        profile: what they were found in.
        roles: what the labels mean; default: what the classification says.
        stability: `StabilityReport.summary()`.
        notes: anything else that should stay with the map.
        seeds: of noise and sampling; default: the seed of the profile's protocol, where it has one.

    Raises:
        RoleMapError: a label has no role.
        RoleMapMismatchError: the labels are of another model.
        WindowError: a role needs more frames than the model was trained on.
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
