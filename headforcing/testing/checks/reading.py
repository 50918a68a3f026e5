"""Checks of an adapter's answers, on an unmodified model."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from headforcing.adapters.base import Adapter
from headforcing.testing.kit import Kit, Skipped


def fits(kit: Kit) -> None:
    """`why_not` returns None for the host's model."""
    reason = kit.adapter.why_not(kit.host.model())
    assert reason is None, f"why_not(model) returns {reason!r} for the host's own model"


def refuses_foreign_models(kit: Kit) -> None:
    """`why_not` returns a sentence for other models, and `attentions` finds nothing in them."""
    transformer = nn.TransformerEncoderLayer(8, 2, 8)
    for model in (nn.Linear(2, 2), nn.Sequential(), transformer, nn.MultiheadAttention(8, 2)):
        kind, reason = type(model).__name__, kit.adapter.why_not(model)
        assert isinstance(reason, str), (
            f"why_not({kind}) is {reason!r}: expected a sentence, this model does not fit"
        )
        assert reason.strip(), f"why_not({kind}) is empty: say what is missing"
        found = kit.sites(model)
        assert not found, (
            f"attentions({kind}) yields {found[0][0]!r}: test for everything the right layers have"
        )


def known_by_structure(kit: Kit) -> None:
    """A subclass with another name is recognised: forks rename classes, and many classes share a name."""
    model = kit.host.model()
    for _, module in kit.sites(model):
        cls: Any = type(module)
        module.__class__ = type("Renamed", (cls,), {})
    reason = kit.adapter.why_not(model)
    assert reason is None, (
        f"with the attention class renamed, why_not returns {reason!r}: do not test class names"
    )


def other_signature_refused(kit: Kit) -> None:
    """Attention with another signature is refused: its calls would be misread."""
    model = kit.host.model()
    for _, module in kit.sites(model):
        cls: Any = type(module)
        module.__class__ = type("Changed", (cls,), {"forward": lambda self, x: x})
    assert kit.adapter.why_not(model) is not None, (
        "why_not returns None although forward takes (x) alone: compare parameter_names(module)"
    )


def layers_found(kit: Kit) -> None:
    """Every self-attention layer is found once, under its own path."""
    model = kit.host.model()
    sites = kit.sites(model)
    paths, modules = [path for path, _ in sites], [module for _, module in sites]
    assert len(sites) == kit.host.layers, (
        f"attentions() yields {len(sites)} layers ({', '.join(paths)}), the host has {kit.host.layers}"
    )
    assert len({id(module) for module in modules}) == len(modules), (
        f"attentions() yields a module twice: {paths}"
    )
    wrong = [path for path, module in sites if model.get_submodule(path) is not module]
    assert not wrong, (
        f"attentions() yields {wrong}, but these names lead to other modules: yield names of named_modules()"
    )


def layers_in_order(kit: Kit) -> None:
    """`attentions` yields the layers in the order in which a pass calls them, once each."""
    take = kit.plain()
    found = [path for path, _ in kit.sites(take.model)]
    called = [path for path, _, _ in kit.calls(take, 0)]
    assert called == found, (
        f"a pass calls {called}, attentions() yields {found}: roles would go to other layers"
    )


def heads_and_sizes(kit: Kit) -> None:
    """`heads`, `window` and `chunk` are integers that agree with each other and with the host."""
    model = kit.host.model()
    shapes = {kit.adapter.heads(module) for _, module in kit.sites(model)}
    assert len(shapes) == 1, f"heads() differs between layers: {sorted(shapes)}"
    window, chunk = kit.adapter.window(model), kit.adapter.chunk(model)
    for name, value in zip(
        ("heads", "head dim", "window", "chunk"), (*shapes.pop(), window, chunk), strict=True
    ):
        assert type(value) is int, f"{name} is {value!r}: expected an int, not {type(value).__name__}"
        assert value > 0, f"{name} is {value}: expected at least 1"
    assert chunk == kit.host.chunk, (
        f"chunk() is {chunk}, the host's pipeline denoises {kit.host.chunk} together"
    )
    known = kit.host.window
    assert known in (None, window), f"window() is {window}, the model was trained on {known} frames"
    assert window >= chunk, (
        f"window() is {window} frames, less than a chunk of {chunk}: is it in another unit?"
    )


def own_memory_is_the_hosts(kit: Kit) -> None:
    """`own_memory` returns the role that reproduces the unmodified model, for every layer."""
    found = list(kit.adapter.own_memory(kit.host.model()))
    assert found == kit.memory, (
        f"own_memory() returns {found}, Host.memory says {kit.memory}, one role per layer: if "
        "parity_through_eviction passes, own_memory is wrong"
    )


