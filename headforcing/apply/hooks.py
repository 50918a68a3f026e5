"""The two hooks beside the attention modules: one hears which pass begins, one makes a new prompt heard.

Both are put on a model only where they are needed, and found again by their class, so that a copy of the
model can be cleaned as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from headforcing.adapters.base import Adapter
from headforcing.attention import compile as traced
from headforcing.attention.activity import Activity
from headforcing.attention.plan import LayerPlan
from headforcing.errors import StreamError, UnsupportedModelError
from headforcing.roles.maps.role_map import RoleMap


class TellPhase:
    """Before a pass of the model: notes down whether it is a clean one."""

    def __init__(self, adapter: Adapter, activity: Activity) -> None:
        self.adapter, self.activity, self.key = adapter, activity, traced.number(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the phase of the pass that begins."""
        if not torch.compiler.is_compiling():
            self.serve(args, kwargs)
        elif traced.POSSIBLE and traced.fits([args, kwargs]):
            traced.hear(self.key, self.activity.order, args, kwargs)
        else:
            traced.between_graphs(self.serve, args, kwargs)

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the phase of a call; see `headforcing.attention.compile`."""
        self.activity.phase = self.adapter.phase(args, kwargs)

    def __reduce__(self) -> Any:
        return TellPhase, (self.adapter, self.activity)


class NewPrompt:
    """Before cross-attention: projects the prompt anew where self-attention just began a new one."""

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forgets the old prompt."""
        if torch.compiler.is_compiling():
            traced.between_graphs(self._forget, module, args, kwargs)
        else:
            self._forget(module, args, kwargs)

    def _forget(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.plan.activity.heard_prompt(self.plan.layer):
            self.plan.options.adapter.forget_prompt(module, args, kwargs)


def check_phases(roles: RoleMap, adapter: Adapter, model: nn.Module) -> None:
    """Looks whether the host makes known what roles ask for.

    Raises:
        UnsupportedModelError: a role depends on the phase, and nobody knows it.
    """
    asking = [role for role in roles.counts() if role.uses_phase]
    if asking and adapter.clock(model) is None:
        raise UnsupportedModelError(
            f"{asking[0]} sees other frames in the clean pass, but {adapter.name} cannot tell which pass of "
            f"{type(model).__name__} that is: use roles that do not, or define clock and phase"
        )


def hear_phases(model: nn.Module, roles: RoleMap, adapter: Adapter, activity: Activity) -> None:
    """Puts the hook in, where a role depends on the phase."""
    clock = adapter.clock(model)
    if clock is not None and any(role.uses_phase for role in roles.counts()):
        activity.hears_phases = True
        clock.register_forward_pre_hook(TellPhase(adapter, activity), with_kwargs=True)


def hear_prompts(model: nn.Module, plans: Sequence[LayerPlan]) -> None:
    """Puts the hooks in, unless they are there.

    Raises:
        UnsupportedModelError: the adapter does not say where the prompt is projected.
        StreamError: it names more or fewer modules than there are layers.
    """
    crosses = plans[0].options.adapter.cross_attentions(model)
    if len(crosses) not in (0, len(plans)):
        raise StreamError(
            f"{plans[0].options.adapter.name} names {len(crosses)} cross-attentions for {len(plans)} layers: "
            "expected one each, or none"
        )
    plans[0].activity.hears_prompts = True  # a compiled model looks at this, but not at hooks
    for plan, cross in zip(plans, crosses, strict=False):
        if not any(isinstance(hook, NewPrompt) for hook in cross._forward_pre_hooks.values()):
            cross.register_forward_pre_hook(NewPrompt(plan), with_kwargs=True)


def remove_hooks(model: nn.Module, activity: Activity) -> None:
    """Takes out the hooks of one application."""
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if _activity(hook) is activity:
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


def _activity(hook: Any) -> Activity | None:
    if isinstance(hook, NewPrompt):
        return hook.plan.activity
    return hook.activity if isinstance(hook, TellPhase) else None
