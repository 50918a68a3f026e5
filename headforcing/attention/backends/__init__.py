"""Backends: softmax attention of heads that attend to different numbers of keys.

A backend is one file in this folder with two names: the function `attend(parts, num_heads)`, and
`REQUIREMENTS`, checked before its kernel runs. It knows no roles, frames or stores, only tensors.
"""

from __future__ import annotations

from typing import cast

from headforcing.attention.part import Attend, Part
from headforcing.attention.requirements import Requirements
from headforcing.errors import OptionError, named_module

__all__ = ["Attend", "Part", "find_backend", "requirements_of"]


def find_backend(name: str) -> Attend:
    """The `attend` of the module `headforcing.attention.backends.<name>`.

    Raises:
        OptionError: there is no such module, and the message lists the folder; or what it calls is not
            installed here.
    """
    missing = requirements_of(name).missing()
    if missing is not None:
        raise OptionError(f"backend {name!r} is not possible here: {missing}")
    return cast(Attend, named_module(__name__, name).attend)


def requirements_of(name: str) -> Requirements:
    """The requirements of the backend of this name.

    Raises:
        OptionError: there is no such backend; the message lists the folder.
    """
    return cast(Requirements, named_module(__name__, name).REQUIREMENTS)
