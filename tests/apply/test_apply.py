"""Taken in and out again, whatever else happens to the model meanwhile: nothing stays behind."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing.attention.module import HeadForcingMixin
from headforcing.errors import (
    AlreadyAppliedError,
    HeadForcingError,
    PatchedModuleError,
    RoleMapMismatchError,
    StreamActiveError,
    UnsupportedModelError,
    WindowError,
)
from headforcing.roles import Anchor, Local, SlidingWindow
from headforcing.testing import Snapshot, snapshot
from tests.hosts.rig import Rig


@pytest.fixture
def rig() -> Rig:
    return Rig(window=6)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@functools.cache
def _expected(roles: Any) -> list[Tensor]:
    rig = Rig(window=6)
    if roles is not None:
        hf.apply_head_forcing(rig.model, roles)
    return rig.video(rig.caches(), 3)


def is_plain(rig: Rig) -> bool:
    """The model gives the bits of a model that was never patched."""
    return equal(rig.video(rig.caches(), 3), _expected(None))


def is_forced(rig: Rig, roles: Any) -> bool:
    """The model gives the bits of a fresh model with these roles."""
    assert not equal(_expected(roles), _expected(None))
    return equal(rig.video(rig.caches(), 3), _expected(roles))


def attention(rig: Rig, layer: int = 0) -> Any:
    return rig.model.blocks[layer].self_attn


def is_clean(rig: Rig, before: Snapshot) -> bool:
    """No fact about the model differs, and it gives the unpatched bits."""
    assert before.diff(snapshot(rig.model)) == []
    return is_plain(rig)


# The snapshot itself ------------------------------------------------------------------------------


def _attribute(module: Any) -> None:
    module.note = 1


def _deleted(module: Any) -> None:
    del module.sink_size


def _number(module: Any) -> None:
    module.sink_size += 1


def _hook(module: Any) -> None:
    module.register_forward_hook(lambda *_: None)


def _forward(module: Any) -> None:
    module.forward = module.forward


def _training(module: Any) -> None:
    module.train()


def _one_bit(module: Any) -> None:
    module.q.weight[0, 0] = torch.nextafter(module.q.weight[0, 0], torch.tensor(9.0))


def _equal_parameter(module: Any) -> None:
    module.q.weight = nn.Parameter(module.q.weight.clone(), requires_grad=False)


def _equal_data(module: Any) -> None:
    module.q.weight.data = module.q.weight.data.clone()


def _gradient(module: Any) -> None:
    module.q.weight.requires_grad_(True)


def _buffer(module: Any) -> None:
    module.register_buffer("extra", torch.zeros(1))


def _equal_child(module: Any) -> None:
    module.q = copy.copy(module.q)


def _class(module: Any) -> None:
    module.__class__ = type("Other", (type(module),), {})


RESIDUES = [
    (_attribute, "note: new"),
    (_deleted, "sink_size: gone"),
    (_number, "sink_size: 0 -> 1"),
    (_hook, "_forward_hooks:"),
    (_forward, "forward: new"),
    (_training, "training: False -> True"),
    (_one_bit, "q.weight:"),
    (_equal_parameter, "q.weight:"),
    (_equal_data, "q.weight:"),
    (_gradient, "q.weight:"),
    (_buffer, "_buffers:"),
    (_equal_child, "q: module:"),
    (_class, "class:"),
]


@pytest.mark.parametrize(("leave", "line"), RESIDUES, ids=[f.__name__ for f, _ in RESIDUES])
def test_a_snapshot_sees_every_kind_of_residue(rig: Rig, leave: Callable[[Any], None], line: str) -> None:
    before = snapshot(rig.model)
    assert before == snapshot(rig.model)
    with torch.no_grad():
        leave(attention(rig))
    difference = before.diff(snapshot(rig.model))
    assert any(line in found and "blocks.0.self_attn" in found for found in difference), difference


def test_a_snapshot_sees_a_module_put_back_as_an_equal_copy(rig: Rig) -> None:
    before = snapshot(rig.model)
    rig.model.blocks[0].self_attn = copy.copy(attention(rig))
    assert before.diff(snapshot(rig.model)) != []


def test_a_snapshot_says_when_nan_weights_are_the_same(rig: Rig) -> None:
    attention(rig).q.weight.fill_(torch.nan)
    assert snapshot(rig.model) == snapshot(rig.model)


# Remove -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_after_remove_the_model_is_what_it_was(dtype: torch.dtype, training: bool) -> None:
    rig = Rig(dtype=dtype)
    expected = rig.video(rig.caches(), 3)
    rig.model.train(training)
    before = snapshot(rig.model)
    handle = hf.apply_head_forcing(rig.model, Local())
    assert before.diff(snapshot(rig.model)) != []
    rig.model.eval()
    rig.video(rig.caches(), 3)
    rig.model.train(training)
    handle.remove()
    assert before.diff(snapshot(rig.model)) == []
    assert equal(rig.model.eval() and rig.video(rig.caches(), 3), expected)


def test_another_model_of_the_same_class_is_never_touched(rig: Rig) -> None:
    other = Rig(window=6)
    before, cls = snapshot(other.model), dict(vars(type(attention(rig))))
    hf.apply_head_forcing(rig.model, Local())
    rig.video(rig.caches(), 3)
    assert is_clean(other, before)
    assert dict(vars(type(attention(other)))) == cls


def test_remove_twice_is_remove_once(rig: Rig) -> None:
    before = snapshot(rig.model)
    handle = hf.apply_head_forcing(rig.model, Local())
    for _ in range(2):
        handle.remove()
        hf.remove_head_forcing(rig.model)
        assert is_clean(rig, before)


def test_removing_what_was_never_applied_changes_nothing(rig: Rig) -> None:
    before = snapshot(rig.model)
    hf.remove_head_forcing(rig.model)
    hf.remove_head_forcing(nn.Linear(2, 2))
    assert is_clean(rig, before)


def test_an_old_handle_does_not_remove_a_newer_application(rig: Rig) -> None:
    old = hf.apply_head_forcing(rig.model, Local())
    old.remove()
    new = hf.apply_head_forcing(rig.model, Anchor())
    old.remove()
    assert is_forced(rig, Anchor())
    new.remove()
    assert is_plain(rig)


@pytest.mark.parametrize("fail", [False, True], ids=["normally", "by an exception"])
def test_leaving_the_with_block_removes(rig: Rig, fail: bool) -> None:
    before = snapshot(rig.model)
    try:
        with hf.apply_head_forcing(rig.model, Local()) as handle:
            assert isinstance(handle, hf.HeadForcing)
            assert is_forced(rig, Local())
            if fail:
                raise KeyError("mine")
    except KeyError:
        assert fail
    assert is_clean(rig, before)


FAILS = [*itertools.product((0, 1), ("q", "o", "self_attn", "cross_attn"), (ValueError, KeyboardInterrupt))]
FAST_FAILS = [(0, "q", KeyboardInterrupt), (1, "o", ValueError), (0, "cross_attn", ValueError)]


@pytest.mark.parametrize(
    ("layer", "place", "error"),
    [pytest.param(*fail, marks=() if fail in FAST_FAILS else pytest.mark.slow) for fail in FAILS],
)
def test_after_an_exception_in_the_middle_of_a_forward_remove_leaves_nothing(
    rig: Rig, layer: int, place: str, error: type[BaseException]
) -> None:
    before = snapshot(rig.model)
    handle = hf.apply_head_forcing(rig.model, Local())
    caches = rig.caches()
    rig.video(caches, 2)
    block: Any = rig.model.blocks[layer]
    target = getattr(block, place, None) or getattr(block.self_attn, place)

    def fail(*_: Any) -> None:
        raise error("in the middle")

    hook = target.register_forward_hook(fail)
    with pytest.raises(error, match="in the middle"):
        rig.call(caches, 6, 3)
    hook.remove()
    handle.remove()
    assert is_clean(rig, before)


def test_what_the_user_changed_meanwhile_stays_changed(rig: Rig) -> None:
    handle = hf.apply_head_forcing(rig.model, Local())
    attention(rig).sink_size = 1
    attention(rig).note = "mine"
    attention(rig).q.weight.mul_(2)
    hook = attention(rig).register_forward_hook(lambda *_: None)
    rig.model.train()
    handle.remove()
    assert (attention(rig).sink_size, attention(rig).note, attention(rig).training) == (1, "mine", True)
    assert len(attention(rig)._forward_hooks) == 1
    hook.remove()
    assert not attention(rig)._forward_hooks


def test_a_module_the_user_put_in_place_of_ours_is_left_alone(rig: Rig) -> None:
    handle = hf.apply_head_forcing(rig.model, Local())
    mine = copy.deepcopy(Rig().model.blocks[0].self_attn)
    rig.model.blocks[0].self_attn = mine
    handle.remove()
    assert attention(rig) is mine
    assert not isinstance(attention(rig, 1), HeadForcingMixin)


def test_a_dropped_handle_can_be_had_again_and_removed(rig: Rig) -> None:
    hf.apply_head_forcing(rig.model, Local())
    gc.collect()
    assert is_forced(rig, Local())
    assert hf.apply_head_forcing(rig.model, Local()).status().calls > 0
    hf.remove_head_forcing(rig.model)
    assert is_plain(rig)
    assert "_headforcing" not in vars(attention(rig))


def test_a_dropped_handle_does_not_lose_the_original_module_objects(rig: Rig) -> None:
    before = snapshot(rig.model)  # holds the originals, as a list of layers elsewhere would
    hf.apply_head_forcing(rig.model, Local())
    gc.collect()
    hf.remove_head_forcing(rig.model)
    assert before.diff(snapshot(rig.model)) == []


# Apply twice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [Local(), [[Local()] * 4] * 2, hf.RoleMap.uniform(Local(), 2, 4)], ids=repr)
def test_applying_the_same_roles_again_gives_the_same_handle(rig: Rig, same: Any) -> None:
    handle = hf.apply_head_forcing(rig.model, Local())
    while_applied = snapshot(rig.model)
    assert hf.apply_head_forcing(rig.model, same) is handle
    assert while_applied.diff(snapshot(rig.model)) == []


@pytest.mark.parametrize(
    ("roles", "options"),
    [(Anchor(), {}), (Local(), {"window": 21}), (Local(), {"store": "reference"})],
    ids=["roles", "window", "store"],
)
def test_applying_something_else_is_refused_unless_it_shall_replace(
    rig: Rig, roles: Any, options: dict[str, Any]
) -> None:
    before = snapshot(rig.model)
    handle = hf.apply_head_forcing(rig.model, Local())
    caches = rig.caches()
    rig.video(caches, 2)
    while_applied = snapshot(rig.model)
    with pytest.raises(AlreadyAppliedError, match=r"already.*remove it first.*replace=True"):
        hf.apply_head_forcing(rig.model, roles, **options)
    assert while_applied.diff(snapshot(rig.model)) == []
    assert [stream.committed for stream in handle.status().streams] == [3]
    new = hf.apply_head_forcing(rig.model, roles, replace=True, **options)
    assert new is not handle
    assert not new.status().streams
    handle.remove()  # of the application that was replaced: nothing is left of it
    assert new.status().layers == 2
    assert isinstance(attention(rig), HeadForcingMixin)
    new.remove()
    assert is_clean(rig, before)


def test_replacing_with_roles_that_do_not_fit_keeps_what_is_applied(rig: Rig) -> None:
    hf.apply_head_forcing(rig.model, Local())
    while_applied = snapshot(rig.model)
    with pytest.raises(WindowError):
        hf.apply_head_forcing(rig.model, Local(recent=4), replace=True)
    with pytest.raises(RoleMapMismatchError):
        hf.apply_head_forcing(rig.model, [[Anchor()] * 4], replace=True)
    assert while_applied.diff(snapshot(rig.model)) == []


def test_replaced_roles_begin_with_an_empty_memory(rig: Rig) -> None:
    hf.apply_head_forcing(rig.model, Local())
    caches = rig.caches()
    rig.video(caches, 3)
    hf.apply_head_forcing(rig.model, Anchor(), replace=True)
    caches.new_video()
    assert equal(rig.video(caches, 3), _expected(Anchor()))


@pytest.mark.parametrize("cycles", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_cycles_leave_no_tensor_and_no_object_of_ours(rig: Rig, cycles: int) -> None:
    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        ours = sum(str(type(o).__module__).startswith("headforcing.") for o in objects)
        return sum(issubclass(type(o), Tensor) for o in objects), ours

    roles = hf.RoleMap.uniform(Local(), 2, 4)
    before = snapshot(rig.model)
    counts = []
    for cycle in range(cycles):
        with hf.apply_head_forcing(rig.model, roles):
            if cycle % (cycles // 5) == 0:
                rig.video(rig.caches(), 2)
        if cycle in (1, cycles - 1):
            counts.append(alive())
    assert counts[0] == counts[1]
    assert before.diff(snapshot(rig.model)) == []


def test_nothing_keeps_the_model_alive_when_handle_and_model_are_dropped() -> None:
    rig = Rig()
    handle, caches = hf.apply_head_forcing(rig.model, Local()), rig.caches()
    rig.video(caches, 2)
    alive = [weakref.ref(o) for o in (rig.model, attention(rig), attention(rig).q.weight, handle)]
    del rig, handle, caches
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


# Copies -------------------------------------------------------------------------------------------


def _deep(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickled(model: nn.Module) -> nn.Module:
    twin: nn.Module = pickle.loads(pickle.dumps(model))
    return twin


@pytest.fixture(params=[_deep, _pickled], ids=["deep copy", "pickle"])
def twin(request: pytest.FixtureRequest, rig: Rig) -> Rig:
    """A copy made in the middle of a head-forced video."""
    hf.apply_head_forcing(rig.model, Local())
    rig.video(rig.caches(), 2)
    other = Rig(window=6)
    other.model = request.param(rig.model)
    return other


def test_a_copy_is_patched_like_the_original(rig: Rig, twin: Rig) -> None:
    assert type(attention(twin)) is type(attention(rig))
    assert is_forced(twin, Local())


def test_a_copy_runs_its_own_weights(rig: Rig, twin: Rig) -> None:
    for block in twin.model.blocks:
        block.self_attn.v.weight.zero_()
    assert not is_forced(twin, Local())
    assert is_forced(rig, Local())


def test_a_copy_starts_with_an_empty_memory_and_counts_anew(rig: Rig, twin: Rig) -> None:
    handle = hf.apply_head_forcing(twin.model, Local())
    assert handle.status().calls == 0
    assert not handle.status().streams
    twin.video(twin.caches(), 2)
    assert handle.status().calls == 8


def test_a_copy_is_removed_alone(rig: Rig, twin: Rig) -> None:
    hf.remove_head_forcing(twin.model)
    assert type(attention(twin)) is type(Rig().model.blocks[0].self_attn)
    assert not any("_headforcing" in vars(module) for module in twin.model.modules())
    assert is_plain(twin)
    assert is_forced(rig, Local())


def test_removing_the_original_leaves_the_copy_applied(rig: Rig, twin: Rig) -> None:
    hf.remove_head_forcing(rig.model)
    assert is_plain(rig)
    assert is_forced(twin, Local())


def test_a_copy_outlives_its_original(rig: Rig, twin: Rig) -> None:
    del rig.model
    gc.collect()
    assert is_forced(twin, Local())


# Saving and loading -------------------------------------------------------------------------------


def test_the_state_dict_is_the_same_while_applied(rig: Rig) -> None:
    before = rig.model.state_dict()
    hf.apply_head_forcing(rig.model, Local())
    rig.video(rig.caches(), 2)
    after = rig.model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)


def test_weights_loaded_while_applied_take_effect_and_stay(rig: Rig) -> None:
    other = Rig(window=6)
    other.model.randomize(torch.Generator().manual_seed(7))
    expected = other.video(other.caches(), 3)
    with hf.apply_head_forcing(rig.model, Local()):
        assert is_forced(rig, Local())
        result = rig.model.load_state_dict(other.model.state_dict())
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert not is_forced(rig, Local())
    assert equal(rig.video(rig.caches(), 3), expected)


def test_a_file_saved_while_applied_is_the_file_saved_before(rig: Rig, tmp_path: Any) -> None:
    rig.model.save_weights(tmp_path / "before")
    torch.save(rig.model.state_dict(), tmp_path / "before.pt")
    with hf.apply_head_forcing(rig.model, Local()):
        rig.model.save_weights(tmp_path / "while")
        torch.save(rig.model.state_dict(), tmp_path / "while.pt")
        assert (tmp_path / "while").read_bytes() == (tmp_path / "before").read_bytes()
        saved = torch.load(tmp_path / "while.pt", weights_only=True)
    assert list(saved) == list(rig.model.state_dict())


def test_train_and_eval_reach_every_attention_module(rig: Rig) -> None:
    handle = hf.apply_head_forcing(rig.model, Local())
    for training in (True, False):
        rig.model.train(training)
        assert {module.training for module in rig.model.modules()} == {training}
    assert is_forced(rig, Local())
    handle.remove()
    assert is_plain(rig)


def test_a_move_to_another_dtype_reaches_the_patched_weights(rig: Rig) -> None:
    low = Rig(window=6, dtype=torch.bfloat16)
    hf.apply_head_forcing(low.model, Local())
    expected = low.video(low.caches(), 3)
    hf.apply_head_forcing(rig.model, Local())
    rig.model.to(torch.bfloat16)
    rig.dtype = torch.bfloat16
    assert equal(rig.video(rig.caches(), 3), expected)


# Wrappers and other patchers ----------------------------------------------------------------------


class Wrapper(nn.Module):
    """What WanDiffusionWrapper is to its model: it holds it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize("wrap", [Wrapper, nn.Sequential, nn.DataParallel])
