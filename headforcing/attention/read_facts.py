"""What an adapter read of the model at apply, and whether it still says the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from headforcing.adapters.base import Adapter
from headforcing.errors import ModelChangedError
from headforcing.roles.maps.role_map import RoleMap

NAMES = ("window", "chunk", "heads")


class ReadFacts:
    """Numbers of a model that the roles in force were fitted to.

    Args:
        model: the model, held weakly.
        adapter: reads it.
        names: what it says itself, of `NAMES`; the rest was given by the user and may change.

    Attributes:
        values: the numbers, by name: frames of the window and of a chunk; number of heads and head dim
            that layers have.
        fitted: the roles with the numbers that they have for chunks of so many frames.
    """

    fitted: Callable[[int], RoleMap]

    def __init__(self, model: nn.Module, adapter: Adapter, names: Iterable[str]) -> None:
        self._model, self._adapter = weakref.ref(model), adapter
        self.values: dict[str, Any] = {name: self._read(model, name) for name in names}

    def _read(self, model: nn.Module, name: str) -> Any:
        if name == "heads":
            return sorted({self._adapter.heads(module) for _, module in self._adapter.attentions(model)})
        return self._adapter.window(model) if name == "window" else self._adapter.chunk(model)

    def check(self) -> None:
        """Checks that the model says what it said, or that the roles do not depend on it.

        Raises:
            ModelChangedError: it does not.
        """
        if (model := self._model()) is None:
            return
        for name, before in list(self.values.items()):
            now = self._read(model, name)
            if name == "chunk" and now != before and self.fitted(now) == self.fitted(before):
                self.values[name] = now
            elif now != before:
                raise ModelChangedError(
                    f"{name} of {type(model).__name__} was {before} at apply and is {now} now, which the "
                    "roles in force were not fitted to: apply again with replace=True, or set it back"
                )
