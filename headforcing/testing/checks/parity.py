"""Checks of an applied model against the unmodified one, bit for bit, or up to `Host.rounding`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headforcing.roles import Full, Local
from headforcing.testing.kit import Caught, Kit, Skipped, counters, differences

LOOK = "check project(), rotate() and output(), then begins_video()"
WINDOW = "if dense_parity passes: does Host.memory have the base model's window, sink and positions?"


def serves_every_layer(kit: Kit) -> None:
    """One pass of an applied model is served in every layer; none runs the original attention."""
    take = kit.forced()
    take.passes(0, [0])
    assert take.handle is not None
    status = take.handle.status()
    assert status.calls == kit.host.layers, (
        f"{status.calls} of {kit.host.layers} layers were served, {status.bypassed} bypassed: does read() "
        "return None, or does the model call other modules than those of attentions()?"
    )


def first_chunk(kit: Kit) -> None:
    """With every head `Full()`, one pass over the first chunk gives the unmodified model's output."""
    kit.same(
        kit.forced().passes(0, [0]), kit.plain().passes(0, [0]), "check project(), rotate() and output()"
    )


def rewritten_chunk(kit: Kit) -> None:
    """A chunk that is denoised in several passes is stored once, as the last pass wrote it."""
    draws = (3, 2, 1, 0)
    plain, forced = kit.plain(), kit.forced()
    expected = [out for start in (0, kit.host.chunk) for out in plain.passes(start, draws)]
    found = [out for start in (0, kit.host.chunk) for out in forced.passes(start, draws)]
    kit.same(
        found,
        expected,
        "does read() return the same start in every pass of a chunk, and begins_video() False?",
    )


def counters_move(kit: Kit) -> None:
    """The counters in the base model's caches have their original values after every pass."""
    plain, forced = kit.plain(), kit.forced()
    if not counters(plain.caches):
        raise Skipped("the base model's caches have no counters")
    for start in range(0, kit.host.frames, kit.host.chunk):
        for draws in ((1,), (0,)) if kit.anchored else ((1, 0),):
            plain.passes(start, draws)
            forced.passes(start, draws)
            expected, found = counters(plain.caches), counters(forced.caches)
            wrong = [name for name, value in expected.items() if found.get(name) != value]
            assert not wrong, (
                f"after a pass at frame {start} {wrong[0]} of the cache is {found.get(wrong[0])}, but "
                f"{expected[wrong[0]]} originally: output() must update each counter the original updates"
            )


def dense_parity(kit: Kit) -> None:
    """With every head `Full()` the video equals the unmodified model's until its window overflows."""
    kit.same(kit.forced().video(kit.host.dense), kit.truth(kit.host.dense), LOOK)


def dense_parity_bf16(kit: Kit) -> None:
    """The same in bfloat16."""
    low, frames = torch.bfloat16, kit.host.dense
    expected = kit.truth(frames, dtype=low)
    kit.same(kit.forced(dtype=low).video(frames), expected, f"in bfloat16: {LOOK}", low)


def parity_through_eviction(kit: Kit) -> None:
    """With the role that reproduces the base model, the whole video equals the unmodified model's."""
    _evicts(kit)
    frames = kit.host.frames
    kit.same(kit.forced(kit.memory).video(frames), kit.truth(frames), WINDOW)


def parity_through_eviction_bf16(kit: Kit) -> None:
    """The same in bfloat16."""
    _evicts(kit)
    low, frames = torch.bfloat16, kit.host.frames
    expected = kit.truth(frames, dtype=low)
    kit.same(kit.forced(kit.memory, low).video(frames), expected, f"in bfloat16, {WINDOW}", low)


def another_role_shows(kit: Kit) -> None:
    """Control: with heads that evict more, the video differs, so the parity checks can fail."""
    frames = kit.host.dense
    forced, allowed = kit.forced(Local(recent=1)), kit.allowed()
    assert differences(forced.video(frames), kit.truth(frames), allowed) is not None, (
        "heads that store one frame give the same video"
        + (f" to rounding: is Host.rounding of {allowed:.3g} too large, or" if allowed else ":")
        + " does the model attend to the past?"
    )


def single_frames(kit: Kit) -> None:
    """Chunks of one frame."""
    if not kit.host.single:
        raise Skipped("the host cannot run chunks of one frame (Host.single)")
    plain, forced = kit.plain(), kit.forced()
    starts = range(3)
    expected = [plain.passes(start, (1, 0), 1)[-1] for start in starts]
    found = [forced.passes(start, (1, 0), 1)[-1] for start in starts]
    kit.same(
        found,
        expected,
        "chunks of one frame: does read() count the frames of the call, not those of a configuration?",
    )


def batch_of_two(kit: Kit) -> None:
    """Two samples in one batch."""
    if not kit.host.batches:
        raise Skipped("the host takes one sample (Host.batches)")
    frames = kit.host.dense
    kit.same(kit.forced(batch=2).video(frames), kit.truth(frames, batch=2), f"with a batch of two: {LOOK}")


