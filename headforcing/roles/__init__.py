"""Which frames a head keeps and attends to: one method per file, and a new file is found by its folder."""

from headforcing.roles.base import HeadRole
from headforcing.roles.deep_forcing import Participating
from headforcing.roles.dilated import Dilated
from headforcing.roles.forcing_kv import Dynamic
from headforcing.roles.head_forcing import Anchor, Local, Memory
from headforcing.roles.memrope import Averaging
from headforcing.roles.pyramid_forcing import Strided, Veil, Wave
from headforcing.roles.reward_forcing import EmaSink
from headforcing.roles.rolling_forcing import Rolling
from headforcing.roles.windows import Full, SlidingWindow

__all__ = [
    "Anchor",
    "Averaging",
    "Dilated",
    "Dynamic",
    "EmaSink",
    "Full",
    "HeadRole",
    "Local",
    "Memory",
    "Participating",
    "Rolling",
    "SlidingWindow",
    "Strided",
    "Veil",
    "Wave",
]