def read_counts_frames(kit: Kit) -> None:
    """`read` returns the first frame and the grid of every chunk, in frames and patches."""
    take, chunk = kit.plain(), kit.host.chunk
    for start in (0, chunk, 2 * chunk):
        for path, module, call in kit.calls(take, start, 1):  # a clean pass may recompute all chunks
            assert call.start == start, (
                f"{path}: read() returns start {call.start} for a chunk at frame {start}: is "
                "it in frames, not in tokens or chunks?"
            )
            frames, height, width = call.grid
            assert frames == chunk, f"{path}: read() returns {frames} frames, the chunk has {chunk}"
            tokens = call.x.shape[1]
            assert frames * height * width == tokens, (
                f"{path}: grid {call.grid} does not match the {tokens} tokens of x"
            )
            assert call.x.dim() == 3, f"{path}: x is {tuple(call.x.shape)}, expected [B, L, C]"
            del module


def arguments_belong_to_the_call(kit: Kit) -> None:
    """Every call, and every part of one that is split, has a dict of its own, for what `project` notes."""
    take = kit.plain()
    calls = [found for start in (0, kit.host.chunk) for found in kit.calls(take, start)]
    each = [(path, one.arguments) for path, module, call in calls for one in kit.adapter.split(module, call)]
    seen = set[int]()
    for path, arguments in each:
        assert type(arguments) is dict, f"{path}: arguments is a {type(arguments).__name__}: expected a dict"
        assert id(arguments) not in seen, (
            f"{path}: another call has the same arguments dict, so what project() notes for output() would "
            "mix: make a new one in every read(), and in split() for every chunk"
        )
        seen.add(id(arguments))


def anchor_is_the_timeline(kit: Kit) -> None:
    """The anchor is one object per layer and timeline, the same in every pass."""
    take = kit.plain()
    first = [call.anchor for _, _, call in kit.calls(take, 0)]
    if first[0] is None:
        raise Skipped("calls carry no cache object: users name the timeline with handle.stream()")
    assert all(_allows_weak_references(anchor) for anchor in first), (
        f"the anchor is a {type(first[0]).__name__}, which allows no weak reference, so our KV "
        "cache could not be freed with it: take a tensor inside it, or put an object of your own into it"
    )
    later = [call.anchor for _, _, call in kit.calls(take, kit.host.chunk)]
    assert all(a is b for a, b in zip(first, later, strict=True)), (
        "the anchor is another object in the next chunk: take one that lives as long as the video, not a view"
    )
    others = [call.anchor for _, _, call in kit.calls(take.other("other"), 0)]
    distinct = len({id(anchor) for anchor in (*first, *others)})
    assert distinct == 2 * len(first), (
        "layers or timelines share an anchor, so their KV caches would mix: take an object of the layer's "
        "cache"
    )


def uncached_calls_pass_through(kit: Kit) -> None:
    """For a call without a cache `read` returns None, and the original attention runs."""
    take = kit.plain()
    expected = kit.host.uncached(take.model)
    if expected is None:
        raise Skipped("the host has no call without a cache")
    forced = kit.forced()
    found = kit.host.uncached(forced.model)
    assert found is not None
    assert torch.equal(found, expected), (
        "a call without a cache gives another result: return None from read()"
    )
    assert forced.handle is not None
    assert forced.handle.status().calls == 0, "a call without a cache was served: return None from read()"


def clock_tells_the_clean_pass(kit: Kit) -> None:
    """`phase` tells the clean pass from noisy ones."""
    take = kit.plain()
    clock = kit.adapter.clock(take.model)
    if clock is None:
        raise Skipped("clock() returns None: roles that depend on the phase are refused")
    if type(kit.adapter).phase is Adapter.phase:
        raise AssertionError("the adapter has a clock but does not define phase()")
    phases: list[str] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        phases.append(kit.adapter.phase(args, kwargs))

    hook = clock.register_forward_pre_hook(record, with_kwargs=True)
    take.passes(0, (2, 1, 0))
    hook.remove()
    assert phases == ["denoise", "denoise", "clean"], (
        f"two noisy passes and a clean one are {phases}: is the clock called once per pass? does phase() "
        "compare with the timestep of the clean pass?"
    )


def _allows_weak_references(anchor: object) -> bool:
    try:
        weakref.ref(anchor)
    except TypeError:
        return False
    return True


CHECKS: Sequence[Any] = (
    fits,
    refuses_foreign_models,
    known_by_structure,
    other_signature_refused,
    layers_found,
    layers_in_order,
    heads_and_sizes,
    own_memory_is_the_hosts,
    read_counts_frames,
    arguments_belong_to_the_call,
    anchor_is_the_timeline,
    clock_tells_the_clean_pass,
    uncached_calls_pass_through,
)
