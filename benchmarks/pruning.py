"""What the past is worth to all heads of one role together: the error of the model when it is cut.

Like the pruning table of Head Forcing (arXiv:2605.14487, p. 7), on the demo model. The videos are others
than those that decided the roles.
"""

from __future__ import annotations

from typing import Any

from demo_training.ablated import HeldOut

from headforcing.apply import apply_head_forcing
from headforcing.demo.model.model import DemoModel
from headforcing.demo.world.camera import CHUNK
from headforcing.roles import Anchor, HeadRole, Local, SlidingWindow
from headforcing.roles.maps.role_map import RoleMap

VIDEOS = 48
SEED = 3700

CUTS: dict[str, HeadRole] = {
    "all history": Local(0),
    "all but the first frame": Anchor(1),
    "all but the last chunk": Local(CHUNK),
    "all but the first and the last chunk": Anchor(CHUNK, CHUNK),
    "the first chunk": Local(15),
}
"""What is taken away, and the role that is left."""


def pruning_table(model: DemoModel, roles: RoleMap) -> dict[str, Any]:
    """Relative increase of the error when all heads of one kind of role lose a part of their past.

    Returns:
        `{cut: {kind: [increase on seen columns, increase on returning columns]}}`, in percent.
    """
    held_out = HeldOut(model, VIDEOS, SEED)
    kinds = list(dict.fromkeys(kind_of(role) for role in roles.counts()))
    everything = SlidingWindow(model.config.window, positions="absolute")

    def errors(kind: str | None, left: HeadRole) -> list[float]:
        table = [[left if kind_of(role) == kind else everything for role in row] for row in roles.layers]
        with apply_head_forcing(model, table):
            found = held_out.errors()
        return [float(found[name].nanmean()) for name in ("seen", "returning")]

    whole = errors(None, everything)
    return {
        cut: {
            kind: [round(100 * (x / y - 1), 2) for x, y in zip(errors(kind, left), whole, strict=True)]
            for kind in kinds
        }
        for cut, left in CUTS.items()
    }


def kind_of(role: HeadRole) -> str:
    """`local`, `anchor`, `memory`."""
    return type(role).__name__.lower()
