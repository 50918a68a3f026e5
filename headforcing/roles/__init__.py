"""Roles, one family per file; a new file here is found by its folder."""

from headforcing.role import HeadRole
from headforcing.roles.head_forcing import Anchor, Local, Memory
from headforcing.roles.windows import Full, SlidingWindow

__all__ = ["Anchor", "Full", "HeadRole", "Local", "Memory", "SlidingWindow"]
