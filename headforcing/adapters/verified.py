"""Which attention code was compared with ours: forks keep a signature and change what is behind it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
from pathlib import Path
from typing import Any

from torch import nn


def digest(module: nn.Module) -> str | None:
    """Digest of the source of the class that defines a module's `forward`; `None`: its source is not there.

    Empty lines, comments on lines of their own and indentation do not count.
    """
    forward = inspect.unwrap(type(module).forward)
    defining = [
        cls
        for cls in type(module).__mro__
        if "forward" in vars(cls) and inspect.unwrap(vars(cls)["forward"]) is forward
    ]
    return _digest(defining[-1])


@functools.cache
def _digest(cls: Any) -> str | None:
    """Once per class: to find its source, Python parses the whole file."""
    try:
        lines = [line.strip() for line in inspect.getsource(cls).splitlines()]
    except (OSError, TypeError):
        return None
    kept = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(kept.encode()).hexdigest()[:16]


def recorded() -> set[str]:
    """The digests that `headforcing verify --record` noted on this machine."""
    path = record_file()
    return set(path.read_text("utf-8").split()) if path.exists() else set()


def record(digests: set[str]) -> Path:
    """Notes digests on this machine; returns the file."""
    path = record_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(sorted(recorded() | digests)) + "\n", "utf-8")
    return path


def record_file() -> Path:
    """Where digests are noted."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "headforcing" / "verified.txt"
