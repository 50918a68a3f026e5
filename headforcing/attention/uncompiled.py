"""Calls that run outside of the graph when a model is compiled.

Only imported under a compiler: `torch.compiler.disable` loads all of `torch._dynamo`, which takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def serve(served: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Serves a call between two graphs."""
    return served.serve(args, kwargs)
