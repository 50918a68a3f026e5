"""Sizes and bytes as commands take and show them."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from typing import Any

from headforcing.errors import OptionError
from headforcing.measure.sizes import ITEMSIZES, MODELS, ModelSize

AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?((?:[kKMGT]i?)?B)?", re.ASCII)
POWERS = " kMGT"


def model_size(options: Any) -> ModelSize:
    """The sizes of a known model, with given ones replacing its own.

    Raises:
        OptionError: there is no such model or dtype, or a number is less than 1.
    """
    if options.model not in MODELS:
        raise OptionError(f"unknown model {options.model!r}: expected one of {', '.join(MODELS)}")
    names = ("layers", "heads", "head_dim", "window", "chunk")
    asked = {name: getattr(options, name, None) for name in names}
    given = {name: number for name, number in asked.items() if number is not None}
    if options.dtype is not None:
        given["itemsize"] = itemsize(options.dtype)
    if options.grid is not None:
        given["grid"] = parse_grid(options.grid)
    return dataclasses.replace(MODELS[options.model], **given)


def parse_grid(text: str) -> tuple[int, int]:
    """Height and width in patches.

    Raises:
        OptionError: it is no HEIGHTxWIDTH.
    """
    if (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)) is None:
        raise OptionError(f"grid is {text!r}: expected HEIGHTxWIDTH in patches of a frame, as in 30x52")
    return int(found[1]), int(found[2])


def itemsize(dtype: str) -> int:
    """Bytes of one number.

    Raises:
        OptionError: there is no such dtype.
    """
    if dtype not in ITEMSIZES:
        raise OptionError(f"unknown dtype {dtype!r}: expected one of {', '.join(ITEMSIZES)}")
    return ITEMSIZES[dtype]


def in_units(count: float) -> str:
    """Bytes in readable units, in powers of 1024."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    digits = 0 if units[0] == "B" or count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {units[0]}"


def parse_bytes(text: str, option: str) -> int:
    """An amount such as `2GB`, `1.5 GiB` or `4096`; without an `i` in thousands, rounded down.

    Raises:
        OptionError: it is no such amount.
    """
    match = AMOUNT.fullmatch(text.strip())
    if match is None:
        raise OptionError(f"{option} is {text!r}: expected an amount such as 2GB, 1.5GiB or 4096")
    unit = match[2] or "B"
    power = 0 if unit == "B" else POWERS.index(unit[0].replace("K", "k"))
    return int(Fraction(match[1]) * (1024 if "i" in unit else 1000) ** power)
