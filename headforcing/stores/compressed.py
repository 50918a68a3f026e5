"""The digests of one store, and what their heads see of them, rotated once per chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from headforcing.errors import RoleError, StreamError, StreamShapeError
from headforcing.roles.base import HeadRole
from headforcing.roles.compressed import CompressedHistory, Past, Tokens
from headforcing.types import Chunk, Encode, FrameTable, Grid, Selection


class Digests:
    """See the module.

    Args:
        roles: roles of the store; those without a digest are left out.
        layer: number of the layer.

    Attributes:
        notes: what the digests of all layers of one timeline share; set by who knows the timeline.
    """

    def __init__(self, roles: Iterable[HeadRole], layer: int) -> None:
        self._digests = {role: digest for role in roles if (digest := role.compressed()) is not None}
        self._seen: dict[tuple[HeadRole, int | None], Tokens | None] = {}
        self._layer = layer
        self.notes: MutableMapping[Any, Any] = {}

    def get(self, role: HeadRole) -> CompressedHistory | None:
        """The digest of a role."""
        return self._digests.get(role)

    @property
    def want_queries(self) -> bool:
        """Whether any of them chooses by queries."""
        return any(digest.wants_queries for digest in self._digests.values())

    def check(self, chunk: Chunk, before: Grid | None) -> None:
        """Refuses a chunk that cannot be digested, before anything changes.

        Raises:
            StreamError: the host moves it in time, and a role cannot follow.
            StreamShapeError: its grid does not go, or it has no queries where a role chooses by them.
        """
        for role, digest in self._digests.items():
            if chunk.shift and role.positions == "absolute":
                raise StreamError(
                    f"layer {self._layer}: the host moves a later shot in time, but {role} keeps parts of "
                    "frames where they were: give it positions='compact', or set the host's offset to 0"
                )
            digest.check(chunk.grid)
            if before is not None and chunk.grid != before:
                raise StreamShapeError(
                    f"{role} keeps more than whole frames, but after frames of {before} patches come some of "
                    f"{chunk.grid}: start a new video, or use a role that keeps whole frames"
                )
            if digest.wants_queries and chunk.q is None:
                raise StreamShapeError(f"{role} chooses by queries, but the chunk has none: give it q=...")

    def add(self, role: HeadRole, frames: range, chunk: Chunk) -> None:
        """Shows a role's digest the first `frames` of its part of a chunk, which are committed now."""
        done = slice(len(frames))
        q = None if chunk.q is None else chunk.q[:, done]
        k, v = chunk.k[:, done], chunk.v[:, done]
        self._digests[role].add(Past(frames, k, v, chunk.grid, self._layer, self._notes(role), q))

    def evicted(
        self,
        role: HeadRole,
        kept: Selection,
        table: FrameTable,
        fetch: Callable[[Sequence[int]], Tokens],
        grid: Grid | None,
    ) -> None:
        """Shows a role's digest the rows of the table that the role drops.

        Raises:
            RoleError: the role chooses by content, so nobody knows which.
        """
        if role not in self._digests:
            return
        if kept.chosen is not None:
            raise RoleError(f"{role} chooses frames by content: it cannot have a digest")
        gone = [row for row in range(len(table)) if row not in {*kept.before, *kept.after}]
        if gone:
            frames = [table.frames[row] for row in gone]
            self._digests[role].evicted(Past(frames, *fetch(gone), grid, self._layer, self._notes(role)))

    def see(
        self, role: HeadRole, start: int, query: int | None, encode: Encode, lay: Callable[[Tokens], Tokens]
    ) -> Tokens | None:
        """What the heads of a role see; rotated and laid in place once per query, until `refresh`."""
        if role not in self._digests:
            return None
        if (role, query) not in self._seen:
            tokens = self._digests[role].view(start, query, encode)
            self._seen[role, query] = None if tokens is None else lay(tokens)
        return self._seen[role, query]

    def _notes(self, role: HeadRole) -> MutableMapping[str, Any]:
        notes: MutableMapping[str, Any] = self.notes.setdefault(role, {})
        return notes

    def refresh(self) -> None:
        """Forgets what was rotated, because frames come or go."""
        self._seen.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._seen.clear()
        for digest in self._digests.values():
            digest.clear()

    def tensors(self) -> Iterator[Tensor]:
        """What is held, and what was rotated; each once."""
        held = [tensor for digest in self._digests.values() for tensor in digest.tensors()]
        yield from held
        for tokens in self._seen.values():
            yield from (x for x in tokens or () if not any(x is tensor for tensor in held))
