"""The timeline that the user names, for hosts whose calls carry no cache object."""

from __future__ import annotations

from contextvars import ContextVar


class Timeline:
    """The anchor of a stream that the user opened."""

    def __init__(self, name: str) -> None:
        self.name = name


open_stream: ContextVar[Timeline | None] = ContextVar("headforcing_stream", default=None)
"""The stream opened by `handle.stream()` in this thread or task."""
