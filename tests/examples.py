"""How many examples a property gets, in proportion to the Hypothesis profile in force (tests/conftest.py)."""

from __future__ import annotations

from hypothesis import settings

CI = 100
"""Examples of a property that names no number in `make test`."""


def examples(count: int, nightly: int = 0) -> int:
    """`count` in `make test`, ten times as many (at least `nightly`) in `make test-all`, a fifth in `dev`."""
    full = settings.default.max_examples
    return max(1, count * full // CI, nightly if full > CI else 0)
