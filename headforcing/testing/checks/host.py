"""Checks of the `Host` itself, without head forcing: with a broken host every later check would fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headforcing.testing.kit import Caught, Kit, Skipped, differences, same


def host_repeats_itself(kit: Kit) -> None:
    """Two unmodified models generate the same video, bit for bit."""
    frames, chunk = kit.host.frames, kit.host.chunk
    assert frames >= 3 * chunk, f"Host.frames is {frames}: expected three chunks of {chunk} or more"
    assert chunk < kit.host.dense <= frames, (
        f"Host.dense is {kit.host.dense}: expected more than a chunk of {chunk} and at most {frames} frames"
    )
    assert len(kit.memory) == kit.host.layers, (
        f"Host.memory has {len(kit.memory)} roles: expected one role, or one per layer, {kit.host.layers}"
    )
    hint = "this is the host, not the adapter: seed all randomness from start, draw and batch"
    same(kit.plain().video(frames), kit.truth(frames), hint)


def host_depends_on_its_input(kit: Kit) -> None:
    """The output depends on the draw and on the chunks before."""
    plain, chunk = kit.plain(), kit.host.chunk
    a, b = plain.passes(0, [0, 1])
    assert differences([a], [b]) is not None, (
        "draws 0 and 1 give the same output: make the noise depend on draw"
    )
    later = []
    for draw in (0, 1):
        take = kit.plain()
        take.passes(0, [draw])
        later += take.passes(chunk, [0])
    assert differences(later[:1], later[1:]) is not None, (
        "the second chunk does not depend on the first: are the caches passed to the model? are weights zero?"
    )


def host_starts_again(kit: Kit) -> None:
    """An unmodified model generates the same second video on used caches as on fresh ones."""
    take, frames = kit.plain(), kit.host.dense
    take.video(kit.host.frames, 20)
    kit.host.new_video(take.model, take.caches)
    hint = (
        "this is the host, not the adapter: new_video() must do what the pipeline does before a second video"
    )
    same(take.video(frames), kit.truth(frames), hint)


def host_takes_batches(kit: Kit) -> None:
    """The unmodified model runs two samples in one batch."""
    if not kit.host.batches:
        raise Skipped("the host takes one sample (Host.batches)")
    with Caught() as caught:
        kit.truth(kit.host.chunk, batch=2)
    assert caught.error is None, (
        f"with two samples the unmodified model raises {caught.error!r}: if it takes one only, set "
        "Host.batches = False"
    )


def weights_are_random(kit: Kit) -> None:
    """Attention weights are random, norms included: with all ones, a mix-up of two norms would not show."""
    for path, module in kit.sites(kit.host.model()):
        for name, weight in module.named_parameters():
            alike = weight.numel() > 1 and bool((weight == weight.flatten()[0]).all())
            assert not alike, (
                f"{path}.{name} is {float(weight.flatten()[0]):g} everywhere, so a missing or swapped norm "
                "may not show: Host.model() must randomise all weights"
            )


CHECKS: Sequence[Any] = (
    host_repeats_itself,
    host_depends_on_its_input,
    host_starts_again,
    host_takes_batches,
    weights_are_random,
)
