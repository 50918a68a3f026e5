"""The handles of a model, all together."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from headforcing.apply.handle import HeadForcing
from headforcing.apply.sites import sites_of
from headforcing.attention.activity import Activity
from headforcing.attention.module import HeadForcingMixin
from headforcing.stores.checks import check_ended


def handles_of(model: nn.Module) -> list[HeadForcing]:
    """The handles of what is applied to a model and its parts; made anew where they were dropped."""
    found = [module for module in model.modules() if isinstance(module, HeadForcingMixin)]
    by_application: dict[Activity, list[HeadForcingMixin]] = {}
    for module in found:
        by_application.setdefault(module._headforcing.activity, []).append(module)
    handles = []
    for modules in by_application.values():
        states = [module._headforcing for module in modules]
        handle = states[0].handle() if states[0].handle is not None else None
        if not isinstance(handle, HeadForcing):
            handle = HeadForcing(model, sites_of(model, modules), states)
        handles.append(handle)
    return handles


def check_videos(handles: Iterable[HeadForcing]) -> None:
    """Checks the videos that run, as far as it was not reported, before they end.

    Raises:
        NonFiniteKVError: one holds NaN or infinity; said once.
    """
    check_ended([checks for handle in handles for checks in handle.unreported()])


def remove_all(handles: Iterable[HeadForcing]) -> None:
    """Removes all of them; see `HeadForcing.remove`."""
    check_ended([checks for handle in handles for checks in handle.take_out()])
