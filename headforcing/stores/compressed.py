"""The compressed histories of one store: what its roles keep of evicted frames, rotated once per chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from headforcing.errors import RoleError, StreamError, StreamShapeError
from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import CompressedHistory, Past, Tokens
from headforcing.stores.fork import fork
from headforcing.types import Chunk, Encode, FrameTable, Grid, Selection


class CompressedHistories:
    """See the module.

    Args:
        roles: roles of the store; those without a compressed history are left out.
        layer: number of the layer.

    Attributes:
        shared: what the compressed histories of all layers of one timeline share; set from outside.
    """

    def __init__(self, roles: Iterable[HeadRole], layer: int) -> None:
        self._histories = {role: history for role in roles if (history := role.compressed()) is not None}
        self._views: dict[tuple[HeadRole, int | None], Tokens | None] = {}
        self._layer = layer
        self.shared: MutableMapping[Any, Any] = {}

    def fork(self) -> CompressedHistories:
        """The same contents, to change in its place; what layers share stays shared."""
        histories = {role: fork(history) for role, history in self._histories.items()}
        return fork(self, _histories=histories, shared=self.shared)

    def get(self, role: HeadRole) -> CompressedHistory | None:
        """The compressed history of a role."""
        return self._histories.get(role)

    def gap(self, role: HeadRole) -> int:
        """RoPE positions that compressed tokens of a role take."""
        history = self.get(role)
        return 0 if history is None else history.gap

    @property
    def want_queries(self) -> bool:
        """Whether any of them selects tokens by queries."""
        return any(history.wants_queries for history in self._histories.values())

    def check(self, chunk: Chunk, before: Grid | None) -> None:
        """Refuses a chunk that cannot be compressed, before anything changes.

        Raises:
            StreamError: the base model moves it in time, and a role cannot follow.
            StreamShapeError: its grid does not fit, or it has no queries where a role selects by them.
        """
        for role, history in self._histories.items():
            if chunk.shift and role.positions == "absolute":
                raise StreamError(
                    f"layer {self._layer}: the base model moves a later shot in time, but {role} keeps parts "
                    "of frames where they were: give it positions='compact', or set its offset to 0"
                )
            history.check(chunk.grid)
            if before is not None and chunk.grid != before:
                raise StreamShapeError(
                    f"{role} keeps more than whole frames, but after frames of {before} patches come some of "
                    f"{chunk.grid}: start a new video, or use a role that keeps whole frames"
                )
            if history.wants_queries and chunk.q is None:
                raise StreamShapeError(f"{role} chooses by queries, but the chunk has none: give it q=...")

    def add(self, role: HeadRole, frames: range, chunk: Chunk) -> None:
        """Passes on the first `frames` of a role's part of a chunk, which are committed now."""
        done = slice(len(frames))
        q = None if chunk.q is None else chunk.q[:, done]
        k, v = chunk.k[:, done], chunk.v[:, done]
        self._histories[role].add(Past(frames, k, v, chunk.grid, self._layer, self._shared(role), q))

    def evicted(
        self,
        role: HeadRole,
        kept: Selection,
        table: FrameTable,
        fetch: Callable[[Sequence[int]], Tokens],
        grid: Grid | None,
    ) -> None:
        """Passes on the rows of the table that the role evicts.

        Raises:
            RoleError: the role chooses by content, so nobody knows which.
        """
        if role not in self._histories:
            return
        if kept.chosen is not None:
            raise RoleError(f"{role} chooses frames by content: it cannot have a compressed history")
        gone = [row for row in range(len(table)) if row not in {*kept.before, *kept.after}]
        if gone:
            frames = [table.frames[row] for row in gone]
            self._histories[role].evicted(Past(frames, *fetch(gone), grid, self._layer, self._shared(role)))

    def restart(
        self,
        role: HeadRole,
        frames: Sequence[int | None],
        fetch: Callable[[Sequence[int]], Tokens],
        grid: Grid | None,
    ) -> None:
        """Passes on the frames that a role keeps while time restarts, after `clear`."""
        if role in self._histories:
            kept = fetch(range(len(frames)))
            self._histories[role].restarted(Past(frames, *kept, grid, self._layer, self._shared(role)))

    def view(
        self, role: HeadRole, start: int, query: int | None, encode: Encode, put: Callable[[Tokens], Tokens]
    ) -> Tokens | None:
        """Compressed tokens of a role; rotated and put in place once per query, until `forget_views`."""
        if role not in self._histories:
            return None
        if (role, query) not in self._views:
            history, after = self._histories[role], fork(self._histories[role])
            tokens = after.view(start, query, encode)
            placed = None if tokens is None else put(tokens)
            vars(history).update(vars(after))  # first: after a fault here the view is made again
            self._views[role, query] = placed
        return self._views[role, query]

    def _shared(self, role: HeadRole) -> MutableMapping[str, Any]:
        shared: MutableMapping[str, Any] = self.shared.setdefault(role, {})
        return shared

    def forget_views(self) -> None:
        """Forgets rotated tokens, because frames come or go."""
        self._views.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._views.clear()
        for history in self._histories.values():
            history.clear()

    def tensors(self) -> Iterator[Tensor]:
        """What is stored, and what was rotated; each once."""
        stored = [tensor for history in self._histories.values() for tensor in history.tensors()]
        yield from stored
        for tokens in list(self._views.values()):  # another thread may add some
            yield from (x for x in tokens or () if not any(x is tensor for tensor in stored))