def test_a_wrapper_that_holds_the_model_may_be_given(rig: Rig, wrap: Any) -> None:
    wrapper = wrap(rig.model)
    before = snapshot(wrapper)
    handle = hf.apply_head_forcing(wrapper, Local())
    assert is_forced(rig, Local())
    assert hf.apply_head_forcing(rig.model, Local()) is handle
    handle.remove()
    assert before.diff(snapshot(wrapper)) == []
    assert is_plain(rig)


def test_a_module_registered_under_two_names_is_replaced_under_both(rig: Rig) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attentions = nn.ModuleList(block.self_attn for block in rig.model.blocks)
            self.model = rig.model

    listed = Listed()
    before = snapshot(listed)
    handle = hf.apply_head_forcing(listed, Local())
    assert is_forced(rig, Local())
    assert handle.status().active
    handle.remove()
    assert before.diff(snapshot(listed)) == []


def test_parts_applied_one_by_one_are_removed_together(rig: Rig) -> None:
    before = snapshot(rig.model)
    handles = [
        hf.apply_head_forcing(block, role, chunk=3)
        for block, role in zip(rig.model.blocks, (Local(), Anchor()), strict=True)
    ]
    hf.remove_head_forcing(rig.model)
    assert before.diff(snapshot(rig.model)) == []
    assert len(handles) == 2