def two_caches_in_turn(kit: Kit) -> None:
    """Two timelines in alternation, as with classifier-free guidance, give the same videos as alone."""
    frames, chunk = kit.host.dense, kit.host.chunk
    first = kit.forced()
    second = first.other("second")
    found: tuple[list[Any], list[Any]] = ([], [])
    for start in range(0, frames, chunk):
        if kit.anchored:
            for draw in (2, 1, 0):
                found[0].extend(first.passes(start, [draw]))
                found[1].extend(second.passes(start, [draw + 20]))
        else:  # leaving a named stream ends the chunk
            found[0].extend(first.passes(start, (2, 1, 0)))
            found[1].extend(second.passes(start, (22, 21, 20)))
    hint = "two caches in turn: does the anchor belong to one timeline, and does all state go to the memo?"
    kit.same(found[0], kit.truth(frames), hint)
    kit.same(found[1], kit.truth(frames, 20), hint)


def second_video(kit: Kit) -> None:
    """A second and a third video on the same caches equal the same videos on fresh caches."""
    take, chunk = kit.forced(), kit.host.chunk
    for draw, frames in ((0, kit.host.dense), (20, 2 * chunk), (40, chunk), (10, kit.host.dense)):
        hint = f"{frames} frames after other videos on the same caches: check begins_video() and the memo"
        kit.same(take.video(frames, draw), kit.truth(frames, draw), hint)
        kit.host.new_video(take.model, take.caches)


def video_after_reset(kit: Kit) -> None:
    """After `handle.reset()` in the middle of a video, a video from frame 0 equals one on fresh caches."""
    for renewed in (True, False):
        take = kit.forced()
        take.video(2 * kit.host.chunk, 20)
        assert take.handle is not None
        take.handle.reset()
        if renewed:  # otherwise the counters of the cache keep their values
            kit.host.new_video(take.model, take.caches)
        hint = "after handle.reset(): forget() must clear what the memo says about the counters of the cache"
        kit.same(take.video(kit.host.dense), kit.truth(kit.host.dense), hint)


def inference_mode(kit: Kit) -> None:
    """`torch.inference_mode` gives the same video; caches created inside can be given back outside."""
    frames = kit.host.dense
    with torch.inference_mode():
        take = kit.forced()
        found = take.video(frames)
    kit.same(
        [out.clone() for out in found],
        kit.truth(frames),
        "under inference_mode: does the adapter read tensor versions?",
    )
    assert take.handle is not None
    with Caught() as caught:
        take.handle.remove()
    assert caught.error is None, (
        f"remove() outside inference_mode raises {caught.error!r}: give_back() must write cache tensors in "
        "the mode they were created in, with torch.inference_mode(tensor.is_inference())"
    )


def autocast(kit: Kit) -> None:
    """Under `torch.autocast` to bfloat16 the video equals the unmodified model's under autocast."""
    frames, outs = kit.host.dense, []
    for take in (kit.plain(), kit.forced()):
        device = next(take.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16), Caught() as caught:
            outs.append(take.video(frames))
        if caught.error is not None and take.handle is None:
            raise Skipped(f"the unmodified model does not run under autocast: {caught.error}")
        if caught.error is not None:
            raise caught.error
    hint = "under autocast: do project() and rotate() return the base model's dtypes?"
    kit.same(outs[1], outs[0], hint, torch.bfloat16)


def budget_is_kept(kit: Kit) -> None:
    """With roles that store two frames, the stored bytes stop growing, and two frames are stored."""
    take, chunk = kit.forced(Local(recent=1, sink=1)), kit.host.chunk
    assert take.handle is not None
    stored = []
    for start in range(0, kit.host.frames, chunk):
        take.passes(start, (1, 0))
        stored.append(take.handle.status().stored_bytes)
    assert min(stored) > 0, "nothing is stored: does status() see the streams of this adapter?"
    assert len(set(stored[2:])) == 1, (
        f"stored bytes per chunk are {stored}: expected constant from the third on"
    )
    held = [frames for samples in take.handle.frames(0, 0) for frames in samples]
    start = kit.host.frames - chunk
    last = kit.host.frames if not kit.anchored else start  # leaving a named stream commits its last chunk
    expected = [0, last - 1]
    assert held == [expected], (
        f"a head that stores the first and the last frame stores {held}, expected {expected}"
    )


def positions_in_range(kit: Kit) -> None:
    """Positions of compact roles stay in the range the model was trained on."""
    take = kit.forced(Local(recent=1, sink=1))
    assert take.handle is not None
    window, seen = take.handle.status().window, set[int]()

    def look(observation: Any) -> None:
        seen.update(place for places in observation.positions for place in places)

    with take.handle.observe(look):
        take.video(kit.host.frames)
    assert seen, "no attention call was seen"
    assert min(seen) >= 0, f"position {min(seen)} is below 0"
    assert max(seen) < window, (
        f"position {max(seen)} is outside the window of {window} frames: check window()"
    )


def _evicts(kit: Kit) -> None:
    if all(role == Full() for role in kit.memory):
        raise Skipped("the base model stores everything (Host.memory is Full)")


CHECKS: Sequence[Any] = (
    serves_every_layer,
    first_chunk,
    rewritten_chunk,
    counters_move,
    dense_parity,
    dense_parity_bf16,
    parity_through_eviction,
    parity_through_eviction_bf16,
    another_role_shows,
    single_frames,
    batch_of_two,
    two_caches_in_turn,
    second_video,
    video_after_reset,
    inference_mode,
    autocast,
    budget_is_kept,
    positions_in_range,
)
