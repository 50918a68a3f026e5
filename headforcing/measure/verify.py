"""Whether the library reproduces a model: a user's generation, untouched and with the model's own memory.

A signature is no proof, because forks keep it and change the mathematics behind it. So `verify` runs the same
generation three times, twice untouched and once with the roles `"own"`, and compares every attention call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headforcing.adapters.base import Adapter, find_adapter
from headforcing.apply import OWN, apply_head_forcing
from headforcing.apply.handles import handles_of
from headforcing.errors import AlreadyAppliedError, OptionError
from headforcing.roles import HeadRole

ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative differences up to which another order of the same sums may be the reason."""
Result = Literal["equal", "rounding", "different", "unstable", "unserved"]


@dataclass(frozen=True)
class Location:
    """One attention call.

    Attributes:
        layer: number of the attention layer.
        chunk: number of the chunk.
        number: which pass of this layer over this chunk; guidance branches count, too.
        frames: its frames, `(start, stop)`.
    """

    layer: int
    chunk: int
    number: int
    frames: tuple[int, int]

    def __str__(self) -> str:
        start, stop = self.frames
        return f"layer {self.layer}, chunk {self.chunk} (frames {start} to {stop - 1}), pass {self.number}"


@dataclass(frozen=True)
class Verdict:
    """What `verify` found; print it.

    Attributes:
        result: `equal`: bit for bit. `rounding`: as equal as another order of the same sums. `different`: it
            is another memory. `unstable`: two untouched runs differ, so nothing can be said. `unserved`:
            calls went past us.
        difference: largest difference of any token of an attention output, over the root mean square of
            all tokens; over all calls. 0 if equal.
        first: the first call that differs, beyond rounding where there is one.
        frames: frames that the longest video had.
        evicted: whether the own memory gave up frames; if not, nothing was said about eviction.
        past: calls that went past us, in words; empty: none.
        memory: the own memory, a role per layer.
        hint: what to look at; empty: nothing.
    """

    result: Result
    difference: float
    first: Location | None
    frames: int
    evicted: bool
    past: tuple[str, ...]
    memory: tuple[HeadRole, ...]
    hint: str

    @property
    def ok(self) -> bool:
        """Whether the model is reproduced, with frames evicted if it evicts any."""
        return self.result in ("equal", "rounding")

    def __str__(self) -> str:
        told = {
            "equal": "equal, bit for bit",
            "rounding": f"equal to rounding: relative difference at most {self.difference:.1e}",
            "different": f"different: relative difference up to {self.difference:.1e}",
            "unstable": "two untouched runs differ, so nothing can be said",
            "unserved": "not all calls were served",
        }
        lines = [f"{told[self.result]}, {self.frames} frames"]
        lines += [f"  first at {self.first}"] if self.first is not None else []
        lines += [f"  {one}" for one in self.past]
        lines += [f"  own memory of {many}: {role}" for role, many in _counted(self.memory).items()]
        return "\n".join([*lines, *([f"  {self.hint}"] if self.hint else [])])


@dataclass(frozen=True)
class _Call:
    """One call of an attention: where it was, a sum of all bits of its output, and a number per token.

    The number is the sum of the token's channels with fixed signs, so that no channel goes unseen.
    """

    layer: int
    frames: tuple[int, int]
    bits: Tensor
    tokens: Tensor
    dtype: torch.dtype


