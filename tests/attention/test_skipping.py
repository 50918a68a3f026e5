"""Attention that is not called remembers nothing: caches of diffusers, hooks on blocks, code in our place."""

from __future__ import annotations

import copy
import functools
import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing.errors import InactiveLayerWarning, PatchedModuleError, StreamError
from headforcing.roles import Anchor, Full, HeadRole, Local, Memory, SlidingWindow
from headforcing.testing import snapshot
from tests.hosts.rig import Rig
from tests.hosts.sana_wm import SanaWMHost

MIXED: tuple[HeadRole, ...] = (Local(), Anchor(), Memory(), SlidingWindow(6, positions="absolute"))


def apply(rig: Rig) -> hf.HeadForcing:
    return hf.apply_head_forcing(rig.model, [MIXED, MIXED[::-1]])


@pytest.fixture
def rig() -> Rig:
    return Rig(9)


@functools.cache
def alone() -> list[Tensor]:
    rig = Rig(9)
    apply(rig)
    return rig.video(rig.caches(), 4)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Caches of diffusers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks() -> Any:
    return pytest.importorskip("diffusers.hooks")


def taylor(hooks: Any, model: nn.Module) -> None:
    config = hooks.TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d+\.self_attn"])
    hooks.apply_taylorseer_cache(model, config)
    module = importlib.import_module("diffusers.hooks.hooks")
    module._set_cache_context(model, module.CacheContext("video"))


