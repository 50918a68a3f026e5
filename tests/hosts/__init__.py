"""The hosts on which the adapters sit the conformance kit, one module each, named like the adapter's."""

from __future__ import annotations

from headforcing.errors import module_names, named_module
from headforcing.testing.host import Host

SHARED = ("rig", "standin")
"""What several hosts are built from."""


def host_names() -> tuple[str, ...]:
    """Adapters that have a host here."""
    return tuple(name for name in module_names(__name__) if name not in SHARED)


def find_host(name: str) -> Host:
    """The host of the adapter `name`.

    Raises:
        OptionError: there is none; the message lists those there are.
    """
    module = named_module(__name__, name)
    kinds = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Host))
    return next(kind for kind in kinds if kind.__module__ == module.__name__)()
