"""Head Forcing: every attention head of an AR video diffusion model gets the memory that fits its role.

    >>> import headforcing as hf
    >>> from headforcing.demo import demo_model, demo_roles
    >>> handle = hf.apply_head_forcing(demo_model(), demo_roles())
    >>> handle.remove()

An independent implementation of Head Forcing (arXiv:2605.14487). Names are imported when they are first
used, so that `headforcing --help` does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from headforcing.errors import HeadForcingError

if TYPE_CHECKING:
    from headforcing.adapters.base import Adapter
    from headforcing.apply import apply_head_forcing, remove_head_forcing
    from headforcing.apply.explain import explain
    from headforcing.apply.handle import HeadForcing
    from headforcing.measure.profile import HeadProfile
    from headforcing.measure.profiler import Protocol, profile_heads
    from headforcing.measure.verify import verify
    from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
    from headforcing.roles.maps.role_map import RoleMap
    from headforcing.stores import KVStore

__version__ = version("headforcing")

if not Path(__file__).with_name("integrations").joinpath("__init__.py").exists():
    __path__.append(str(Path(__file__).parents[1]))  # a clone: the adapters are in its folder integrations/

__all__ = [
    "Adapter",
    "Anchor",
    "Full",
    "HeadForcing",
    "HeadForcingError",
    "HeadProfile",
    "HeadRole",
    "KVStore",
    "Local",
    "Memory",
    "Protocol",
    "RoleMap",
    "SlidingWindow",
    "apply_head_forcing",
    "explain",
    "profile_heads",
    "remove_head_forcing",
    "verify",
]

_HOME = {
    "Adapter": "adapters.base",
    "HeadForcing": "apply.handle",
    "HeadProfile": "measure.profile",
    "KVStore": "stores",
    "Protocol": "measure.profiler",
    "RoleMap": "roles.maps.role_map",
    "apply_head_forcing": "apply",
    "explain": "apply.explain",
    "profile_heads": "measure.profiler",
    "remove_head_forcing": "apply",
    "verify": "measure.verify",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'roles')}"), name)