def skipped(hooks: Any, model: Any) -> None:
    """A hook of somebody else's that puts a forward of its own around a block."""
    registry = importlib.import_module("diffusers.hooks.hooks")

    class Skips(registry.ModelHook):  # type: ignore[misc, name-defined]
        def new_forward(self, module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return x

    registry.HookRegistry.check_if_exists_or_initialize(model.blocks[1]).register_hook(Skips(), "skips")


CACHES: dict[str, Callable[[Any, Any], None]] = {
    "taylorseer": taylor,
    "of somebody else": skipped,
}


def taken_out(model: nn.Module) -> None:
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        for name in list(registry.hooks) if registry is not None else ():
            registry.remove_hook(name, recurse=False)


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_was_there_before_is_refused(hooks: Any, rig: Rig, kind: str) -> None:
    CACHES[kind](hooks, rig.model)
    before = snapshot(rig.model)
    with pytest.raises(PatchedModuleError, match=r"blocks\.\d.*a cache of diffusers.*disable_cache\(\) or"):
        apply(rig)
    assert before.diff(snapshot(rig.model)) == []
    taken_out(rig.model)
    apply(rig)
    assert equal(rig.video(rig.caches(), 4), alone())


@pytest.mark.parametrize("how", ["applied", "a deep copy of it"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_comes_later_is_refused_at_the_next_chunk(
    hooks: Any, rig: Rig, kind: str, how: str
) -> None:
    apply(rig)
    if how != "applied":
        rig.model = copy.deepcopy(rig.model)
    caches = rig.caches()
    outs = rig.video(caches, 2)
    CACHES[kind](hooks, rig.model)
    if how == "applied" or kind == "taylorseer":
        with pytest.raises(PatchedModuleError, match=r"a cache of diffusers.*cannot be combined"):
            rig.call(caches, 6, 3, draw=1)
    taken_out(rig.model)
    outs += rig.video(caches, 2, first=2)
    assert equal(outs, alone())
    hf.remove_head_forcing(rig.model)
    assert equal(rig.video(rig.caches(), 4), Rig(9).video(rig.caches(), 4))


def test_a_cache_is_refused_at_the_first_chunk_of_a_video(hooks: Any, rig: Rig) -> None:
    apply(rig)
    skipped(hooks, rig.model)
    with pytest.raises(PatchedModuleError, match=r"blocks\.1: a cache of diffusers \(skips\)"):
        rig.video(rig.caches(), 1)


KINDS: dict[str, dict[str, Any]] = {
    "FirstBlockCacheConfig": {"threshold": 0.5},
    "PyramidAttentionBroadcastConfig": {"spatial_attention_block_skip_range": 2},
    "FasterCacheConfig": {"spatial_attention_block_skip_range": 2, "tensor_format": "BFCHW"},
    "TaylorSeerCacheConfig": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_caches_that_a_host_of_diffusers_enables_later_are_refused(
    hooks: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    host = SanaWMHost()
    if (reason := host.missing()) is not None:
        pytest.skip(reason)
    model: Any = host.model()
    helpers = importlib.import_module("diffusers.hooks._helpers")
    known = helpers.TransformerBlockMetadata(return_hidden_states_index=0)
    blocks = {type(model.transformer_blocks[0]): known, **helpers.TransformerBlockRegistry._registry}
    monkeypatch.setattr(helpers.TransformerBlockRegistry, "_registry", blocks)
    handle = hf.apply_head_forcing(model, Full())
    caches = host.caches(model)
    expected = [host.call(model, caches, start, 3, draw) for start in (0, 3) for draw in (1, 0)]
    now = (
        {}
        if kind in ("FirstBlockCacheConfig", "TaylorSeerCacheConfig")
        else {"current_timestep_callback": lambda: 500}
    )
    handle.reset()
    caches = host.caches(model)
    got = [host.call(model, caches, 0, 3, draw) for draw in (1, 0)]
    model.enable_cache(getattr(hooks, kind)(**KINDS[kind], **now))
    refusal = pytest.raises(PatchedModuleError, match=r"a cache of diffusers.*cannot be combined")
    with model.cache_context("video"), refusal:
        host.call(model, caches, 3, 3, 1)
    model.disable_cache()
    got += [host.call(model, caches, 3, 3, draw) for draw in (1, 0)]
    assert equal(got, expected)


# Caches of blocks ---------------------------------------------------------------------------------

Undo = Callable[[], None]


def cache_dit(model: Any) -> Undo:
    """The real one."""
    library = pytest.importorskip("cache_dit")
    blocks = library.BlockAdapter(
        transformer=model,
        blocks=model.blocks,
        forward_pattern=library.ForwardPattern.Pattern_3,
        check_forward_pattern=False,
        has_separate_cfg=False,
    )
    config = library.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=9.0)
    library.enable_cache(blocks, cache_config=config)
    return lambda: library.disable_cache(model)


def as_cache_dit(model: Any) -> Undo:
    """A forward in which other blocks are in place, and a mark; ParaAttention does the same."""
    own, blocks = model.forward, nn.ModuleList([Skipping(model.blocks)])

    def forward(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(model._modules, "blocks", blocks)
            return own(*args, **kwargs)

    model.forward, model._is_cached = forward, True

    def undo() -> None:
        del model.forward, model._is_cached

    return undo


class Skipping(nn.Module):
    """Runs all blocks, and every third time only the first one."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.blocks, self.calls = blocks, 0

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        self.calls += 1
        for block in self.blocks[:1] if self.calls % 3 == 0 else self.blocks:
            x = block(x, *args)
        return x


def named(name: str, **attributes: Any) -> Callable[[Any], Undo]:
    """Another forward on the class, under its published name; the class is one of this model alone."""

    def put(model: Any) -> Undo:
        own = type(model)
        cls: Any = type(
            own.__name__, (own,), {"forward": lambda self, *args, **more: own.forward(self, *args, **more)}
        )
        cls.forward.__name__ = name
        for key, value in attributes.items():
            setattr(cls, key, value)
        model.__class__ = cls

        def undo() -> None:
            model.__class__ = own

        return undo

    return put


def on_the_object(name: str) -> Callable[[Any], Undo]:
    def put(model: Any) -> Undo:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return type(self).forward(self, *args, **kwargs)

        forward.__name__ = name
        model.forward = types.MethodType(forward, model)

        def undo() -> None:
            del model.forward

        return undo

    return put


BLOCKS: dict[str, Callable[[Any], Undo]] = {
    "cache-dit": cache_dit,
    "as cache-dit": as_cache_dit,
    "TeaCache": named("teacache_forward", enable_teacache=True),
    "TeaCache by its switch": named("forward", enable_teacache=True),
    "TeaCache by its name": named("wan_teacache_forward"),
    "MagCache": on_the_object("magcache_forward"),
    "EasyCache": named("easycache_forward"),
    "TaylorSeer": on_the_object("taylorseer_forward"),
}
refused = functools.partial(
    pytest.raises, PatchedModuleError, match=r"the model: a cache of blocks \(.*cannot be combined"
)


FAST_BLOCKS = ("cache-dit", "TeaCache", "MagCache")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST_BLOCKS else pytest.mark.slow) for kind in BLOCKS]
)
def test_a_cache_of_blocks_is_refused_before_and_after_apply(rig: Rig, kind: str) -> None:
    undo = BLOCKS[kind](rig.model)
    before = snapshot(rig.model)
    with refused():
        apply(rig)
    assert before.diff(snapshot(rig.model)) == []
    undo()
    handle = apply(rig)
    for chunks in (0, 2):  # from the first pass on, also in the middle of a video
        caches = rig.caches()
        outs = rig.video(caches, chunks)
        undo = BLOCKS[kind](rig.model)
        with refused():
            rig.call(caches, 3 * chunks, 3, draw=1)
        with refused():
            apply(rig)
        undo()
        assert apply(rig) is handle
        assert equal(outs + rig.video(caches, 4 - chunks, first=chunks), alone())


def test_a_teacache_that_is_switched_off_skips_nothing(rig: Rig) -> None:
    named("teacache_forward", enable_teacache=False)(rig.model)
    apply(rig)
    assert equal(rig.video(rig.caches(), 4), alone())


@pytest.mark.parametrize("kind", ["as cache-dit", "TeaCache"])
def test_a_cache_that_is_not_recognised_would_be_noticed(
    rig: Rig, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headforcing.attention.skipped._cache_on", lambda module: None)
    with pytest.raises((pytest.fail.Exception, StreamError)):
        test_a_cache_of_blocks_is_refused_before_and_after_apply(rig, kind)


# Passes that leave a layer out --------------------------------------------------------------------


class Absent:
    """A block that does nothing while this is open."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __enter__(self) -> None:
        self.block.forward = lambda x, *args, **kwargs: x

    def __exit__(self, *_: object) -> None:
        del self.block.forward


def test_a_clean_pass_that_left_a_layer_out_must_be_run_again(rig: Rig) -> None:
    apply(rig)
    caches = rig.caches()
    outs = rig.video(caches, 2)
    noisy = rig.call(caches, 6, 3, draw=1)
    with Absent(rig.model.blocks[1]):
        rig.call(caches, 6, 3)
    for _ in range(2):
        with pytest.raises(StreamError, match=r"layer 1: not called in the last pass over frames 6\.\.8"):
            rig.call(caches, 9, 3, draw=1)
    outs += [noisy, rig.call(caches, 6, 3), *rig.video(caches, 1, first=3)]
    assert equal(outs, alone())


def test_a_noisy_pass_that_left_a_layer_out_leaves_no_trace_in_the_memory(rig: Rig) -> None:
    apply(rig)
    caches = rig.caches()
    outs = rig.video(caches, 2)
    with Absent(rig.model.blocks[1]):
        rig.call(caches, 6, 3, draw=1)
    rig.call(caches, 6, 3)
    assert torch.equal(rig.call(caches, 9, 3, draw=1), alone()[6])
    assert equal(outs, alone()[:4])


# Layers that nobody calls -------------------------------------------------------------------------


@pytest.fixture
def heard() -> Iterator[list[str]]:
    found: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def note(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
            if issubclass(category, InactiveLayerWarning):
                found.append(str(message))
            else:
                show(message, category, *args, **kwargs)

        warnings.showwarning = note
        yield found


def bypassed(rig: Rig, layer: int) -> None:
    """What a patch that comes after us does: it calls the class it knows."""
    module: Any = rig.model.blocks[layer].self_attn
    original = type(module).__mro__[2]
    module.forward = types.MethodType(original.forward, module)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("how", ["applied", "a deep copy of it"])
def test_a_layer_that_was_bypassed_is_told_of_once(rig: Rig, heard: list[str], layer: int, how: str) -> None:
    handle = apply(rig)
    if how != "applied":
        rig.model = copy.deepcopy(rig.model)
    bypassed(rig, layer)
    caches = rig.caches()
    rig.video(caches, 1)
    assert heard == []
    rig.video(caches, 3, first=1)
    (said,) = heard
    assert said.startswith(f"layer {layer}: never called with a cache")
    if how == "applied":
        assert handle.status().unserved == (layer,)
        assert f"  layer {layer}: not called so far\n" in str(handle.status())


def test_status_says_who_was_served(rig: Rig, heard: list[str]) -> None:
    handle = apply(rig)
    assert handle.status().unserved == (0, 1)
    assert "not called so far" not in str(handle.status())  # it says that there was no call
    rig.video(rig.caches(), 4)
    assert handle.status().unserved == ()
    assert "not called so far" not in str(handle.status())
    assert heard == []


def test_a_part_that_was_copied_alone_misses_no_layer(rig: Rig, heard: list[str]) -> None:
    apply(rig)
    twin = copy.deepcopy(rig.model.blocks[1])
    other = Rig(9)
    hf.apply_head_forcing(other.model, [MIXED, MIXED[::-1]])
    other.model.blocks[1] = twin
    other.model.blocks[0] = copy.deepcopy(rig.model.blocks[0])
    assert equal(other.video(other.caches(), 4), alone())
    assert heard == []
