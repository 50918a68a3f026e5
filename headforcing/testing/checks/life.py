"""Checks of what users do with an applied model: copies, training, prompt switches, mistakes."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headforcing.errors import (
    ChunkOrderError,
    ExternalEditError,
    HeadForcingError,
    RoleMapError,
    StreamShapeError,
    UnsupportedModelError,
)
from headforcing.roles import Full, Local
from headforcing.testing.kit import Caught, Kit, Skipped, Take, differences, quiet, same, tensors
from headforcing.testing.snapshot import bits, snapshot


def state_dict_unchanged(kit: Kit) -> None:
    """The state dict of an applied model has the same names and the same tensor objects."""
    model = kit.host.model()
    before = {name: (id(tensor), bits(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()}
    kit.apply(model, Local())
    after = {name: (id(tensor), bits(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()}
    wrong = sorted(set(before.items()) ^ set(after.items()))
    assert not wrong, (
        f"state_dict entry {wrong[0][0]} changed: the adapter must not touch the model's modules"
    )


def copy_is_independent(kit: Kit) -> None:
    """A deep copy of an applied model, made in the middle of a video, is applied too and shares nothing."""
    take, frames = kit.forced(), kit.host.dense
    head = take.passes(0, (2, 1, 0))
    twin = copy.deepcopy(take.model)
    other = Take(kit, twin, kit.apply(twin, Full()), kit.host.caches(twin))
    kit.same(
        other.video(frames), kit.truth(frames), "a deep copy: what do the adapter and its memo refer to?"
    )
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    rest = take.video(frames, first=kit.host.chunk)
    kit.same(
        [*head, *rest], kit.truth(frames), "the original after its copy was set to zero: something is shared"
    )


def can_be_saved(kit: Kit) -> None:
    """An applied model can be pickled if the unmodified one can."""
    with Caught() as plain:
        torch.save(kit.host.model(), io.BytesIO())
    if plain.error is not None:
        raise Skipped(f"the unmodified model cannot be pickled: {plain.error}")
    with Caught() as forced:
        torch.save(kit.forced().model, io.BytesIO())
    assert forced.error is None, (
        f"pickling fails ({forced.error}): the adapter must have plain attributes only"
    )


def training_passes_through(kit: Kit) -> None:
    """In training mode the original attention runs, with the unmodified model's output."""
    _passes_through(kit, lambda take: take.model.train(), "in training mode")


def gradients_pass_through(kit: Kit) -> None:
    """With gradients the original attention runs, and every weight gets its original gradient."""
    found = []

    def learn(take: Take) -> Tensor:
        out = take.passes(0, [1])[-1]
        out.float().square().mean().backward()
        grads = {name: parameter.grad for name, parameter in take.model.named_parameters()}
        found.append({name: grad for name, grad in grads.items() if grad is not None})
        return out

    _passes_through(kit, lambda take: take.model.requires_grad_(True), "with gradients", learn)
    plain, forced = found
    assert plain, (
        "no weight gets a gradient from the unmodified model: Host.call must not switch gradients off"
    )
    lost = sorted(plain.keys() - forced.keys())
    assert not lost, f"{lost[0]} gets no gradient: the adapter must not change the module"
    wrong = [name for name, grad in plain.items() if not torch.equal(grad, forced[name])]
    assert not wrong, f"{wrong[0]} gets another gradient: the original forward must run unchanged"


def wrapped_layers_are_called(kit: Kit) -> None:
    """Linear layers that are wrapped after apply, as LoRA does, are called; their weights are not read."""
    outs, frames = [], 2 * kit.host.chunk
    for take in (kit.plain(), kit.forced()):
        if not _wrap(kit, take.model):
            raise Skipped("attention has no nn.Linear of its own")
        outs.append(take.video(frames))
    apart = differences(outs[0], kit.truth(frames))
    assert apart is not None, "the wrapped layers change nothing in the unmodified model"
    hint = "with wrapped linear layers: call the module's sub-modules every time, never read their weights"
    kit.same(outs[1], outs[0], hint)


