"""Backends: one function each, `attend(parts, num_heads)`, for heads that see different lengths.

A backend is one file in this folder with two names: `attend`, and `NEEDS`, a table of what it cannot do
without. It knows no roles, frames or stores, only where tensors lie.
"""

from __future__ import annotations

from typing import cast

from headforcing.attention.needs import Needs
from headforcing.attention.part import Attend, Part
from headforcing.errors import OptionError, named_module

__all__ = ["Attend", "Part", "find_backend", "needs_of"]


def find_backend(name: str) -> Attend:
    """The `attend` of the module `headforcing.attention.backends.<name>`.

    Raises:
        OptionError: there is no such module, and the message lists the folder; or what it calls is not
            installed here.
    """
    missing = needs_of(name).missing()
    if missing is not None:
        raise OptionError(f"backend {name!r} is not possible here: {missing}")
    return cast(Attend, named_module(__name__, name).attend)


def needs_of(name: str) -> Needs:
    """What the backend of this name cannot do without.

    Raises:
        OptionError: there is no such backend; the message lists the folder.
    """
    return cast(Needs, named_module(__name__, name).NEEDS)
