"""`--set NAME=VALUE`, checked strictly against the keyword arguments of a classifier."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from headforcing.errors import OptionError

INTEGER = re.compile(r"[+-]?\d+")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
WORDS = {"true": True, "false": False, "none": None}

Value = str | int | float | bool | None


def parse_settings(pairs: Iterable[str], function: Callable[..., Any]) -> dict[str, Value]:
    """The settings as keyword arguments of `function`.

    Args:
        pairs: `NAME=VALUE` each.
        function: the function they are for; its keyword-only arguments with plain defaults are the settings.

    Raises:
        OptionError: a name is unknown or given twice, or its value has another type than its default.
    """
    known = known_settings(function)
    found: dict[str, Value] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not text:
            raise OptionError(f"--set {pair}: expected NAME=VALUE, as in {_example(known)}")
        if name not in known:
            listed = ", ".join(f"{key}={value}" for key, value in known.items()) or "none"
            raise OptionError(f"--set {pair}: no setting {name!r}; settings and defaults are: {listed}")
        if name in found:
            raise OptionError(f"--set {name} is given twice: leave one out")
        found[name] = _of_kind(pair, parse_value(text), known[name])
    return found


def known_settings(function: Callable[..., Any]) -> dict[str, Value]:
    """Names and defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and (p.default is None or isinstance(p.default, (str, int, float)))
    }


def parse_value(text: str) -> Value:
    """A whole number, a finite number, `true`, `false`, `none`, or else the word itself."""
    if INTEGER.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return WORDS.get(text.lower(), text)


def _of_kind(pair: str, value: Value, default: Value) -> Value:
    """The value with the type of the default; the only conversion is from whole number to number."""
    if default is None or type(value) is type(default):
        return value
    if type(default) is float and type(value) is int:
        return float(value)
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    raise OptionError(f"--set {pair}: expected {kinds[type(default)]}, like its default {default}")


def _example(known: dict[str, Value]) -> str:
    return next((f"{name}={value}" for name, value in known.items()), "NAME=0.5")
