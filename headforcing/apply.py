"""Taking head forcing into a model and out again without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from headforcing.adapter import Adapter, find_adapter
from headforcing.backends import Attend, find_backend
from headforcing.errors import AlreadyAppliedError, RoleMapError, UnsupportedModelError
from headforcing.handle import HeadForcing, handle_of, install
from headforcing.plan import Options
from headforcing.presets import PRESETS
from headforcing.role_map import RoleMap
from headforcing.roles import HeadRole
from headforcing.stores import KVStore, store_class

Roles = RoleMap | HeadRole | Sequence[Sequence[HeadRole]] | str | Path
"""What may stand for roles: a map, one role for all heads, a table, a preset name, a file."""


def apply_head_forcing(
    model: nn.Module,
    roles: Roles,
    *,
    adapter: Adapter | None = None,
    window: int | None = None,
    chunk: int | None = None,
    store: str | type[KVStore] = "ring",
    backend: str | Attend = "sdpa",
    replace: bool = False,
) -> HeadForcing:
    """Gives every attention head of a model the memory its role needs.

    Everything is checked before anything is changed: a call that fails leaves the model untouched.
    No cache is allocated until the model runs.

    Args:
        model: an AR video diffusion model, or a module that holds one (wrapper, PEFT, compiled).
        roles: a `RoleMap`, one role for all heads, a table `roles[layer][head]`, a preset name, or the
            path of a role-map file.
        adapter: the model's adapter; default: the one that fits.
        window: frames the model was trained on; default: what the model says.
        chunk: frames of the longest chunk; default: what the model says.
        store: where keys and values live, by name or class.
        backend: how attention is computed, by name or function.
        replace: swap the roles of a model that is applied already, dropping what it remembers.

    Returns:
        The handle. Applying the same roles again returns the same handle.

    Raises:
        UnsupportedModelError: no adapter fits, or the model does not say a number that is needed.
        RoleMapError: the roles are malformed or do not fit the model.
        WindowError: a role needs more frames than the model was trained on.
        AlreadyAppliedError: other roles are applied, and `replace` is false.
        PatchedModuleError: something else has replaced `forward` on an attention module.
    """
    adapter = adapter or find_adapter(model)
    layers, heads = _shape(model, adapter)
    window = adapter.window(model) if window is None else window
    chunk = adapter.chunk(model) if chunk is None else chunk
    options = Options(
        _role_map(roles, layers, heads, window, chunk).fit(layers, heads, window, chunk),
        window,
        adapter,
        store_class(store) if isinstance(store, str) else store,
        find_backend(backend) if isinstance(backend, str) else backend,
    )
    present = handle_of(model)
    if present is not None and present.options == options:
        return present
    if present is not None and not replace:
        raise AlreadyAppliedError(
            "the model carries head forcing already, with other roles or options: remove it first, or "
            "pass replace=True"
        )
    if present is not None:
        present.remove()
    return install(model, options)


def remove_head_forcing(model: nn.Module) -> None:
    """Takes head forcing out of a model, also out of a copy that has no handle; idempotent.

    Raises:
        StreamActiveError: a call of the model is running.
        PatchedModuleError: a hook added after apply still wraps one of our modules.
    """
    handle = handle_of(model)
    if handle is not None:
        handle.remove()


def _shape(model: nn.Module, adapter: Adapter) -> tuple[int, int]:
    """Attention layers and heads per layer."""
    shapes = [adapter.heads(module) for _, module in adapter.attentions(model)]
    if not shapes:
        raise UnsupportedModelError(f"{adapter.name}: {adapter.why_not(model)}")
    if len(set(shapes)) > 1:
        raise UnsupportedModelError(
            f"attention layers differ in (heads, head dim): {sorted(set(shapes))}; expected one shape"
        )
    return len(shapes), shapes[0][0]


def _role_map(roles: Roles, layers: int, heads: int, window: int, chunk: int) -> RoleMap:
    """Whatever stands for roles, as a map."""
    if isinstance(roles, RoleMap):
        return roles
    if isinstance(roles, HeadRole):
        return RoleMap.uniform(roles, layers, heads)
    if isinstance(roles, str) and roles in PRESETS:
        return PRESETS[roles](layers, heads, window, chunk)
    if isinstance(roles, str | Path):
        if Path(roles).suffix != ".json" and not Path(roles).exists():
            raise RoleMapError(
                f"{str(roles)!r} is neither a preset ({', '.join(sorted(PRESETS))}) nor a role-map file"
            )
        return RoleMap.load(roles)
    if isinstance(roles, Sequence):
        return RoleMap(tuple(tuple(row) for row in roles))  # type: ignore[arg-type]
    raise RoleMapError(
        f"roles is a {type(roles).__name__}: expected a RoleMap, a HeadRole, a table roles[layer][head], "
        "a preset name or the path of a role-map file"
    )
