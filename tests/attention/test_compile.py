"""torch.compile: an applied model is one graph, however long, deep and mixed.

What a graph looks like shows before code is generated, so the backends here are `eager` and `aot_eager`;
Inductor is asked once, in a slow test. Models have as few layers as a claim requires: tracing takes longest.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import headforcing as hf
from headforcing.adapters.base import Memo, find_adapter
from headforcing.attention import compile as traced
from headforcing.errors import StreamError, StreamShapeError
from headforcing.integrations.self_forcing import SelfForcing
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow
from headforcing.types import AttentionCall, TracedCall
from tests.examples import examples
from tests.hosts import find_host
from tests.hosts.rig import Rig

MIXED: tuple[HeadRole, ...] = (Local(), Anchor(), Memory(), SlidingWindow(6, positions="absolute"))
ONE_GRAPH = (
    "self_forcing",
    "causvid",
    "longlive",
    "longlive2",
    "infinity_rope",
    "fastvideo",
    "streamdiffusionv2",
)
"""Hosts whose calls can be taken apart; the one of Rolling Forcing has no room for these roles."""
PHASED = Memory(clean_window=6)
WARM, FEW, MANY = 2, 6, 100


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest keeps it all
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def apply(model: Any, mixed: tuple[HeadRole, ...] = MIXED) -> hf.HeadForcing:
    """Other roles in every layer, so that layers are not alike."""
    modules = [module for _, module in find_adapter(model).attentions(model)]
    heads, _ = find_adapter(model).heads(modules[0])
    size = len(mixed)
    turned = [mixed[layer % size :] + mixed[: layer % size] for layer in range(len(modules))]
    return hf.apply_head_forcing(model, [[row[head % size] for head in range(heads)] for row in turned])


def graphs() -> int:
    counted = torch._dynamo.utils.counters
    assert not counted["graph_break"]
    return int(counted["stats"]["unique_graphs"])


def compiled(model: nn.Module, first: str = "roles", backend: str = "eager") -> Any:
    if first == "roles":
        apply(model)
    wrapper = torch.compile(model, backend=backend, fullgraph=True)
    if first == "compile":
        apply(wrapper)
    return wrapper


@torch.no_grad()
def passes(host: Any, model: Any, caches: Any, chunks: range) -> list[Tensor]:
    step = host.chunk
    return [host.call(model, caches, chunk * step, step, draw) for chunk in chunks for draw in (1, 0)]


def eager_passes(name: str, chunks: int) -> list[Tensor]:
    host = find_host(name)
    model = host.model()
    apply(model)
    return passes(host, model, host.caches(model), range(chunks))


# One graph --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first", "chunks"),
    [*((name, "roles", FEW) for name in ONE_GRAPH), ("self_forcing", "compile", MANY)],
)
def test_a_model_is_one_graph_and_nothing_is_compiled_after_the_second_chunk(
    name: str, first: str, chunks: int
) -> None:
    host = find_host(name)
    model = compiled(host.model(), first)
    caches = host.caches(model)
    got = passes(host, model, caches, range(WARM))
    warm = graphs()
    assert warm <= 3  # frame 0 with the host's memory and without, and all later frames
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += passes(host, model, caches, range(WARM, chunks))
    assert graphs() == warm
    assert all(torch.equal(a, b) for a, b in zip(got, eager_passes(name, chunks), strict=True))


@pytest.mark.parametrize(
    "what", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("model", "blocks")), "attentions"]
)
@torch._dynamo.config.patch(recompile_limit=4)
def test_a_deeper_model_has_no_more_graphs(what: str) -> None:
    """More than dynamo would recompile before it gave up, were every layer a case of its own."""
    counts = []
    for layers in (1, 5):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        rig = Rig(9, layers=layers)
        apply(rig.model)
        caches, own = rig.caches(), rig.model
        if what == "model":
            rig.model = torch.compile(own, backend="eager", fullgraph=True)  # type: ignore[assignment]
        for block in own.blocks if what != "model" else ():
            (block if what == "blocks" else block.self_attn).compile(backend="eager", fullgraph=True)
        rig.video(caches, 3)
        counts.append(graphs())
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["self_forcing", "longlive2", "causvid", "fastvideo"])
def test_functionalised_graphs_give_the_same_bits(name: str) -> None:
    """What is written is copied and written back there, so nothing may be found by what it is copied from."""
    host = find_host(name)
    model = compiled(host.model(), backend="aot_eager")
    got = passes(host, model, host.caches(model), range(4))
    assert all(torch.equal(a, b) for a, b in zip(got, eager_passes(name, 4), strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("name", ["self_forcing", "longlive", "fastvideo"])
def test_inductor(name: str) -> None:
    host = find_host(name)
    model = compiled(host.model(), backend="inductor")
    caches = host.caches(model)
    got = passes(host, model, caches, range(WARM))
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += passes(host, model, caches, range(WARM, 4))
    assert graphs() <= 3
    torch.testing.assert_close(got, eager_passes(name, 4), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_counters_of_the_base_model_go_on() -> None:
    """Functionalised, what is written is copied and written back: the same counters and the same bits."""
    rigs = [Rig(9, layers=1), Rig(9, layers=1)]
    for rig, backend in zip(rigs, (None, "aot_eager"), strict=True):
        apply(rig.model)
        if backend is not None:
            rig.model = torch.compile(rig.model, backend=backend, fullgraph=True)  # type: ignore[assignment]
    caches = [rig.caches() for rig in rigs]
    outs = [rig.video(own, 4) for rig, own in zip(rigs, caches, strict=True)]
    assert caches[0].indices() == caches[1].indices()
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


# What else happens to a compiled model ----------------------------------------------------------------


@pytest.mark.slow
def test_new_video_guidance_and_passes_without_the_compiler() -> None:
    """Two caches in turns, a second video on one of them, and eager passes between compiled ones."""
    outs = []
    for backend in (None, "eager"):
        rig = Rig(9, layers=1)
        apply(rig.model)
        own = rig.model
        fast: Any = own if backend is None else torch.compile(own, backend=backend, fullgraph=True)
        first, second = rig.caches(), rig.caches()
        made = []
        for chunk in range(4):
            for caches in (first, second):
                rig.model = own if chunk == 2 else fast
                made.append(rig.call(caches, 3 * chunk, 3, draw=chunk))
        first.new_video()
        made.append(rig.call(first, 0, 3, draw=9))
        outs.append(made)
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


ACTIONS = ("again", "again", "next", "next", "other cache", "new video", "reset", "commit")


def test_a_layer_of_four_roles_is_one_graph_through_two_videos() -> None:
    """The two claims above and below, in short."""
    (eager, handle), (fast, other) = both_rigs()
    actions = ["next", "again", "next", "next", "new video", "again", "next"]
    got = course(fast, other, actions)
    warm = graphs()
    assert 0 < warm <= 4  # frame 0 with the host's memory, without, and with a new prompt; all later frames
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += course(fast, other, actions)
    assert graphs() == warm
    expected = course(eager, handle, actions) + course(eager, handle, actions)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.slow
@settings(max_examples=examples(6, nightly=250), deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), min_size=4, max_size=16))
def test_any_course_of_videos_is_the_one_without_a_compiler(actions: list[str]) -> None:
    made = [course(rig, handle, actions) for rig, handle in both_rigs()]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@functools.cache
def both_rigs() -> list[tuple[Rig, hf.HeadForcing]]:
    """The same model twice, the second one compiled."""
    rigs = [Rig(9, layers=1), Rig(9, layers=1)]
    handles = [apply(rig.model) for rig in rigs]
    rigs[1].model = torch.compile(rigs[1].model, backend="eager", fullgraph=True)  # type: ignore[assignment]
    return list(zip(rigs, handles, strict=True))


def course(rig: Rig, handle: hf.HeadForcing, actions: list[str]) -> list[Tensor]:
    outs, caches, ends = [], [rig.caches(), rig.caches()], [0, 0]
    turn, pending = 0, [False, False]
    for draw, action in enumerate(actions):
        if action == "other cache":
            turn = 1 - turn
        elif action == "new video":
            caches[turn].new_video()
            ends[turn] = 0
        elif action == "reset":
            handle.reset()
            for one in caches:
                one.new_video()
            ends = [0, 0]
        elif action == "commit":
            handle.commit()
            pending = [False, False]
            continue
        again = action != "next" and ends[turn] and pending[turn]
        start = ends[turn] - 3 if again else ends[turn]
        outs.append(rig.call(caches[turn], start, 3, draw=draw))
        ends[turn], pending[turn] = start + 3, True
    return outs


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_the_phase_is_noted_inside_the_graph(compiler: str) -> None:
    roles = (PHASED, Local())
    outs = []
    for backend in (None, compiler):
        rig = Rig(9, layers=1)
        apply(rig.model, roles)
        if backend is not None:
            rig.model = torch.compile(rig.model, backend=backend, fullgraph=True)  # type: ignore[assignment]
        outs.append(rig.video(rig.caches(), 4))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert graphs() > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autocast(backend: str) -> None:
    """A graph runs where autocast is off; the operator switches it on again."""
    outs = []
    for own in (None, backend):
        rig = Rig(9, layers=1)
        apply(rig.model)
        if own is not None:
            rig.model = torch.compile(rig.model, backend=own, fullgraph=True)  # type: ignore[assignment]
        caches = rig.caches()
        with torch.autocast("cpu", torch.bfloat16):
            outs.append([rig.call(caches, start, 3, draw=start) for start in (0, 3, 6)])
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0 if backend == "eager" else 0.05)


@pytest.mark.slow
def test_inference_mode() -> None:
    outs = []
    for own in (None, "aot_eager"):
        rig = Rig(9, layers=1)
        apply(rig.model)
        if own is not None:
            rig.model = torch.compile(rig.model, backend=own, fullgraph=True)  # type: ignore[assignment]
        with torch.inference_mode():
            caches = rig.caches()
            outs.append([rig.call(caches, start, 3, draw=start) for start in (0, 3, 6)])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@pytest.mark.slow
def test_a_copy_of_a_compiled_model_serves_itself() -> None:
    rig = Rig(9, layers=1)
    apply(rig.model)
    twin = Rig(9, layers=1)
    twin.model = copy.deepcopy(rig.model)
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.zero_()
    expected = rig.video(rig.caches(), 3)
    rig.model, twin.model = (torch.compile(r.model, backend="eager", fullgraph=True) for r in (rig, twin))  # type: ignore[assignment]
    silent = twin.video(twin.caches(), 3)
    got = rig.video(rig.caches(), 3)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not any(bool(out.any()) for out in silent)


@pytest.mark.parametrize(
    "what", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("model", "blocks")), "a block"]
)
def test_a_prompt_switch_after_compiling_takes_effect(what: str) -> None:
    """Dynamo does not look at hooks, so a graph from before they were put in would go on without them."""
    host = find_host("self_forcing")
    model: Any = host.model()
    handle, caches = apply(model), host.caches(model)
    fast = torch.compile(model, backend="eager") if what == "model" else model
    for block in {"model": (), "blocks": model.blocks, "a block": model.blocks[1:]}[what]:
        block.compile(backend="eager")
    outs = passes(host, fast, caches, range(2))
    host.switch_prompt(model, caches)
    handle.switch_prompt("continue")
    outs += passes(host, fast, caches, range(2, 4))
    expected = switched()
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    silent = passes(host, model, host.caches(model), range(4))
    assert not torch.equal(outs[-1], silent[-1])


@functools.cache
def switched() -> list[Tensor]:
    """The same without a compiler."""
    host = find_host("self_forcing")
    model = host.model()
    handle, caches = apply(model), host.caches(model)
    outs = passes(host, model, caches, range(2))
    host.switch_prompt(model, caches)
    handle.switch_prompt("continue")
    return outs + passes(host, model, caches, range(2, 4))


def test_attention_that_is_compiled_can_be_copied_and_saved() -> None:
    rig, twin = Rig(9, layers=1), Rig(9, layers=1)
    apply(rig.model)
    for block in rig.model.blocks:
        block.self_attn.compile(backend="eager", fullgraph=True)
    expected = rig.video(rig.caches(), 2)
    twin.model = copy.deepcopy(rig.model)
    torch.save(rig.model, io.BytesIO())
    with torch.no_grad():
        for parameter in rig.model.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(twin.video(twin.caches(), 2), expected, strict=True))


@pytest.mark.slow
def test_applied_in_inference_mode_and_compiled_outside_of_it() -> None:
    rig = Rig(9, layers=1)
    with torch.inference_mode():
        apply(rig.model)
    rig.model = torch.compile(rig.model, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    made = rig.video(rig.caches(), 2)
    assert all(torch.equal(a, b) for a, b in zip(made, eager_video(2), strict=True))


def eager_video(chunks: int) -> list[Tensor]:
    rig = Rig(9, layers=1)
    apply(rig.model)
    return rig.video(rig.caches(), chunks)


@pytest.mark.slow
def test_a_pass_that_failed_can_be_run_again() -> None:
    rig = Rig(9)
    apply(rig.model)
    own = rig.model
    rig.model = torch.compile(own, backend="eager", fullgraph=True)  # type: ignore[assignment]
    caches, made, broken = rig.caches(), [], own.blocks[1].self_attn
    for chunk in range(4):
        if chunk == 2:
            broken._headforcing.options.adapter.__dict__["project"] = _raise
            with pytest.raises(ArithmeticError):
                rig.call(caches, 6, 3, draw=2)
            del broken._headforcing.options.adapter.__dict__["project"]
        made += [rig.call(caches, 3 * chunk, 3, draw=draw) for draw in (1, 0)]
    expected = Rig(9)
    apply(expected.model)
    others = expected.caches()
    again = [expected.call(others, 3 * chunk, 3, draw=draw) for chunk in range(4) for draw in (1, 0)]
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


def _raise(module: nn.Module, call: AttentionCall) -> Any:
    if module is not None and call.start == 6:
        raise ArithmeticError("once")


def test_an_exported_program_is_refused() -> None:
    rig = Rig(9, layers=1)
    apply(rig.model)
    caches = rig.caches()
    attention = rig.model.blocks[0].self_attn
    told: dict[str, Any] = {}
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: told.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    rig.call(caches, 0, 3, draw=1)
    hook.remove()
    with pytest.raises(Exception, match=r"before torch\.export"), torch.no_grad():
        torch.export.export(attention, told["args"], told["kwargs"])


def test_a_number_without_an_owner_is_an_error() -> None:
    nobody = [torch.tensor(-1), torch.tensor(0)]
    with pytest.raises(StreamError, match="number -1, which is gone"):
        torch.ops.headforcing.note_phase(nobody, [], [], [], '["tuple",0,["tuple",0],{}]')


def test_a_wrong_call_says_so_as_without_a_compiler() -> None:
    rig = Rig(9, layers=1)
    apply(rig.model)
    attention = rig.model.blocks[0].self_attn
    fast = torch.compile(attention, backend="eager")
    for args in ((torch.zeros(1, 48, 64), *[None] * 9),):
        for run in (attention, fast):
            with pytest.raises(TypeError, match="too many positional"):
                run(*args)


def test_training_goes_to_the_original_between_graphs() -> None:
    host = find_host("self_forcing")
    model: Any = host.model()
    handle = apply(model)
    model.train().requires_grad_(True)
    grads = []
    for compiling in (False, True):
        if compiling:
            model.blocks[0].compile(backend="eager")
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that head forcing is inactive
            host.call(model, host.caches(model), 0, 3, 1).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert handle.status().calls == 0
    assert grads[0]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
def test_what_cannot_be_taken_apart_is_served_between_graphs() -> None:
    host = find_host("sana_wm")
    if (missing := host.missing()) is not None:
        pytest.skip(missing)
    model = host.model()
    apply(model)
    wrapper: Any = torch.compile(model, backend="eager")
    got = passes(host, wrapper, host.caches(model), range(4))
    assert torch._dynamo.utils.counters["graph_break"]
    assert all(torch.equal(a, b) for a, b in zip(got, eager_passes("sana_wm", 4), strict=True))


class Promises(SelfForcing):
    """Says that a number comes with what it returns."""

    def traced_call(self, module: nn.Module, args: Any, kwargs: Any) -> TracedCall | None:
        traced = super().traced_call(module, args, kwargs)
        return None if traced is None else dataclasses.replace(traced, numbers=1)


def test_a_broken_promise_is_said() -> None:
    rig = Rig(9, layers=1)
    hf.apply_head_forcing(rig.model, Local(), adapter=Promises())
    rig.model.blocks[0].self_attn.compile(backend="eager", fullgraph=True)
    with pytest.raises(StreamShapeError, match=r"traced_call\(\) promised .* and 1: mend"):
        rig.call(rig.caches(), 0, 3, draw=1)


# The operators ----------------------------------------------------------------------------------------


class Keeps(SelfForcing):
    """Leaves the host its memory: what `opcheck` copies would give it away anew, which is not declared."""

    def release(self, call: AttentionCall, memo: Memo) -> int:
        return 0


def recorded(rig: Rig, role: HeadRole) -> dict[str, tuple[Any, ...]]:
    """The arguments of the last call of every operator at frame 0, where copies of a cache may begin."""
    hf.apply_head_forcing(rig.model, role, adapter=Keeps())
    calls: dict[str, tuple[Any, ...]] = {}

    def noting(graph: Any, example: Any) -> Any:
        class Noting(torch.fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if "headforcing" in str(target):
                    calls[str(target).split(".")[1]] = args
                return super().call_function(target, args, kwargs)

        return Noting(graph).run

    rig.model = torch.compile(rig.model, backend=noting, fullgraph=True)  # type: ignore[assignment]
    rig.video(rig.caches(), 1)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attend", "note_phase"])
def test_opcheck(name: str) -> None:
    """PyTorch's own examination: what is written is declared, shapes are as promised, graphs agree."""
    rig = Rig(9, layers=1)
    calls = recorded(rig, PHASED)
    assert calls.keys() == {"attend", "note_phase"}
    with torch.no_grad():
        found = torch.library.opcheck(getattr(torch.ops.headforcing, name).default, calls[name])
    assert set(found.values()) == {"SUCCESS"}
    assert len(found) >= 4