class _Wrapped(nn.Module):
    """A layer that computes more than its weights say."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out + 0.25 * out.sin()


def _wrap(kit: Kit, model: nn.Module) -> int:
    count = 0
    for module in [model.get_submodule(path) for path, _ in kit.sites(kit.host.model())]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _Wrapped(child))
                count += 1
    return count


def threads_are_independent(kit: Kit) -> None:
    """Two models in two threads generate the same videos as alone."""
    frames = kit.host.dense
    takes, outs, errors = [kit.forced(), kit.forced()], [list[Tensor](), list[Tensor]()], list[Exception]()

    def work(number: int) -> None:
        with torch.no_grad(), Caught() as caught:
            outs[number] += takes[number].video(frames, 20 * number)
        errors.extend([caught.error] if caught.error is not None else [])

    workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors, f"in a thread: {errors[0]!r}"
    for number in (0, 1):
        hint = "two models in two threads: does the adapter keep state on itself? State belongs in the memo"
        kit.same(outs[number], kit.truth(frames, 20 * number), hint)


def prompt_switch_takes_effect(kit: Kit) -> None:
    """After `switch_prompt` the next chunk uses the new prompt, not the cached projection."""
    model = kit.host.model()
    with Caught() as caught:
        crosses = kit.adapter.cross_attentions(model)
    if isinstance(caught.error, UnsupportedModelError):
        raise Skipped(f"switch_prompt is refused: {caught.error}")
    assert caught.error is None, f"cross_attentions() raised {caught.error!r}"
    if crosses:
        assert len(crosses) == kit.host.layers, (
            f"cross_attentions() returns {len(crosses)} modules for {kit.host.layers} layers"
        )
    outs = []
    for switched in (True, False):
        take = kit.forced()
        take.video(kit.host.chunk)
        if not kit.host.switch_prompt(take.model, take.caches):
            raise Skipped("the host has no prompts (Host.switch_prompt)")
        assert take.handle is not None
        if switched:
            take.handle.switch_prompt("continue")
        outs.append(take.passes(kit.host.chunk, (1, 0)))
    if crosses:
        assert differences(outs[0], outs[1]) is not None, (
            "the new prompt changes nothing: forget_prompt() must make cross-attention project it again"
        )


def skipped_chunk_refused(kit: Kit) -> None:
    """A chunk that skips frames is refused, and the video can go on afterwards."""
    take, chunk = kit.forced(), kit.host.chunk
    outs = take.passes(0, (2, 1, 0))
    _raises(ChunkOrderError, lambda: take.passes(2 * chunk, [0]), "a chunk was skipped")
    outs += take.passes(chunk, (2, 1, 0))
    hint = "after a refused chunk: read() and begins_video() must not change the base model's cache"
    kit.same(outs, kit.truth(2 * chunk), hint)


def other_dtype_refused(kit: Kit) -> None:
    """A model whose dtype changes in the middle of a video is refused: its KV cache has the old dtype."""
    take, chunk = kit.forced(), kit.host.chunk
    kit.truth(chunk, dtype=torch.bfloat16)  # skipped if the unmodified model does not run in it
    take.passes(0, (1, 0))
    take.model.to(torch.bfloat16)
    _raises(StreamShapeError, lambda: take.passes(chunk, [1]), "the dtype changed in the middle of a video")


def edited_cache_refused(kit: Kit) -> None:
    """Cache counters changed by something else are an `ExternalEditError`; after a reset it works again."""
    take, chunk = kit.forced(), kit.host.chunk
    before = {path: leaf.clone() for path, leaf in _whole(take)}
    take.passes(0, (1, 0))
    moved = [leaf for path, leaf in _whole(take) if path in before and not torch.equal(leaf, before[path])]
    if not moved:
        raise Skipped("the caches have no counters that are tensors")
    for leaf in moved:
        leaf.add_(1)
    _raises(
        ExternalEditError, lambda: take.passes(chunk, [0]), "the counters of the cache were changed by one"
    )
    assert take.handle is not None
    take.handle.reset()  # as the message of the error says
    hint = "after an edit and handle.reset(): forget() must clear what the memo says about counters"
    kit.same(take.video(2 * chunk), kit.truth(2 * chunk), hint)


def failed_apply_leaves_no_trace(kit: Kit) -> None:
    """Roles that do not fit leave the model untouched."""
    model = kit.host.model()
    before = snapshot(model)
    _raises(
        (RoleMapError, HeadForcingError),
        lambda: kit.apply(model, [[Full()]] * (kit.host.layers + 1)),
        "a role map with one layer too many was applied",
    )
    changed = before.diff(snapshot(model))
    assert not changed, f"a failed apply changed {changed[0]}"


def _passes_through(
    kit: Kit, change: Callable[[Take], object], what: str, work: Callable[[Take], Tensor] | None = None
) -> None:
    """An applied model that trains or requires gradients behaves as the unmodified one and serves no call."""
    plain, forced = kit.plain(), kit.forced()
    outs = []
    for take in (plain, forced):
        change(take)
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(work is not None), quiet():
            torch.manual_seed(0)
            with Caught() as caught:
                outs.append(work(take) if work is not None else take.passes(0, [1])[-1])
        if caught.error is not None and take is plain:
            raise Skipped(f"the unmodified model raises {what}: {caught.error}")
        assert caught.error is None, (
            f"{what} the applied model raises {caught.error!r}, the unmodified one does not"
        )
    assert forced.handle is not None
    calls = forced.handle.status().calls
    assert calls == 0, f"{what} {calls} calls were served: does read() return the x that the module receives?"
    same(outs[1:], outs[:1], f"{what} the original forward must run unchanged")


def _raises(kind: Any, work: Callable[[], object], what: str) -> None:
    with Caught() as caught:
        work()
    names = kind.__name__ if isinstance(kind, type) else " or ".join(one.__name__ for one in kind)
    assert caught.error is not None, f"{what}, and nothing was raised: expected {names}"
    assert isinstance(caught.error, kind), f"{what}, and {caught.error!r} was raised: expected {names}"


def _whole(take: Take) -> list[tuple[str, Tensor]]:
    """Tensors of whole numbers in the caches."""
    floating = (torch.bool,)
    return [
        (path, leaf)
        for path, leaf in tensors(take)
        if not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype in floating)
    ]


CHECKS: Sequence[Any] = (
    state_dict_unchanged,
    failed_apply_leaves_no_trace,
    copy_is_independent,
    can_be_saved,
    training_passes_through,
    gradients_pass_through,
    wrapped_layers_are_called,
    threads_are_independent,
    prompt_switch_takes_effect,
    skipped_chunk_refused,
    other_dtype_refused,
    edited_cache_refused,
)
