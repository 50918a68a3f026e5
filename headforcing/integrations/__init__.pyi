"""For type checkers in a clone, where the adapters lie in the top-level folder `integrations/`; not installed."""

from typing import Any

def __getattr__(name: str) -> Any: ...