@pytest.mark.parametrize("name", ["attend", "note_phase"])
def test_no_cuda_graph_is_captured_around_choices_made_in_python(name: str) -> None:
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.headforcing, name).default.tags


TENSORS = st.integers(0, 5).map(lambda n: torch.full((2,), n))
LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-2, 2) | st.text("ab .:_-é", max_size=4)
VALUES = st.recursive(
    LEAVES | TENSORS | TENSORS.map(lambda x: torch.view_as_complex(x.float().view(1, 2))),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_what_fits_comes_back_as_it_was(value: Any) -> None:
    assert traced.fits(value)
    template, *parts = traced._taken_apart(value, [])
    back = traced._together(traced._read(template), dict(zip(PARTS, ([], *parts), strict=True)))
    assert same(value, back)


PARTS = ("written", "tensor", "number", "float")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return bool(torch.equal(a, b)) if a.is_complex() else a is b
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("value", [object(), 'a"b', "a\\b", "a\nb", {1: 2}, [{"a": object()}], {1}, 1j])
def test_what_does_not_fit_is_not_taken_apart(value: Any) -> None:
    assert not traced.fits(value)


def test_what_is_written_is_not_read_twice() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    template, tensors, *_ = traced._taken_apart({"x": x, "y": y}, [y])
    assert tensors == [x]
    back = traced._together(
        traced._read(template), {"written": [y], "tensor": tensors, "number": [], "float": []}
    )
    assert back["y"] is y
    assert back["x"] is x


def test_numbers_die_with_what_they_stand_for() -> None:
    gc.collect()
    before = len(traced._served)
    rig = Rig(9, layers=1)
    handle = apply(rig.model)
    assert len(traced._served) > before
    handle.remove()
    del rig, handle
    gc.collect()
    assert len(traced._served) == before


def test_a_graph_without_phases_is_not_used_where_roles_ask_for_them() -> None:
    for role in (Local(2), Local(2, clean_window=2)):
        host = find_host("waypoint")
        model = host.model()
        handle = hf.apply_head_forcing(model, role)
        videos = []
        for run in (model, torch.compile(model, backend="eager", fullgraph=True, dynamic=False)):
            caches = host.caches(model)
            videos.append([host.call(run, caches, frame, 1, draw) for frame in range(4) for draw in (1, 0)])
            handle.reset()
        assert all(map(torch.equal, *videos)), role
