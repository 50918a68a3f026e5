"""Pictures of roles and profiles: `pip install 'headforcing[plot]'`.

Every function takes data and, if it draws one picture, an optional matplotlib `ax`; it returns the axes it
drew on and neither shows nor saves. Without `ax` it creates a figure, `result.figure`, that is not registered
with pyplot. Colours can be distinguished by colour-blind readers and belong to the name of a role.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headforcing.measure.plots.ages import mass_by_age
    from headforcing.measure.plots.drift import drift_curves, drift_panels
    from headforcing.measure.plots.frames import frames_kept
    from headforcing.measure.plots.grid import head_map
    from headforcing.measure.plots.shares import mass_scatter, roles_per_layer
    from headforcing.measure.plots.style import role_colours
    from headforcing.measure.plots.tradeoff import budget_curve

__all__ = [
    "budget_curve",
    "drift_curves",
    "drift_panels",
    "frames_kept",
    "head_map",
    "mass_by_age",
    "mass_scatter",
    "role_colours",
    "roles_per_layer",
]

_HOME = {
    "budget_curve": "tradeoff",
    "drift_curves": "drift",
    "drift_panels": "drift",
    "frames_kept": "frames",
    "head_map": "grid",
    "mass_by_age": "ages",
    "mass_scatter": "shares",
    "role_colours": "style",
    "roles_per_layer": "shares",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
