"""Checks of what an adapter projects and how it rotates, against the host's own cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headforcing.testing.kit import Kit, Skipped
from headforcing.types import AttentionCall

FAR = 5000
"""A frame far past any table."""
ROUNDING = 1e-4
"""What differs by less, relative to the largest, is computed alike but for its precision."""


def project_shapes(kit: Kit) -> None:
    """`project` returns `[B, F, P, H, D]`, for one sample and for two."""
    for batch in (1, 2):
        for path, module, call in kit.calls(kit.plain(batch=batch), 0):
            expected = (batch, call.grid[0], call.tokens_per_frame, *kit.adapter.heads(module))
            for name, part in zip("qkv", kit.adapter.project(module, call), strict=True):
                shape = tuple(part.shape)
                assert shape == expected, f"{path}: project() returns {name} as {shape}, expected {expected}"


def values_are_the_hosts(kit: Kit) -> None:
    """`project` returns the values that the host caches, bit for bit."""
    for path, _, _, v, _, values in _beside_the_host(kit):
        assert torch.equal(v, values), (
            f"{path}: the third of project() is not what the host caches as values: if one layer projects "
            "all three, does it split heads first, or queries, keys and values?"
        )


def keys_are_the_hosts(kit: Kit) -> None:
    """`project` returns the keys that the host caches, but for the rotation, which keeps their length."""
    for path, _, k, _, keys, _ in _beside_the_host(kit):
        mine, theirs = k.float().norm(dim=-1), keys.float().norm(dim=-1)
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4), (
            f"{path}: keys of project() are not the host's, their lengths differ by up to "
            f"{float((mine - theirs).abs().max()):.3g}: are q and k or their norms "
            "swapped, or is a norm missing?"
        )


def rotation_is_the_hosts(kit: Kit) -> None:
    """`rotate` at the chunk's own frames gives the keys that the host caches, bit for bit."""
    for path, call, k, _, keys, _ in _beside_the_host(kit):
        turned = kit.adapter.rotate(k, call, range(call.start, call.start + call.grid[0]))
        apart = float((turned.double() - keys.double()).abs().max())
        hint = "is a step computed in another precision, or in another order?"
        if apart > ROUNDING * float(keys.abs().max()):
            hint = (
                "positions off by one, height and width exchanged, another theta, neighbouring channels "
                "turned together where the host pairs halves, or the other way round?"
            )
        assert torch.equal(turned, keys), (
            f"{path}: rotated keys of frames from {call.start} differ from the host's by up to "
            f"{apart:.3g}: {hint}"
        )


def rotation_is_per_frame(kit: Kit) -> None:
    """`rotate` turns every frame on its own, at any positions in any order, and keeps the dtype."""
    _, module, call = kit.calls(kit.plain(), 0)[0]
    k = kit.adapter.project(module, call)[1]
    places = [2, 0, 7, 1][: k.shape[1]]
    together = kit.adapter.rotate(k, call, places)
    assert together.shape == k.shape, f"rotate() returns {tuple(together.shape)}, expected {tuple(k.shape)}"
    for row, place in enumerate(places):
        alone = kit.adapter.rotate(k[:, row : row + 1], call, [place])
        assert torch.equal(together[:, row : row + 1], alone), (
            f"a frame at position {place} is turned otherwise among others ({places}): use every given "
            "position, not the first and a count"
        )
    low = kit.adapter.rotate(k.bfloat16(), call, places)
    assert low.dtype == torch.bfloat16, f"rotate() turns bfloat16 into {low.dtype}: return the dtype of x"


def rotation_is_relative(kit: Kit) -> None:
    """Queries and keys moved by as many frames meet as before, so positions may restart."""
    _, module, call = kit.calls(kit.plain(), 0)[0]
    q, k, _ = kit.adapter.project(module, call)

    def scores(moved: int) -> Tensor:
        a, b = (kit.adapter.rotate(x[:, :1], call, [moved + place]) for x, place in ((q, 4), (k, 1)))
        return torch.einsum("bfphd,bfrhd->bhpr", a.double(), b.double())

    apart = float((scores(0) - scores(11)).abs().max() / scores(0).abs().max())
    assert apart < 1e-3, (
        f"scores change by {apart:.3g} when queries and keys move by 11 frames: is it a rotation?"
    )


def rotation_reaches_far(kit: Kit) -> None:
    """`rotate` works far past the host's table, for roles that keep true positions in endless videos."""
    _, module, call = kit.calls(kit.plain(), 0)[0]
    k = kit.adapter.project(module, call)[1][:, :1]
    turned = kit.adapter.rotate(k, call, [FAR])
    assert bool(turned.isfinite().all()), f"rotate() at position {FAR} is not finite"
    before, after = k.double().norm(dim=-1), turned.double().norm(dim=-1)
    assert torch.allclose(before, after, rtol=1e-3), f"rotate() at position {FAR} changes the length of keys"
    near = kit.adapter.rotate(k, call, [FAR - 1])
    assert not torch.equal(turned, near), (
        f"positions {FAR - 1} and {FAR} are turned alike: is a table clamped?"
    )


def rotation_of_merged_patches(kit: Kit) -> None:
    """`rotate` with `patch=2` turns merged squares as their top left patch."""
    if "patch" not in inspect.signature(kit.adapter.rotate).parameters:
        raise Skipped("rotate() takes no patch: roles that merge patches are refused")
    _, module, call = kit.calls(kit.plain(), 0)[0]
    _, height, width = call.grid
    if height % 2 or width % 2:
        raise Skipped(f"{height}x{width} patches do not merge by two")
    k = kit.adapter.project(module, call)[1][:, :1]
    corners = torch.arange(height * width).view(height, width)[::2, ::2].flatten()
    expected = kit.adapter.rotate(k, call, [3])[:, :, corners]
    found = kit.adapter.rotate(k[:, :, corners], call, [3], 2)
    assert torch.equal(found, expected), "rotate(patch=2) is not the rotation of every second patch both ways"


def _beside_the_host(kit: Kit) -> list[tuple[str, AttentionCall, Tensor, Tensor, Tensor, Tensor]]:
    """Path, call, keys and values of `project` and of the host's cache, for every layer of two chunks."""
    take, found = kit.plain(), []
    for start in (0, kit.host.chunk):
        for layer, (path, module, call) in enumerate(kit.calls(take, start)):
            pair = kit.host.cached(take.model, take.caches, layer)
            if pair is None:
                raise Skipped("the host does not show its cache (Host.cached): parity must do")
            _, k, v = kit.adapter.project(module, call)
            heads = tuple(pair[0].shape[2:])
            assert heads == kit.adapter.heads(module), (
                f"{path}: heads() says {kit.adapter.heads(module)} (heads, head dim), the host caches {heads}"
            )
            keys, values = (x[:, -call.x.shape[1] :].reshape(k.shape) for x in pair)
            found.append((path, call, k, v, keys.clone(), values.clone()))
    return found


CHECKS: Sequence[Any] = (
    project_shapes,
    values_are_the_hosts,
    keys_are_the_hosts,
    rotation_is_the_hosts,
    rotation_is_per_frame,
    rotation_is_relative,
    rotation_reaches_far,
    rotation_of_merged_patches,
)
