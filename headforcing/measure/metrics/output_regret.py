"""How much the output of a head changes if it attends only to what a role would store.

Ours. Every candidate role has a store of its own with the same keys and values, so that it stores, positions
and rotates exactly the frames it would after `apply_head_forcing`. The measure is local: it ignores the
effect on later layers. It takes the most memory of all metrics: while it is measured, every candidate has a
store of full size.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headforcing.attention.backends import Part
from headforcing.attention.backends.sdpa import attend
from headforcing.attention.observation import Observation
from headforcing.errors import OptionError, ProfileError
from headforcing.measure.metrics import Look, Metric
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow
from headforcing.roles.maps.file import encode_role
from headforcing.stores import KVStore, store_class
from headforcing.types import Chunk, Heads


def candidates(window: int, chunk: int) -> tuple[HeadRole, ...]:
    """Candidate roles, cheapest first; the last stores as much as the window allows. Our choice."""
    room = window - chunk
    wanted: list[HeadRole] = [Local(0), Anchor(1), Local(1), Local(chunk), Anchor(chunk, chunk)]
    wanted += [Memory(chunk, kept - 2 * chunk, chunk) for kept in (room // 2, room) if kept > 2 * chunk]
    if room <= 2 * chunk:
        wanted.append(SlidingWindow(window, positions="compact"))
    return tuple(role for role in dict.fromkeys(wanted) if (role.capacity(chunk) or 0) <= room)


class OutputRegret(Metric):
    """`mean` and `p95` over the queries, `[B, H, R]`, of `|out of the role - out| / rms |out|`.

    The reference is the output of the head with `Protocol.history`: inside the trained range, the model as it
    was trained. Past it, the reference has evicted frames that a role with episodic frames still stores, so a
    difference is not always a loss.

    Args:
        roles: candidates, `R` of them; default: `candidates(window, chunk)`.
    """

    name = "output_regret"

    def __init__(self, roles: Sequence[HeadRole] = ()) -> None:
        self.roles, self._window = tuple(roles), 0
        self._shadows: MutableMapping[object, _Shadow] = weakref.WeakKeyDictionary()

    def settings(self) -> dict[str, Any]:
        """See `Metric.settings`."""
        return {"roles": [encode_role(role) for role in self.roles]}

    def begin(self, window: int, chunk: int) -> None:
        """See `Metric.begin`."""
        self.roles = tuple(role.fit(window, chunk) for role in self.roles or candidates(window, chunk))
        if any("query" in role.depends_on for role in self.roles):
            raise OptionError(
                "output_regret does not support roles that differ per query frame: leave them out"
            )
        self._window = window

    def watch(self, seen: Observation) -> None:
        """See `Metric.watch`.

        Raises:
            ProfileError: the base model edits its cache, which candidates cannot follow.
        """
        if seen.edited:
            raise ProfileError(
                f"output_regret: before frame {seen.call.start} the base model edited its cache or "
                "recomputed frames (a new prompt, a new shot): measure videos with one prompt, or leave "
                "this metric out"
            )
        if seen.timeline not in self._shadows:
            self._shadows[seen.timeline] = _Shadow(self.roles, seen, self._window)
        self._shadows[seen.timeline].follow(seen.chunk)

    def measure(self, look: Look) -> Mapping[str, Tensor]:
        """See `Metric.measure`.

        Raises:
            ProfileError: the frames have different numbers of keys.
        """
        if not look.even:
            raise ProfileError(
                f"output_regret: the {len(look.frames)} frames before and in the chunk at frame {look.start} "
                f"have {look.sizes} keys of {look.seen.parts[0].k.shape[1]}, expected one key per patch of "
                "the chunk and no others: leave this metric out, or choose other chunks, Protocol(starts=...)"
            )
        out = look.pick(look.seen.out).float()  # [B, Q, H, D]
        scale = out.square().sum(-1).mean(1).sqrt().clamp_min(torch.finfo(out.dtype).tiny)  # [B, H]
        restricted = torch.stack(self._shadows[look.seen.timeline].outputs(look)).float()
        error = (restricted - out).norm(dim=-1) / scale[:, None]  # [R, B, Q, H]
        found = {"mean": error.mean(2), "p95": _p95(error)}
        return {name: value.movedim(0, -1) for name, value in found.items()}


class _Shadow:
    """The stores of all candidate roles for one layer on one timeline."""

    def __init__(self, roles: Sequence[HeadRole], seen: Observation, window: int) -> None:
        count = seen.q.shape[3]
        self._every = Heads(range(count), count)
        kind = store_class("ring")
        self._stores: dict[HeadRole, KVStore] = {
            role: kind({role: self._every}, window=window, layer=seen.layer) for role in roles
        }
        self._last: Chunk | None = None

    def follow(self, chunk: Chunk) -> None:
        """Records a pass; the stores get what the last pass over a chunk wrote."""
        if self._last is not None and self._last.start != chunk.start:
            self._write(self._last)
        self._last = chunk

    def outputs(self, look: Look) -> list[Tensor]:
        """The outputs of the heads with every role, `[B, Q, H, D]` each."""
        assert self._last is not None
        self._write(self._last)
        seen, found = look.seen, []
        part, same = seen.parts[0], (seen.frames[0], seen.positions[0])
        queries = {seen.positions[0][-look.chunk :]: part.q}  # by position: roles share them
        for role, store in self._stores.items():
            view = store.view(role, seen.call.phase, seen.encode)
            if (view.frames, view.positions) == same and None not in view.frames:
                found.append(look.pick(seen.out))
                continue
            own = view.positions[-look.chunk :]
            if own not in queries:
                queries[own] = seen.encode(seen.q, own).to(view.v.dtype).flatten(1, 2)
            sides = look.pick(queries[own]), view.k.flatten(1, 2), view.v.flatten(1, 2)
            found.append(attend([Part(self._every, *sides)], len(self._every)))
        return found

    def _write(self, chunk: Chunk) -> None:
        for store in self._stores.values():
            store.write(chunk)


def _p95(error: Tensor) -> Tensor:
    """The smallest error that at least 95 % of the queries do not exceed, `[R, B, Q, H] -> [R, B, H]`."""
    rank = -(-95 * error.shape[2] // 100)
    return error.kthvalue(rank, dim=2).values


METRIC = OutputRegret