def _hook_like_accelerate(module: Any) -> None:
    """`accelerate.hooks.add_hook_to_module`, reduced to what it does to the module."""
    module._hf_hook, module._old_forward = object(), module.forward

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)


def _unhook_like_accelerate(module: Any) -> None:
    module.forward = module._old_forward
    del module._hf_hook, module._old_forward


def _hook_with_accelerate(module: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())


def _unhook_with_accelerate(module: Any) -> None:
    pytest.importorskip("accelerate.hooks").remove_hook_from_module(module)


patchers = pytest.mark.parametrize(
    ("hook", "unhook"),
    [
        (_hook_like_accelerate, _unhook_like_accelerate),
        (_hook_with_accelerate, _unhook_with_accelerate),
    ],
    ids=["imitation", "accelerate"],
)


@patchers
@pytest.mark.parametrize("layer", [0, 1])
def test_a_forward_hooked_before_apply_is_refused_and_nothing_changes(
    rig: Rig, layer: int, hook: Any, unhook: Any
) -> None:
    hook(attention(rig, layer))
    before = snapshot(rig.model)
    with pytest.raises(PatchedModuleError, match=rf"blocks\.{layer}\.self_attn.*forward.*remove it"):
        hf.apply_head_forcing(rig.model, Local())
    assert before.diff(snapshot(rig.model)) == []


