"""Synthetic profiles, to test classifiers with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from headforcing.measure.profile import HeadProfile, ProfileFacts
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory
from headforcing.roles.maps.file import encode_role
from headforcing.roles.maps.origin import ModelFacts

CANDIDATES: tuple[HeadRole, ...] = (Local(3), Full(), Memory(3, 12, 3), Anchor(3, 3), Local(1))


def profile_of(
    values: Mapping[str, Tensor],
    *,
    video: Tensor | None = None,
    prompt: Tensor | None = None,
    start: Tensor | None = None,
    step: Tensor | None = None,
    clean: Tensor | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> HeadProfile:
    """A profile of a model with a window of 21 frames and chunks of 3.

    Args:
        values: columns `[S, layers, heads, ...]` by name.
        video: default as `prompt`.
        prompt: default 0, 1, 2, ...
        start: default 21.
        step: default 0.
        clean: default all false.
        settings: of the metrics, by name; default none.
    """
    passes, layers, heads = next(iter(values.values())).shape[:3]
    model = ModelFacts(layers=layers, heads=heads, head_dim=8, window=21, chunk=3, model_class="Synthetic")
    metrics = {
        name.partition(".")[0]: dict((settings or {}).get(name.partition(".")[0], {})) for name in values
    }
    prompt = torch.arange(passes) if prompt is None else prompt
    return HeadProfile(
        facts=ProfileFacts(model=model, metrics=metrics),
        video=prompt if video is None else video,
        prompt=prompt,
        start=torch.full((passes,), 21) if start is None else start,
        step=torch.zeros(passes, dtype=torch.int64) if step is None else step,
        clean=torch.zeros(passes, dtype=torch.bool) if clean is None else clean,
        values={name: value.float().contiguous() for name, value in values.items()},
    )


def random_profile(
    seed: int, layers: int = 3, heads: int = 4, prompts: int = 3, noise: float = 0.1
) -> HeadProfile:
    """All columns of the built-in metrics, for two chunks per prompt with three passes each.

    Args:
        seed: random seed.
        layers: layers.
        heads: heads per layer.
        prompts: prompts.
        noise: size of the differences between passes, relative to those between heads.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prompt = torch.arange(prompts).repeat_interleave(6)
    start, step = (
        torch.tensor([21, 30]).repeat_interleave(3).repeat(prompts),
        torch.arange(3).repeat(2 * prompts),
    )
    passes = len(prompt)
    masses = (draw(layers, heads, 3) + noise * draw(passes, layers, heads, 3)).softmax(-1)
    near = (draw(layers, heads) + noise * draw(passes, layers, heads)).sigmoid()
    level, period = draw(layers, heads, 1), 3 + 6 * draw(layers, heads, 1).sigmoid()
    wave = (2 * torch.pi * torch.arange(18) / period + draw(layers, heads, 1)).sin()
    logits = level + wave + noise * draw(passes, layers, heads, 18)
    logits[..., 17] = torch.nan
    logits = pad(logits, (0, 2), value=torch.nan)  # there is a column for every age below the window
    errors = (
        0.3 * draw(layers, heads, len(CANDIDATES)) + noise * draw(passes, layers, heads, 1)
    ).sigmoid() / 4
    return profile_of(
        {
            **{f"attention_mass.{name}": masses[..., i] for i, name in enumerate(("first", "middle", "own"))},
            "mass_ratio.ratio": near,
            "qk_logits.by_age": logits,
            "output_regret.mean": errors / 2,
            "output_regret.p95": errors,
        },
        prompt=prompt,
        start=start,
        step=step,
        clean=step == 2,
        settings={"output_regret": {"roles": [encode_role(role) for role in CANDIDATES]}},
    )


def permuted(profile: HeadProfile, order: Tensor) -> HeadProfile:
    """The profile with heads reordered: head `order[i]`, counted layer by layer, goes to `i`."""
    values = {
        name: value.flatten(1, 2)[:, order].unflatten(1, profile.shape).contiguous()
        for name, value in profile.values.items()
    }
    return dataclasses.replace(profile, values=values)
