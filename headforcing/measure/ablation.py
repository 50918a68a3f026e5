"""Ablation: the error of the whole model's output when one head alone is restricted.

Ours, and expensive: every head and every candidate role costs one evaluation. It is the only measure here
that includes the effect of a head on later layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from torch import Tensor, nn

from headforcing.adapters.base import Adapter, find_adapter
from headforcing.apply import apply_head_forcing
from headforcing.apply.handles import handles_of
from headforcing.errors import AlreadyAppliedError, OptionError, ProfileError
from headforcing.measure.meter import Progress
from headforcing.measure.profile import HeadProfile, ProfileFacts
from headforcing.measure.profiler import Protocol, model_facts, sizes
from headforcing.roles import HeadRole, SlidingWindow
from headforcing.roles.maps.file import encode_role
from headforcing.roles.maps.role_map import RoleMap


def ablate_heads(
    model: nn.Module,
    score: Callable[[], Tensor],
    roles: Sequence[HeadRole],
    *,
    protocol: Protocol | None = None,
    adapter: Adapter | None = None,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> HeadProfile:
    """Restricts one head at a time to a role, and measures how much worse the output becomes.

    Args:
        model: the model, without head forcing; restored afterwards.
        score: runs the model and returns one error per video, `[S]`; the same videos and noise on every
            call. NaN excludes a video.
        roles: candidates that the one head is restricted to, `R` of them.
        protocol: `history` is the role of all other heads, default: the model's own window at true
            positions; `seed` is the seed of the videos, stored in the profile; `window` and `chunk` as in
            `Protocol`.
        adapter: the model's adapter; default: the one that fits.
        base_model: public name of the checkpoint, stored in the profile.
        progress: called after every head.

    Returns:
        A profile with one row per video and `ablation.increase` `[S, layers, heads, R]`: the error minus
        that of the unrestricted model, over the mean error of the unrestricted model.

    Raises:
        AlreadyAppliedError: head forcing is applied to the model.
        OptionError: `roles` is empty.
        ProfileError: `score` does not return one error per video, or its errors are not above zero.
    """
    if handles_of(model):
        raise AlreadyAppliedError("ablation applies roles of its own: remove head forcing first")
    if not roles:
        raise OptionError("roles is empty: expected at least one role to restrict a head to")
    adapter = find_adapter(model) if adapter is None else adapter
    protocol = protocol or Protocol()
    window, chunk = sizes(model, adapter, protocol)
    facts = model_facts(model, adapter, window=window, chunk=chunk, base_model=base_model)
    every = protocol.history or SlidingWindow(window, positions="absolute")
    whole = RoleMap.uniform(every, facts.layers, facts.heads)
    fitted = tuple(role.fit(window, chunk) for role in roles)

    def errors(role_map: RoleMap, expected: int | None = None) -> Tensor:
        with apply_head_forcing(model, role_map, adapter=adapter, window=window, chunk=chunk):
            return _checked(score(), expected)

    plain = errors(whole)
    scale = float(plain.nanmean())
    if not scale > 0:
        raise ProfileError(f"the unrestricted model has a mean error of {scale}: expected one above zero")
    increase = torch.empty(len(plain), facts.layers, facts.heads, len(fitted), dtype=torch.float64)
    for index in range(facts.layers * facts.heads):
        layer, head = divmod(index, facts.heads)
        for number, role in enumerate(fitted):
            cut = errors(with_role(whole, layer, head, role), len(plain))
            increase[:, layer, head, number] = (cut - plain) / scale
        if progress:
            progress(index + 1, facts.layers * facts.heads, "heads")
    settings = {"roles": [encode_role(role) for role in fitted], "history": encode_role(every)}
    rows = torch.arange(len(plain))
    return HeadProfile(
        ProfileFacts(
            model=facts,
            metrics={"ablation": settings},
            protocol={"seed": protocol.seed},
            library=version("headforcing"),
            torch=torch.__version__,
        ),
        video=rows,
        prompt=rows,
        start=torch.zeros_like(rows),
        step=torch.zeros_like(rows),
        clean=torch.ones_like(rows, dtype=torch.bool),
        values={"ablation.increase": increase.float()},
    )


def _checked(found: Tensor, expected: int | None) -> Tensor:
    """Errors `[S]` float64 on the CPU."""
    if found.dim() != 1 or not len(found) or len(found) != (expected or len(found)):
        raise ProfileError(
            f"score() returned {list(found.shape)}: expected one error per video, [{expected or 'S'}], the "
            "same videos on every call"
        )
    return found.detach().double().cpu()


def with_role(role_map: RoleMap, layer: int, head: int, role: HeadRole) -> RoleMap:
    """The map with another role for one head."""
    rows = [list(row) for row in role_map.layers]
    rows[layer][head] = role
    return RoleMap(tuple(tuple(row) for row in rows))
