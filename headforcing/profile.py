"""What every head looks at: a first, simple profiler.

The statistic is the attention proportion of Head Forcing (arXiv:2605.14487, Fig. 3a): the share of the
softmax on the first frame, on the own chunk and on everything between. That there are three
proportions is documented; that "first" is one latent frame, that "own" is the chunk, and the mean over
queries and calls are inferred, and the rule of `head_forcing_roles` is known from a third party only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.adapter import Adapter, find_adapter
from headforcing.apply import apply_head_forcing
from headforcing.backends import Part
from headforcing.backends.sdpa import attend
from headforcing.errors import AlreadyAppliedError, HeadForcingError
from headforcing.handle import handles_of
from headforcing.roles import SlidingWindow

Labels = tuple[tuple[str, ...], ...]
"""Role names `labels[layer][head]`, for `RoleMap.from_labels`."""

QUERY_ROWS = 256
"""Queries whose attention is written out at a time."""


@dataclass(frozen=True)
class HeadMass:
    """Share of the attention of every head, `[layers, heads]` float64 each; they add up to one.

    Attributes:
        first: on the first frame of the video.
        middle: on the history behind it.
        own: on the own chunk.
        calls: attention calls with a history that were averaged, per layer.
    """

    first: Tensor
    middle: Tensor
    own: Tensor
    calls: int


def attention_mass(
    model: nn.Module,
    run: Callable[[], object],
    *,
    window: int | None = None,
    adapter: Adapter | None = None,
) -> HeadMass:
    """Measures where the heads of a model look while it generates.

    All heads get the first frame and the last frames, at positions inside the window, so that the
    first frame is always there. Which history a profiled model sees past its window is our choice.
    Every pass over a chunk counts the same, the clean one too, except over the first chunk, which has
    no history. The measurement changes nothing that the model computes and draws no random numbers.

    Args:
        model: the model, head forcing not applied; it is left as it was found.
        run: generates something with the model; called once.
        window: frames seen, own chunk included; default: what the model was trained on.
        adapter: the model's adapter; default: the one that fits.

    Raises:
        AlreadyAppliedError: head forcing is applied to the model.
        HeadForcingError: `run` made no attention call with a history.
    """
    if handles_of(model):
        raise AlreadyAppliedError("profiling applies roles of its own: remove head forcing first")
    chosen = adapter or find_adapter(model)
    frames = chosen.window(model) if window is None else window
    role = SlidingWindow(frames, sink=1, positions="compact")
    meter = _Meter(chosen)
    with apply_head_forcing(model, role, adapter=chosen, window=frames, backend=meter), ExitStack() as hooks:
        for layer, (_, module) in enumerate(chosen.attentions(model)):
            hook = module.register_forward_pre_hook(meter.watch(layer), with_kwargs=True)
            hooks.callback(hook.remove)
        run()
    if not meter.calls or min(meter.calls.values()) == 0:
        raise HeadForcingError("run() made no attention call with a history: generate at least two chunks")
    mass = torch.stack([meter.total[layer] / meter.calls[layer] for layer in sorted(meter.calls)])
    return HeadMass(mass[:, 0], mass[:, 1], mass[:, 2], meter.calls[0])


def head_forcing_roles(mass: HeadMass, anchor_share: float = 0.25, local_share: float = 0.20) -> Labels:
    """Names `anchor`, `local` or `memory` by rank over all heads together.

    The top `anchor_share` of the heads by mass on the first frame are anchors; of the rest, the top
    `local_share` by mass on the own chunk are local; the others are memory heads. Shares are rounded
    up; of equal heads the one with the lower index (layer by layer) comes first.
    """
    return _ranked(mass.first, mass.own, anchor_share, local_share)


def bottom_ranked_roles(mass: HeadMass, anchor_share: float = 0.25, local_share: float = 0.20) -> Labels:
    """A control: as many heads of each role, but those at the bottom of each ranking."""
    return _ranked(-mass.first, -mass.own, anchor_share, local_share)


def shuffled_within_layers(labels: Sequence[Sequence[str]], generator: torch.Generator) -> Labels:
    """A control: the same labels in every layer, on other heads of that layer."""
    rows = (torch.randperm(len(row), generator=generator).tolist() for row in labels)
    return tuple(tuple(row[head] for head in order) for row, order in zip(labels, rows, strict=True))


def shuffled(labels: Sequence[Sequence[str]], generator: torch.Generator) -> Labels:
    """A control: as many labels of each kind, anywhere in the model."""
    heads = len(labels[0])
    flat = [label for row in labels for label in row]
    order = torch.randperm(len(flat), generator=generator).tolist()
    return _table([flat[head] for head in order], heads)


def _ranked(first: Tensor, own: Tensor, anchor_share: float, local_share: float) -> Labels:
    names = ["memory"] * first.numel()
    anchors = _top(first.flatten(), list(range(len(names))), anchor_share)
    rest = [head for head in range(len(names)) if head not in anchors]
    for head in anchors:
        names[head] = "anchor"
    for head in _top(own.flatten(), rest, local_share):
        names[head] = "local"
    return _table(names, first.shape[1])


def _top(score: Tensor, among: Sequence[int], share: float) -> list[int]:
    """The heads `among` with the highest scores; how many is a share of them, rounded up."""
    count = math.ceil(share * len(among) - 1e-9)  # 0.07 * 100 is a little more than 7
    return sorted(among, key=lambda head: (-float(score[head]), head))[:count]


def _table(flat: Sequence[str], heads: int) -> Labels:
    return tuple(tuple(flat[first : first + heads]) for first in range(0, len(flat), heads))


class _Meter:
    """A backend that also adds up where the heads of every layer look."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.layer = self.tokens_per_frame = -1
        self.total: dict[int, Tensor] = {}  # by layer: [3, H]
        self.calls: dict[int, int] = {}

    def watch(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """A hook that says which layer the next attention belongs to: call order is never counted."""
        self.calls[layer] = 0

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self.adapter.read(module, args, kwargs)
            if call is not None:
                self.layer, self.tokens_per_frame = layer, call.tokens_per_frame

        return note

    def __call__(self, parts: Sequence[Part], num_heads: int) -> Tensor:
        if parts[0].k.shape[1] > parts[0].q.shape[1]:  # all heads have one role, and a history
            mass = _masses(parts[0], self.tokens_per_frame)
            self.total[self.layer] = self.total.get(self.layer, 0) + mass
            self.calls[self.layer] += 1
        return attend(parts, num_heads)


def _masses(part: Part, tokens_per_frame: int) -> Tensor:
    """Mean mass on the first frame, the middle and the own chunk, `[3, Hr]` float64 on the CPU."""
    q, k = part.q.transpose(1, 2).float(), part.k.transpose(1, 2).float()  # [B, Hr, L or M, D]
    queries, history = q.shape[2], k.shape[2] - q.shape[2]
    regions = [tokens_per_frame, history - tokens_per_frame, queries]
    total = torch.zeros(3, q.shape[1], dtype=torch.float64)
    for rows in q.split(QUERY_ROWS, dim=2):
        weights = (rows @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        for region, part_of in enumerate(weights.split(regions, dim=-1)):
            total[region] += part_of.sum(-1).mean(0).sum(-1).double().cpu()
    return total / queries