@patchers
def test_a_forward_hooked_and_unhooked_while_applied_leaves_no_residue(
    rig: Rig, hook: Any, unhook: Any
) -> None:
    before = snapshot(rig.model)
    handle = hf.apply_head_forcing(rig.model, Local())
    hook(attention(rig))
    assert is_forced(rig, Local())
    unhook(attention(rig))
    assert is_forced(rig, Local())
    handle.remove()
    assert is_clean(rig, before)


@patchers
def test_a_forward_still_hooked_at_remove_is_refused_and_nothing_changes(
    rig: Rig, hook: Any, unhook: Any
) -> None:
    before = snapshot(rig.model)
    handle = hf.apply_head_forcing(rig.model, Local())
    hook(attention(rig, 1))
    while_hooked = snapshot(rig.model)
    with pytest.raises(PatchedModuleError, match=r"blocks\.1\.self_attn.*remove it first"):
        handle.remove()
    assert while_hooked.diff(snapshot(rig.model)) == []
    assert is_forced(rig, Local())
    unhook(attention(rig, 1))
    handle.remove()
    assert is_clean(rig, before)


@patchers
def test_a_forward_hooked_and_unhooked_before_apply_is_no_obstacle(rig: Rig, hook: Any, unhook: Any) -> None:
    hook(attention(rig))
    unhook(attention(rig))
    before = snapshot(rig.model)
    handle = hf.apply_head_forcing(rig.model, Local())
    assert is_forced(rig, Local())
    handle.remove()
    assert is_clean(rig, before)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("early", [True, False], ids=["before apply", "while applied"])
