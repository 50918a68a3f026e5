"""JSON without surprises: no duplicate keys, no NaN, no infinity, a size cap before anything is parsed.

No package for canonical JSON (RFC 8785): it writes numbers in another form, so every hash would change.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any


def parse(text: str | bytes, max_bytes: int) -> Any:
    """The value of a JSON document, UTF-8 without a byte order mark.

    Raises:
        ValueError: it is larger than `max_bytes`, or anything at all is wrong with it.
    """
    if len(text) > max_bytes:
        raise ValueError(f"larger than {max_bytes} bytes, which no such file requires")
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(
            decoded, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not strict JSON: {error}") from error


def canonical(value: Any) -> bytes:
    """The one form of a value that is hashed: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def pretty(value: Any) -> str:
    """A value as people read it, ending in a line break."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def digest(*parts: bytes) -> str:
    """`sha256:` and the hash of the parts, each preceded by its length."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return f"sha256:{found.hexdigest()}"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has one of its keys twice: {sorted(found)[:8]}")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits} is not finite")
    return value
