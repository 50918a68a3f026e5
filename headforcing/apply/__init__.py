"""Taking head forcing into a model and out again without a trace."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from headforcing.adapters.base import Adapter, find_adapter
from headforcing.adapters.looks import check_module
from headforcing.apply.handle import HeadForcing
from headforcing.apply.handles import handles_of, remove_all
from headforcing.apply.hooks import check_phases
from headforcing.apply.install import install
from headforcing.apply.sites import check_single, sites_of
from headforcing.apply.unverified import warn_unverified
from headforcing.attention.backends import Attend, find_backend
from headforcing.attention.layer_state import Options
from headforcing.attention.read_facts import NAMES, ReadFacts
from headforcing.attention.skipped import check_runs
from headforcing.errors import (
    AlreadyAppliedError,
    ForeignRolesWarning,
    OptionError,
    RoleMapError,
    RoleMapMismatchError,
    UnsupportedModelError,
)
from headforcing.roles import HeadRole
from headforcing.roles.maps.fingerprint import fingerprint, is_half, unreadable
from headforcing.roles.maps.origin import ModelFacts
from headforcing.roles.maps.presets import PRESETS
from headforcing.roles.maps.role_map import RoleMap
from headforcing.stores import KVStore, store_class

Roles = RoleMap | HeadRole | Sequence[Sequence[HeadRole]] | str | Path
"""What may stand for roles: a map, one role for all heads, a table, a preset name, a file, or `OWN`."""
OWN = "own"
"""What the base model remembers by itself."""


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
    strict: bool = False,
) -> HeadForcing:
    """Gives every attention head of a model the memory that fits its role.

    Everything is checked before anything is changed: a call that fails leaves the model untouched.
    No cache is allocated until the model runs.

    Roles belong to weights. A role map or file that says on which it was measured is compared with the
    model: by the fingerprint of the attention weights, and by the window. What differs, or cannot be
    read, is a `ForeignRolesWarning`, or an error with `strict`. A map that says nothing is applied
    silently; presets, single roles and tables are measured on no weights and are never foreign.

    Args:
        model: an AR video diffusion model, or a module that holds one (wrapper, PEFT, compiled).
        roles: a `RoleMap`, one role for all heads, a table `roles[layer][head]`, a preset name, the path of
            a role-map file, or `"own"`: what the model remembers by itself, which changes nothing.
        adapter: the model's adapter; default: the one that fits.
        window: frames the model was trained on; default: what the model says.
        chunk: frames of the longest chunk; default: what the model says.
        store: where keys and values live, by name or class.
        backend: how attention is computed, by name (`sdpa`, `varlen`, `flash`, or `auto`, which chooses
            by device, dtype and head dim) or function. One that cannot attend raises; none is
            taken instead.
        replace: swap the roles of a model that is applied already, dropping what it remembers.
        strict: refuse a role map or file unless it was measured on exactly these weights.

    Returns:
        The handle. Applying the same roles again returns the same handle.

    Raises:
        UnsupportedModelError: no adapter fits, or the model does not say a number that is needed.
        RoleMapError: the roles are malformed, do not fit the model, or, with `strict`, are not known to
            be measured on it.
        WindowError: a role requires more frames than the model was trained on.
        AlreadyAppliedError: other roles are applied, and `replace` is false.
        PatchedModuleError: something else has replaced `forward` on an attention module, or a cache may skip
            attention.
        OptionError: an option has a value that does not exist, or the backend calls what is not installed.
        NonFiniteKVError: with `replace`, the video so far holds NaN or infinity that was not reported: called
            again, it goes on.
    """
    check_module(model)
    adapter = find_adapter(model) if adapter is None else _adapter(adapter)
    check_single(sites_of(model, [module for _, module in adapter.attentions(model)]))
    layers, heads, head_dim = _shape(model, adapter)
    given = {"window": window, "chunk": chunk}
    facts = ReadFacts(model, adapter, [name for name in NAMES if given.get(name) is None])
    window = _count(facts.values.get("window", window), "window")
    chunk = _count(facts.values.get("chunk", chunk), "chunk")
    if isinstance(roles, str) and roles == OWN:
        roles = [[role] * heads for role in adapter.own_memory(model)]
    facts.fitted = partial(_fitted, _loaded(roles, layers, heads), adapter, layers, heads, window)
    role_map = facts.fitted(chunk)
    _check_merging(role_map, adapter)
    check_phases(role_map, adapter, model)
    check_runs(model.named_modules())
    options = Options(role_map, window, adapter, _store(store), _attend(backend))
    if not _is_unmeasured(roles) and (
        foreign := _foreign(role_map, model, adapter, window, head_dim, strict)
    ):
        if strict:
            raise RoleMapMismatchError(foreign)
        warnings.warn(foreign, ForeignRolesWarning, stacklevel=2)
    warn_unverified(model, adapter)
    present = handles_of(model)
    if len(present) == 1 and present[0].options == options:
        present[0]._layers[0].activity.facts = facts  # what was read may differ where the roles do not
        return present[0]
    if present and not replace:
        raise AlreadyAppliedError(
            "the model carries head forcing already, with other roles or options: remove it first, or "
            "pass replace=True"
        )
    return install(model, options, facts, present)


def remove_head_forcing(model: nn.Module) -> None:
    """Takes head forcing out of a model and its parts, also of a copy that has no handle; idempotent.

    Raises:
        UnsupportedModelError: `model` is not a module.
        StreamActiveError: a call of the model is running.
        PatchedModuleError: a hook added after apply still wraps one of our modules.
        NonFiniteKVError: a video ended with NaN or infinity that was not reported; all is removed.
    """
    check_module(model)
    remove_all(handles_of(model))


def _check_merging(role_map: RoleMap, adapter: Adapter) -> None:
    """Merged patches are rotated by the adapter, which may be older than they are."""
    found = [role.compressed() for role in role_map.counts()]
    merging = any(history is not None and history.patch > 1 for history in found)
    if merging and "patch" not in inspect.signature(adapter.rotate).parameters:
        raise UnsupportedModelError(
            f"{adapter.name}: its rotate() takes no patch, which roles that merge patches need: add it"
        )


def _adapter(adapter: Any) -> Adapter:
    if not isinstance(adapter, Adapter):
        raise OptionError(f"adapter is {adapter!r}: expected an instance of a subclass of Adapter")
    return adapter


def _count(value: Any, what: str) -> int:
    if type(value) is not int or value < 1:
        raise OptionError(f"{what} is {value!r}: expected a number of frames, at least 1")
    return value


def _store(store: Any) -> type[KVStore]:
    if isinstance(store, str):
        return store_class(store)
    if not (isinstance(store, type) and issubclass(store, KVStore)):
        raise OptionError(f"store is {store!r}: expected a name or a subclass of KVStore")
    return store


def _attend(backend: Any) -> Attend:
    if isinstance(backend, str):
        return find_backend(backend)
    if not callable(backend):
        raise OptionError(f"backend is {backend!r}: expected a name or a function like sdpa.attend")
    attend: Attend = backend
    return attend


def _is_unmeasured(roles: Roles) -> bool:
    """Whether the roles were chosen, not measured: a preset, one role for all heads, a table."""
    return not isinstance(roles, RoleMap | str | Path) or (isinstance(roles, str) and roles in PRESETS)


def _foreign(
    role_map: RoleMap, model: nn.Module, adapter: Adapter, window: int, head_dim: int, strict: bool
) -> str | None:
    """What tells against the roles having been measured on this model; without `strict`, only if known.

    Raises:
        RoleMapMismatchError: they were measured on heads of another size.
    """
    facts = role_map.origin.model
    if strict and (facts is None or facts.fingerprint is None):
        return (
            "strict: the role map does not say on which weights it was measured (no "
            "origin.model.fingerprint): profile this model, or apply without strict"
        )
    if facts is None:
        return None
    measured = f"the roles were measured on {_described(facts)}"
    if facts.head_dim != head_dim:
        raise RoleMapMismatchError(
            f"{measured} with {facts.head_dim} channels per head, the model has {head_dim}: use a map "
            "measured on this model"
        )
    differs = []
    if facts.window != window:
        differs.append(f"its window was {facts.window} frames, here it is {window}")
    if facts.fingerprint is not None:
        actual = fingerprint(model, adapter)
        if actual is None:
            kind = unreadable(model, adapter)
            differs.append(f"whether these are its weights cannot be checked, some of them are {kind}")
        elif actual != facts.fingerprint:
            differs.append(
                f"its attention weights have the fingerprint {_short(facts.fingerprint)}, those of this "
                f"{type(model).__name__} {_short(actual)}"
                + " (some are float16, which alone may be the difference)"
                * is_half(model, adapter)
            )
    if not differs:
        return None
    return f"{measured}: {'; '.join(differs)}. Profile this model again, or know that its heads may differ"


def _described(facts: ModelFacts) -> str:
    return facts.model_class if facts.base_model is None else f"{facts.base_model} ({facts.model_class})"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _shape(model: nn.Module, adapter: Adapter) -> tuple[int, int, int]:
    """Attention layers, heads per layer and head dim."""
    shapes = [adapter.heads(module) for _, module in adapter.attentions(model)]
    if not shapes:
        raise UnsupportedModelError(f"{adapter.name}: {adapter.why_not(model)}")
    if len(set(shapes)) > 1:
        raise UnsupportedModelError(
            f"attention layers differ in (heads, head dim): {sorted(set(shapes))}; expected one shape"
        )
    return len(shapes), *shapes[0]


def _fitted(
    roles: RoleMap | str, adapter: Adapter, layers: int, heads: int, window: int, chunk: int
) -> RoleMap:
    """A map, or a preset by name, with the numbers that fit the model."""
    if isinstance(roles, str):
        roles = PRESETS[roles].uniform(layers, heads, window, adapter.step(chunk))
    return roles.fit(layers, heads, window, chunk)


def _loaded(roles: Roles, layers: int, heads: int) -> RoleMap | str:
    """Whatever stands for roles, as a map; a preset stays its name."""
    if isinstance(roles, RoleMap) or (isinstance(roles, str) and roles in PRESETS):
        return roles
    if isinstance(roles, HeadRole):
        return RoleMap.uniform(roles, layers, heads)
    if isinstance(roles, str | Path):
        if Path(roles).suffix != ".json" and not Path(roles).exists():
            raise RoleMapError(
                f"{str(roles)!r} is neither a preset ({', '.join(sorted(PRESETS))}) nor a role-map file"
            )
        return RoleMap.load(roles)
    if isinstance(roles, Sequence) and all(isinstance(row, list | tuple) for row in roles):
        return RoleMap(tuple(tuple(row) for row in roles))  # type: ignore[arg-type]
    raise RoleMapError(
        f"roles is a {type(roles).__name__} ({roles!r:.60}): expected a RoleMap, a HeadRole, a table "
        "roles[layer][head], a preset name or the path of a role-map file"
    )