def verify(
    model: nn.Module,
    run: Callable[..., object],
    *,
    prompt: str | None = None,
    seed: int = 0,
    adapter: Adapter | None = None,
) -> Verdict:
    """Compares the model with and without head forcing, where roles are what it remembers by itself.

    Let `run` generate past the first eviction, and in float32 if rounding is to be told from small faults.
    The model is as it was afterwards, also if `run` fails; nothing is noted anywhere.

    Args:
        model: the model, without head forcing.
        run: generates with the model, every time the same; called three times, with `prompt` if there is one.
        prompt: passed to `run`.
        seed: of the global random numbers before every run.
        adapter: the model's adapter; default: the one that fits.

    Raises:
        AlreadyAppliedError: head forcing is applied to the model.
        OptionError: `run` made no call of an attention with a cache.
        UnsupportedModelError: no adapter fits, or it does not know the own memory.
    """
    if handles_of(model):
        raise AlreadyAppliedError("verify applies the model's own memory: remove head forcing first")
    adapter = find_adapter(model) if adapter is None else adapter
    call = run if prompt is None else partial(run, prompt)
    before, again = (_recorded(model, adapter, call, seed) for _ in range(2))
    chunk = adapter.chunk(model)
    memory = tuple(adapter.own_memory(model))
    if not before.calls:
        other = f", but {_many(before.past)} of its parts alone: it has another entry" if before.past else ""
        raise OptionError(
            f"run called no attention of {adapter.name} with a cache{other}: expected a generation with this "
            "model"
        )
    frames = max(one.frames[1] for one in before.calls)
    kept = [role.capacity(chunk) for role in memory]
    found = Verdict(
        result="equal",
        difference=0.0,
        first=None,
        frames=frames,
        evicted=any(count is not None and count + chunk < frames for count in kept),
        past=(),
        memory=memory,
        hint="",
    )
    if (where := _first(before.calls, again.calls, _same_bits)) is not None:
        hint = "let run make its own torch.Generator with a fixed seed, in eval mode without dropout"
        return replace(found, result="unstable", first=_location(before.calls, where), hint=hint)
    with apply_head_forcing(model, OWN, adapter=adapter) as handle:
        ours = _recorded(model, adapter, call, seed)
        status = handle.status()
    past = []
    if status.bypassed or not status.calls:
        past.append(
            f"{_many(status.bypassed)} went to the original forward: run without gradients, in eval()"
        )
    if status.unserved:
        past.append(f"layers {list(status.unserved)} were never called: something skips them")
    if before.past:
        past.append(f"{_many(before.past)} of parts of an attention came by another entry than its forward")
    found = replace(found, past=tuple(past), result="unserved" if past else "equal")
    return _compared(found, before.calls, ours.calls, chunk)


def _compared(found: Verdict, before: Sequence[_Call], ours: Sequence[_Call], chunk: int) -> Verdict:
    """The verdict, with what differs."""
    if (where := _first(before, ours, _same_bits)) is None:
        return replace(found, hint=_length(found))
    if (other := _first(before, ours, _same_frames)) is not None:
        hint = (
            "the generation itself depends on what the attention returns, beyond its numbers: compare by hand"
        )
        return replace(
            found, result="different", difference=float("inf"), first=_location(before, other), hint=hint
        )
    gaps = [gap(a.tokens, b.tokens) for a, b in zip(before, ours, strict=True)]
    limit = ROUNDING.get(before[where].dtype, 0.0)
    beyond = next((number for number, gap in enumerate(gaps) if not gap <= limit), None)
    first = _location(before, where if beyond is None else beyond)
    if beyond is None:
        result: Result = "rounding" if found.result == "equal" else found.result
        return replace(found, result=result, difference=max(gaps), first=first, hint=_length(found))
    hint = _look_at(found, before, beyond, chunk)
    return replace(found, result="different", difference=max(gaps), first=first, hint=hint)


def _look_at(found: Verdict, calls: Sequence[_Call], where: int, chunk: int) -> str:
    """What a porter should look at, by where the first difference is."""
    first, stop = _location(calls, where), calls[where].frames[1]
    capacity = found.memory[first.layer].capacity(chunk)
    if any(one.layer < first.layer and one.frames == calls[where].frames for one in calls[:where]):
        only = f"layers before {first.layer} are equal here: "
    else:
        only = ""
    if capacity is not None and stop > capacity + chunk:
        return f"{only}frames were evicted before it: look at window, sink and positions of own_memory"
    if first.number:
        return f"{only}earlier passes over this chunk are equal: look at which call the model caches"
    if first.chunk:
        return f"{only}nothing was evicted, but there is a past: look at RoPE positions and order of frames"
    return f"{only}there is no past yet: look at project, rotate and output of the adapter"


