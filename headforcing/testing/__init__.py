"""Tools to test roles, stores, adapters and backends, for this library and for extensions of it."""

from __future__ import annotations

from headforcing.testing.backends import check_backend
from headforcing.testing.conformance import Report, Result, check_adapter, check_names
from headforcing.testing.host import Host
from headforcing.testing.snapshot import Snapshot, bits, snapshot

__all__ = [
    "Host",
    "Report",
    "Result",
    "Snapshot",
    "bits",
    "check_adapter",
    "check_backend",
    "check_names",
    "snapshot",
]
