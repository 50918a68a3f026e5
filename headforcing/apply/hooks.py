"""Two hooks outside of the attention modules: one notes the phase of a pass, one has a new prompt projected.

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
from headforcing.attention.layer_state import LayerState
from headforcing.errors import StreamError, UnsupportedModelError
from headforcing.roles.base import reads_phase
from headforcing.roles.maps.role_map import RoleMap


class PhaseHook:
    """Before a pass of the model: notes whether it is a clean one."""

    def __init__(self, adapter: Adapter, activity: Activity) -> None:
        self.adapter, self.activity, self.key = adapter, activity, traced.number(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the phase of the pass that begins."""
        if not torch.compiler.is_compiling():
            self.serve(args, kwargs)
        elif traced.POSSIBLE and traced.fits([args, kwargs]):
            traced.note_phase(self.key, self.activity.order, args, kwargs)
        else:
            traced.serve_between_graphs(self, args, kwargs)

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the phase of a call; see `headforcing.attention.compile`."""
        self.activity.phase = self.adapter.phase(args, kwargs)

    def __reduce__(self) -> Any:
        return PhaseHook, (self.adapter, self.activity)


class PromptHook:
    """Before cross-attention: has it project the prompt anew, where a prompt switch just took effect."""

    def __init__(self, layer: LayerState) -> None:
        self.layer = layer

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Forgets the old prompt; a thread that is just putting the hook in may run it without `kwargs`."""
        if kwargs is None:
            return
        if torch.compiler.is_compiling():
            traced.serve_between_graphs(self, (module, *args), kwargs)
        else:
            self.serve((module, *args), kwargs)

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same, given the module and the arguments of its call."""
        if (store := self.layer.activity.new_prompt(self.layer.layer)) is not None:
            self.layer.options.adapter.forget_prompt(args[0], args[1:], kwargs)
            store.prompt_pending = False  # last, so that it is still to be done where this fails


def check_phases(roles: RoleMap, adapter: Adapter, model: nn.Module) -> None:
    """Checks that the base model makes known the phase that roles depend on.

    Raises:
        UnsupportedModelError: a role depends on the phase, and nobody knows it.
    """
    asking = [role for role in roles.counts() if reads_phase(role)]
    if asking and adapter.clock(model) is None:
        raise UnsupportedModelError(
            f"{asking[0]} sees other frames in the clean pass, but {adapter.name} cannot tell which pass of "
            f"{type(model).__name__} that is: use roles that do not, or define clock and phase"
        )


def add_phase_hook(model: nn.Module, roles: RoleMap, adapter: Adapter, activity: Activity) -> None:
    """Puts the hook in, where a role depends on the phase."""
    clock = adapter.clock(model)
    if clock is not None and any(map(reads_phase, roles.counts())):
        activity.phase_hook = True
        clock.register_forward_pre_hook(PhaseHook(adapter, activity), with_kwargs=True)


def add_prompt_hooks(model: nn.Module, layers: Sequence[LayerState]) -> None:
    """Puts the hooks in, unless they are there.

    Raises:
        UnsupportedModelError: the adapter does not say where the prompt is projected.
        StreamError: it names more or fewer modules than there are layers.
    """
    adapter, activity = layers[0].options.adapter, layers[0].activity
    crosses = adapter.cross_attentions(model)
    if len(crosses) not in (0, len(layers)):
        raise StreamError(
            f"{adapter.name} names {len(crosses)} cross-attentions for {len(layers)} layers: "
            "expected one each, or none"
        )
    activity.prompt_hooks = True  # a compiled model looks at this, but not at hooks
    for layer, cross in zip(layers, crosses, strict=False):
        if not any(isinstance(hook, PromptHook) for hook in cross._forward_pre_hooks.values()):
            cross.register_forward_pre_hook(PromptHook(layer), with_kwargs=True)


def remove_hooks(model: nn.Module, activity: Activity) -> None:
    """Takes out the hooks of one application."""
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if _activity(hook) is activity:
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


def _activity(hook: Any) -> Activity | None:
    if isinstance(hook, PromptHook):
        return hook.layer.activity
    return hook.activity if isinstance(hook, PhaseHook) else None
