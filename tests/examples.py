"""How many examples a property gets, in proportion to the Hypothesis profile in force (tests/conftest.py)."""

from __future__ import annotations

from hypothesis import settings

CI = 100
"""The unit of the counts in the tests; see tests/conftest.py."""


def examples(count: int, nightly: int = 0) -> int:
    """Four tenths of `count` in `make test`, ten times `count` (at least `nightly`) in `make test-all`."""
    full = settings.default.max_examples
    return max(1, count * full // CI, nightly if full > CI else 0)
