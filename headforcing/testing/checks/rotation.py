"""Checks of projection and rotation, against the base model's own cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headforcing.testing.kit import Kit, Skipped
from headforcing.types import AttentionCall

FRACTIONS = "are fractions cut off, or rows of a table taken for them?"
FAR = 5000
"""A frame far past any table."""
ROUNDING = 1e-4
"""A relative difference below this is a matter of precision, not of a wrong formula."""


def project_shapes(kit: Kit) -> None:
    """`project` returns `[B, F, P, H, D]`, for one sample and, if the host takes them, for two.

    Queries that share keys have a multiple of `P` tokens.
    """
    for batch in (1, 2) if kit.host.batches else (1,):
        for path, module, call in kit.calls(kit.plain(batch=batch), 0):
            expected = (batch, call.grid[0], call.tokens_per_frame, *kit.adapter.heads(module))
            for name, part in zip("qkv", kit.adapter.project(module, call), strict=True):
                shape = tuple(part.shape)
                if name == "q" and len(shape) == 5 and shape[2] % expected[2] == 0:
                    shape = (*shape[:2], expected[2], *shape[3:])
                assert shape == expected, f"{path}: project() returns {name} as {shape}, expected {expected}"


def values_are_the_hosts(kit: Kit) -> None:
    """`project` returns the values that the base model caches, bit for bit."""
    for path, _, _, v, _, values in _with_cached(kit):
        assert torch.equal(v, values), (
            f"{path}: the values of project() are not those in the cache: if one layer projects all three, "
            "does it split heads first, or queries, keys and values?"
        )


def keys_are_the_hosts(kit: Kit) -> None:
    """`project` returns the keys that the base model caches, compared by length, which RoPE keeps."""
    for path, _, k, _, keys, _ in _with_cached(kit):
        mine, theirs = k.float().norm(dim=-1), keys.float().norm(dim=-1)
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4), (
            f"{path}: the keys of project() are not those in the cache, their lengths differ by up to "
            f"{float((mine - theirs).abs().max()):.3g}: are q and k or their norms "
            "swapped, or is a norm missing?"
        )


def rotation_is_the_hosts(kit: Kit) -> None:
    """`rotate` at the frames of the chunk gives the keys that the base model caches, bit for bit."""
    for path, call, k, _, keys, _ in _with_cached(kit):
        turned = kit.adapter.rotate(k, call, range(call.start, call.start + call.grid[0]))
        apart = float((turned.double() - keys.double()).abs().max())
        hint = "is a step computed in another precision, or in another order?"
        if apart > ROUNDING * float(keys.abs().max()):
            hint = (
                "positions off by one, height and width exchanged, another theta, or neighbouring "
                "channels paired where the base model pairs halves (or the reverse)?"
            )
        assert torch.equal(turned, keys), (
            f"{path}: rotated keys from frame {call.start} on differ from the cached ones by up to "
            f"{apart:.3g}: {hint}"
        )


def rotation_is_per_frame(kit: Kit) -> None:
    """`rotate` rotates every frame independently, at any positions in any order."""
    _, module, call = kit.calls(kit.plain(), 0)[0]
    k, places = kit.adapter.project(module, call)[1], [2, 0, 7, 1]
    k = k[:, torch.arange(len(places)) % k.shape[1]]
    together = kit.adapter.rotate(k, call, places)
    assert together.shape == k.shape, f"rotate() returns {tuple(together.shape)}, expected {tuple(k.shape)}"
    for row, place in enumerate(places):
        alone = kit.adapter.rotate(k[:, row : row + 1], call, [place])
        assert torch.equal(together[:, row : row + 1], alone), (
            f"a frame at position {place} is rotated differently when others are present ({places}): use "
            "every given position, not the first and a count"
        )


def rotation_keeps_the_dtype(kit: Kit) -> None:
    """`rotate` returns bfloat16 for bfloat16."""
    kit.truth(kit.host.chunk, dtype=torch.bfloat16)  # skipped if the unmodified model does not run in it
    _, module, call = kit.calls(kit.plain(), 0)[0]
    low = kit.adapter.project(module, call)[1].bfloat16()
    found = kit.adapter.rotate(low, call, range(low.shape[1])).dtype
    assert found == torch.bfloat16, f"rotate() converts bfloat16 to {found}: return the dtype of x"


def rotation_is_relative(kit: Kit) -> None:
    """Scores depend on the distance of query and key only, so positions may restart, and be fractions."""
    _, module, call = kit.calls(kit.plain(), 0)[0]
    q, k, _ = kit.adapter.project(module, call)

    def scores(*places: float) -> Tensor:
        a, b = (
            kit.adapter.rotate(x[:, :1], call, [place]).double()
            for x, place in zip((q, k), places, strict=True)
        )
        return torch.einsum("bfphd,bfrhd->bhpr", a, b)

    for near, far, hint in (((4, 1), (15, 12), "is it a rotation?"), ((1.5, 0.25), (3, 1.75), FRACTIONS)):
        apart = float((scores(*near) - scores(*far)).abs().max() / scores(*near).abs().max())
        assert apart < 1e-3, (
            f"scores change by {apart:.3g} when query and key move from frames {near} to {far}: {hint}"
        )


def rotation_reaches_far(kit: Kit) -> None:
    """`rotate` works far past the base model's RoPE table, for roles with true positions in long videos."""
    _, module, call = kit.calls(kit.plain(), 0)[0]
    k = kit.adapter.project(module, call)[1][:, :1]
    turned = kit.adapter.rotate(k, call, [FAR])
    assert bool(turned.isfinite().all()), f"rotate() at position {FAR} is not finite"
    before, after = k.double().norm(dim=-1), turned.double().norm(dim=-1)
    assert torch.allclose(before, after, rtol=1e-3), f"rotate() at position {FAR} changes the length of keys"
    near = kit.adapter.rotate(k, call, [FAR - 1])
    assert not torch.equal(turned, near), (
        f"positions {FAR - 1} and {FAR} give the same rotation: is a table clamped?"
    )


def rotation_of_merged_patches(kit: Kit) -> None:
    """`rotate` with `patch=2` rotates merged squares as their top left patch."""
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
    assert torch.equal(found, expected), (
        "rotate(patch=2) is not the rotation of every second patch in both directions"
    )


def _with_cached(kit: Kit) -> list[tuple[str, AttentionCall, Tensor, Tensor, Tensor, Tensor]]:
    """Path, call, keys and values of `project` and of the base model's cache, per layer of two chunks."""
    take, found = kit.plain(), []
    for start in (0, kit.host.chunk):
        for layer, (path, module, call) in enumerate(kit.calls(take, start)):
            pair = kit.host.cached(take.model, take.caches, layer)
            if pair is None:
                raise Skipped("Host.cached is not defined; the parity checks cover this")
            _, k, v = kit.adapter.project(module, call)
            heads = tuple(pair[0].shape[2:])
            assert heads == kit.adapter.heads(module), (
                f"{path}: heads() returns {kit.adapter.heads(module)} (heads, head dim), the cache {heads}"
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
    rotation_keeps_the_dtype,
    rotation_is_relative,
    rotation_reaches_far,
    rotation_of_merged_patches,
)
