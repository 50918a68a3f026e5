"""For type checkers in a clone, whose adapters are in the top-level folder `integrations/`; not installed."""

from typing import Any

def __getattr__(name: str) -> Any: ...
