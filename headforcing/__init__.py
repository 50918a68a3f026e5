"""Head Forcing: every attention head of an AR video diffusion model gets the memory its role needs.

    >>> import headforcing as hf
    >>> from headforcing.demo import demo_model, demo_roles
    >>> handle = hf.apply_head_forcing(demo_model(), demo_roles())
    >>> handle.remove()

An independent implementation of Head Forcing (arXiv:2605.14487).
"""

from importlib.metadata import version

from headforcing.adapter import Adapter
from headforcing.apply import apply_head_forcing, remove_head_forcing
from headforcing.errors import HeadForcingError
from headforcing.handle import HeadForcing
from headforcing.role_map import RoleMap
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.stores import KVStore

__version__ = version("headforcing")

__all__ = [
    "Adapter",
    "Anchor",
    "Full",
    "HeadForcing",
    "HeadForcingError",
    "HeadRole",
    "KVStore",
    "Local",
    "Memory",
    "RoleMap",
    "SlidingWindow",
    "apply_head_forcing",
    "remove_head_forcing",
]