def _length(found: Verdict) -> str:
    bounded = [role for role in found.memory if role.capacity(1) is not None]
    if found.evicted or not bounded:
        return ""
    return (
        f"nothing was evicted in {found.frames} frames: let run generate more, and eviction is compared, too"
    )


class _Record:
    """The attention calls of one run, and how often parts of an attention ran outside its forward."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.past = 0


def _recorded(model: nn.Module, adapter: Adapter, run: Callable[[], object], seed: int) -> _Record:
    """What happens in one run."""
    record = _Record()
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), _watching(model, adapter, record):
        torch.manual_seed(seed)
        run()
    return record


@contextmanager
def _watching(model: nn.Module, adapter: Adapter, record: _Record) -> Iterator[None]:
    """Hooks on every attention and its parts, as long as it lasts."""
    inside: set[int] = set()
    hooks = []

    def watch(layer: int, module: nn.Module) -> None:
        def begins(_: nn.Module, args: Any, kwargs: Any) -> None:
            inside.add(layer)

        def ends(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            inside.discard(layer)
            call = None if out is None else adapter.read(module, args, kwargs)
            if call is not None:
                y = (out[0] if isinstance(out, tuple) else out).detach()
                record.calls.append(_call(layer, (call.start, call.start + call.grid[0]), y))

        def part(_: nn.Module, args: Any) -> None:
            record.past += layer not in inside

        hooks.append(module.register_forward_pre_hook(begins, with_kwargs=True))
        hooks.append(module.register_forward_hook(ends, with_kwargs=True, always_call=True))
        hooks.extend(child.register_forward_pre_hook(part) for child in module.children())

    for layer, (_, module) in enumerate(adapter.attentions(model)):
        watch(layer, module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _call(layer: int, frames: tuple[int, int], y: Tensor) -> _Call:
    """The facts of an output; nothing waits for the device."""
    flat = y.contiguous().flatten()
    whole = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]).long()
    factors = torch.arange(1, len(whole) + 1, device=y.device)
    bits = torch.stack([whole.sum(), (whole * factors).sum()])
    rows = y.flatten(2).flatten(0, 1)  # [B*L, C]
    signs = (torch.arange(rows.shape[1], device=y.device) * 2654435761 >> 16) % 2 * 2 - 1
    wide = rows.to(torch.promote_types(y.dtype, torch.float32))
    return _Call(layer, frames, bits, wide @ signs.to(wide), y.dtype)


def _first(
    before: Sequence[_Call], after: Sequence[_Call], same: Callable[[_Call, _Call], bool]
) -> int | None:
    """The first call of which there is another one after, or none."""
    pairs = enumerate(zip(before, after, strict=False))
    shorter = min(len(before), len(after))
    end = None if len(before) == len(after) else max(shorter - 1, 0)
    return next((number for number, (a, b) in pairs if not same(a, b)), end)


def _same_frames(a: _Call, b: _Call) -> bool:
    return (a.layer, a.frames) == (b.layer, b.frames)


def _same_bits(a: _Call, b: _Call) -> bool:
    return _same_frames(a, b) and torch.equal(a.bits, b.bits)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, over the root mean square of the first."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny))


def _location(calls: Sequence[_Call], where: int) -> Location:
    """Which chunk and pass a call is, counted in its layer."""
    layer = calls[where].layer
    same = [one.frames for one in calls[: where + 1] if one.layer == layer]
    chunk, number = 0, 0
    for before, frames in pairwise(same):
        number = number + 1 if frames == before else 0
        chunk += frames != before
    return Location(layer, chunk, number, same[-1])


def _counted(memory: Sequence[HeadRole]) -> dict[HeadRole, str]:
    found: dict[HeadRole, list[int]] = {}
    for layer, role in enumerate(memory):
        found.setdefault(role, []).append(layer)
    if len(found) == 1:
        return dict.fromkeys(found, "every layer")
    return {role: f"layers {', '.join(map(str, layers))}" for role, layers in found.items()}


def _many(count: int) -> str:
    return f"{count} call{'s' * (count != 1)}"