@pytest.mark.parametrize("gone_first", [True, False], ids=["hook goes first", "hook stays longer"])
def test_hooks_of_the_user_fire_in_every_order_and_go_when_told(
    rig: Rig, kind: str, early: bool, gone_first: bool
) -> None:
    fired: list[str] = []
    before = snapshot(rig.model)

    def register() -> Any:
        return getattr(attention(rig), kind)(lambda module, *_: fired.append(type(module).__name__))

    hook = register() if early else None
    handle = hf.apply_head_forcing(rig.model, Local())
    hook = hook or register()
    assert is_forced(rig, Local())
    assert fired == ["HeadForcedDemoCausalSelfAttention"] * 6
    if gone_first:
        hook.remove()
    handle.remove()
    fired.clear()
    assert is_plain(rig)
    assert fired == ([] if gone_first else ["DemoCausalSelfAttention"] * 6)
    hook.remove()
    assert before.diff(snapshot(rig.model)) == []


class LowRank(nn.Module):
    """What PEFT puts in the place of a linear layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(64, 2, bias=False), nn.Linear(2, 64, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


@pytest.mark.parametrize("undone_first", [True, False], ids=["adapter goes first", "we go first"])
def test_a_projection_replaced_while_applied_takes_effect_at_once(rig: Rig, undone_first: bool) -> None:
    torch.manual_seed(0)
    before = snapshot(rig.model)
    base = attention(rig).q
    plain = Rig(window=6)
    adapted = LowRank(base)
    plain.model.blocks[0].self_attn.q = adapted
    adapted_output = plain.video(plain.caches(), 3)
    hf.apply_head_forcing(plain.model, Local())

    handle = hf.apply_head_forcing(rig.model, Local())
    attention(rig).q = adapted
    assert not is_forced(rig, Local())
    assert equal(rig.video(rig.caches(), 3), plain.video(plain.caches(), 3))
    if undone_first:
        attention(rig).q = base
        assert is_forced(rig, Local())
        handle.remove()
    else:
        handle.remove()
        assert equal(rig.video(rig.caches(), 3), adapted_output)
        attention(rig).q = base
    assert is_clean(rig, before)


# Compiled models ----------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[Callable[[Rig], Any]]:
    """Runs a rig through a compiled model; what was compiled is forgotten afterwards."""
    torch._dynamo.reset()
    yield functools.partial(torch.compile, backend="eager")
    torch._dynamo.reset()


def _through(rig: Rig, model: Any) -> list[Tensor]:
    """Two chunks in one pass each: as little as shows a difference, because compiling is slow."""
    own, caches, rig.model = rig.model, rig.caches(), model
    try:
        return [rig.call(caches, start, 3) for start in (0, 3)]
    finally:
        rig.model = own


def _small(roles: Any = None) -> tuple[Rig, list[Tensor]]:
    """A rig of one layer, and what it gives with these roles."""
    expected = Rig(layers=1)
    if roles is not None:
        hf.apply_head_forcing(expected.model, roles)
    return Rig(layers=1), _through(expected, expected.model)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["compile", "apply"])
def test_a_compiled_model_is_head_forced_whichever_comes_first(compiled: Any, first: str) -> None:
    rig, expected = _small(Local())
    before = snapshot(rig.model)
    model = compiled(rig.model) if first == "compile" else None
    handle = hf.apply_head_forcing(rig.model if model is None else model, Local())
    got = _through(rig, compiled(rig.model) if model is None else model)
    assert equal(got, expected)
    assert handle.status().calls == 2
    handle.remove()
    left = before.diff(snapshot(rig.model))
    assert [line for line in left if "_is_torch_compile" not in line] == []  # a mark of PyTorch's
    assert equal(_through(rig, rig.model), _small()[1])


@pytest.mark.parametrize("how", ["in place", pytest.param("wrapped", marks=pytest.mark.slow)])
def test_an_attention_module_compiled_by_itself_is_served_or_refused(compiled: Any, how: str) -> None:
    rig, expected = _small(Local())
    block: Any = rig.model.blocks[0]
    if how == "wrapped":
        block.self_attn = compiled(block.self_attn)
    else:
        block.self_attn.compile(backend="eager")
    before = snapshot(rig.model)
    try:
        hf.apply_head_forcing(rig.model, Local())
    except PatchedModuleError:
        assert before.diff(snapshot(rig.model)) == []
    else:
        assert equal(_through(rig, rig.model), expected)


def test_an_attention_module_compiled_while_applied_is_given_back_working_or_refused(compiled: Any) -> None:
    rig, expected = _small()
    handle = hf.apply_head_forcing(rig.model, Local())
    attention(rig).compile(backend="eager")
    try:
        handle.remove()
    except PatchedModuleError:
        return
    assert equal(_through(rig, rig.model), expected)


# An apply that fails ------------------------------------------------------------------------------

FAILURES: dict[str, tuple[Callable[[Rig], dict[str, Any]], type[HeadForcingError]]] = {
    "role too large": (lambda _: {"roles": Local(recent=4)}, WindowError),
    "one head too large": (
        lambda _: {"roles": [[Local()] * 4, [Local(), Local(), Local(), Anchor(sink=4)]]},
        WindowError,
    ),
    "too few layers": (lambda _: {"roles": [[Local()] * 4]}, RoleMapMismatchError),
    "too few heads": (lambda _: {"roles": [[Local()] * 3] * 2}, RoleMapMismatchError),
    "chunk over the window": (lambda _: {"roles": SlidingWindow(6), "chunk": 7}, WindowError),
    "heads differ between layers": (
        lambda rig: setattr(attention(rig, 1), "num_heads", 8) or {"roles": Local()},
        UnsupportedModelError,
    ),
    "windows differ between layers": (
        lambda rig: setattr(attention(rig, 1), "local_attn_size", 9) or {"roles": Local()},
        UnsupportedModelError,
    ),
    "no chunk length": (
        lambda rig: (
            [delattr(m, "num_frame_per_block") for m in (rig.model, attention(rig), attention(rig, 1))]
            and {"roles": Local()}
        ),
        UnsupportedModelError,
    ),
}


@pytest.mark.parametrize("case", FAILURES, ids=str)
def test_an_apply_that_fails_changes_nothing(rig: Rig, case: str) -> None:
    prepare, error = FAILURES[case]
    arguments = prepare(rig)
    before = snapshot(rig.model)
    with pytest.raises(error):
        hf.apply_head_forcing(rig.model, **arguments)
    assert before.diff(snapshot(rig.model)) == []


@pytest.mark.parametrize("layer", range(3))
def test_an_apply_that_fails_at_any_layer_changes_nothing(layer: int) -> None:
    class Final(type(Rig().model.blocks[0].self_attn)):  # type: ignore[misc]
        def __init_subclass__(cls) -> None:
            raise TypeError("this class is final")

    rig = Rig(layers=4)
    rig.model.blocks[layer + 1].self_attn.__class__ = Final
    before = snapshot(rig.model)
    with pytest.raises((TypeError, HeadForcingError), match="final"):
        hf.apply_head_forcing(rig.model, Local())
    assert before.diff(snapshot(rig.model)) == []


def test_apply_replace_and_remove_inside_a_call_are_refused(rig: Rig) -> None:
    handle = hf.apply_head_forcing(rig.model, Local())
    caches = rig.caches()
    rig.video(caches, 2)
    refused = []

    def interfere(*_: Any) -> None:
        for what in (
            handle.remove,
            handle.reset,
            handle.commit,
            lambda: hf.apply_head_forcing(rig.model, Anchor(), replace=True),
        ):
            with pytest.raises(StreamActiveError, match="wait until the model returns"):
                what()
            refused.append(what)

    hook = attention(rig).o.register_forward_hook(interfere)
    outputs = [rig.call(caches, 6, 3, draw=1), rig.call(caches, 6, 3)]
    hook.remove()
    assert len(refused) == 8
    assert equal(outputs, _expected(Local())[4:])
