"""Checks of removal: the base model's own cache, `remove()`, and freeing our memory with its caches."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from headforcing.roles import Local
from headforcing.testing.kit import Kit, Skipped, Take, held_bytes, same, tensors
from headforcing.testing.snapshot import Snapshot, bits, snapshot


def release_frees(kit: Kit) -> None:
    """The base model's caches shrink by the bytes that `release` reports, and tensors keep their shapes."""
    take = kit.forced()
    before, shapes = held_bytes(take.caches), _shapes(take)
    take.passes(0, (1, 0))
    assert take.handle is not None
    released = take.handle.status().released_bytes
    now = {path: shape for path, shape in _shapes(take).items() if path in shapes}
    assert now == shapes, "release() changed the shape of a cache tensor: pipelines read shapes"
    known = sum(leaf.untyped_storage().nbytes() for path, leaf in tensors(take) if path in shapes)
    apart = before - known - released
    slack = 64 * max(len(shapes), 1)
    assert abs(apart) <= slack, (
        f"release() reports {released} bytes, the base model's caches shrank by {before - known}"
    )
    if not released:
        raise Skipped("the adapter does not free the base model's own cache (release)")


def cache_comes_back(kit: Kit) -> None:
    """After `remove()` the base model's caches are as freshly allocated, and nothing was written to them."""
    take = kit.forced()
    fresh = {path: _facts(leaf) for path, leaf in tensors(take)}
    take.video(2 * kit.host.chunk)
    assert take.handle is not None
    if not take.handle.status().released_bytes:
        raise Skipped("the adapter does not free the base model's own cache (release)")
    take.handle.remove()
    now = {path: _facts(leaf) for path, leaf in tensors(take)}
    wrong = [path for path, facts in fresh.items() if now.get(path) != facts]
    assert not wrong, (
        f"after remove() the cache's {wrong[0]} is not as freshly allocated: give_back() must undo release()"
    )


def remove_leaves_no_trace(kit: Kit) -> None:
    """After `remove()` every object of the model is the original one, also in the middle of a video."""
    take, untouched = kit.plain(), kit.plain()
    before, unmoved = snapshot(take.model), snapshot(untouched.model)
    handle = kit.apply(take.model, Local())
    for each in (Take(kit, take.model, handle, take.caches), untouched):
        each.passes(0, (1, 0))
    handle.remove()
    handle.remove()
    own = _moved(
        unmoved, snapshot(untouched.model)
    )  # such as a prompt that the base model caches on its modules
    changed = _without(before, own).diff(_without(snapshot(take.model), own))
    assert not changed, f"remove() left a trace: {changed[0]}"


def host_works_after_remove(kit: Kit) -> None:
    """After `remove()` the model generates its original video again, bit for bit, on the same caches."""
    take = kit.forced(Local())
    take.video(kit.host.dense, 20)
    assert take.handle is not None
    take.handle.remove()
    kit.host.new_video(take.model, take.caches)
    take.handle = None
    hint = "after remove() and a new video on the same caches: check give_back()"
    same(take.video(kit.host.frames), kit.truth(kit.host.frames), hint)


def dropped_cache_is_freed(kit: Kit) -> None:
    """When the pipeline drops its caches, our KV cache is freed too."""
    if not kit.anchored:
        raise Skipped("calls carry no cache object")
    take = kit.forced()
    take.passes(0, (1, 0))
    assert take.handle is not None
    take.caches = None
    gc.collect()
    alive = len(take.handle.status().streams)
    assert alive == 0, (
        "our KV cache outlives the base model's: the memo (or the adapter) holds a reference to the anchor"
    )


def _moved(before: Snapshot, after: Snapshot) -> set[str]:
    names = {*before.facts, *after.facts}
    return {name for name in names if before.facts.get(name) != after.facts.get(name)}


def _without(found: Snapshot, names: set[str]) -> Snapshot:
    return Snapshot({name: fact for name, fact in found.facts.items() if name not in names})


def _shapes(take: Take) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in tensors(take) if leaf.is_floating_point()}


def _facts(leaf: Tensor) -> tuple[Any, ...]:
    return tuple(leaf.shape), leaf.dtype, leaf.untyped_storage().nbytes(), bits(leaf)


CHECKS: Sequence[Any] = (
    release_frees,
    cache_comes_back,
    remove_leaves_no_trace,
    host_works_after_remove,
    dropped_cache_is_freed,
)
