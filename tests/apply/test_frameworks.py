"""Life next to PEFT, accelerate, diffusers, transformers and torch's own wrappers: the real ones, tiny."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing.demo.model.attention import DemoConfig
from headforcing.demo.model.model import DemoModel
from headforcing.demo.world.words import PROMPT_WORDS
from headforcing.errors import PatchedModuleError, UnsupportedModelError
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow
from headforcing.testing import snapshot
from tests.hosts.rig import Rig

pytestmark = pytest.mark.xdist_group("diffusers")  # imports it once
MIXED: tuple[HeadRole, ...] = (Local(), Anchor(), Memory(), SlidingWindow(6, positions="absolute"))
ROLES = [MIXED, MIXED[::-1]]
CPU = torch.device("cpu")
THEY, WE = "they come first", "we come first"
ORDERS = pytest.mark.parametrize("first", [THEY, WE])


def each(names: tuple[str, ...], *values: Sequence[Any], fast: Sequence[tuple[Any, ...]]) -> Any:
    """One test per combination; all but those named are in the long run only."""
    cases = itertools.product(*values)
    marked = [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize(names, marked, indirect=[name for name in names if name == "accelerator"])


def play(rig: Rig, model: Any = None, chunks: int = 3) -> list[Tensor]:
    """A video on the rig's calls, through a wrapper of its model."""
    own, caches = rig.model, rig.caches()
    rig.model = own if model is None else model
    try:
        return rig.video(caches, chunks)
    finally:
        rig.model = own


def apply(model: Any) -> hf.HeadForcing:
    return hf.apply_head_forcing(model, ROLES)


@functools.cache
def plain() -> list[Tensor]:
    return play(Rig(9))


@functools.cache
def forced() -> list[Tensor]:
    rig = Rig(9)
    apply(rig.model)
    return play(rig)


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def patched(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "_headforcing" in vars(module)]


def modules(model: nn.Module) -> dict[str, Any]:
    """What a snapshot holds but the tensors, which offloading exchanges in every pass."""
    return {name: (id(module), type(module), set(vars(module))) for name, module in model.named_modules()}


@pytest.fixture
def rig() -> Rig:
    return Rig(9)


def test_the_two_references_differ() -> None:
    assert not equal(plain(), forced())


# PEFT ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft")


def adapter(peft: Any, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    targets = {"r": 2, "target_modules": ["q", "k", "v", "o"], "init_lora_weights": False}
    return peft.LoraConfig(**{**targets, **options})


def adapted(peft: Any, rig: Rig, **options: Any) -> Any:
    return peft.get_peft_model(rig.model, adapter(peft, **options)).eval()


KINDS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "bias": {"bias": "lora_only"}}


@pytest.mark.parametrize("kind", ["lora", "dora", pytest.param("bias", marks=pytest.mark.slow)])
def test_an_adapter_loaded_before_or_after_apply_has_the_same_effect(peft: Any, kind: str) -> None:
    before, after = Rig(9), Rig(9)
    model = adapted(peft, before, **KINDS[kind])
    alone = play(before, model)
    as_it_was = snapshot(model)
    handle = apply(model)
    apply(after.model)
    got = play(before, model)
    assert equal(got, play(after, adapted(peft, after, **KINDS[kind])))
    assert not equal(got, forced())
    handle.remove()
    assert as_it_was.diff(snapshot(model)) == []
    assert equal(play(before, model), alone)


@pytest.mark.parametrize("leaves_first", ["adapter", "head forcing"])
def test_an_adapter_that_came_and_went_while_applied_leaves_nothing(
    peft: Any, rig: Rig, leaves_first: str
) -> None:
    before = snapshot(rig.model)
    handle = apply(rig.model)
    model = adapted(peft, rig)
    play(rig, model)
    if leaves_first == "adapter":
        assert model.unload() is rig.model
        assert equal(play(rig), forced())
        handle.remove()
    else:
        handle.remove()
        assert not equal(play(rig, model), plain())
        model.unload()
    assert before.diff(snapshot(rig.model)) == []
    assert equal(play(rig), plain())


def test_adapters_are_switched_and_disabled_while_applied(peft: Any, rig: Rig) -> None:
    expected = {}
    for number, name in enumerate("xy"):
        other = Rig(9)
        apply(other.model)
        expected[name] = play(other, adapted(peft, other, seed=number))
    apply(rig.model)
    model = peft.get_peft_model(rig.model, adapter(peft), "x").eval()
    torch.manual_seed(1)
    model.add_adapter("y", peft.LoraConfig(r=2, target_modules=list("qkvo"), init_lora_weights=False))
    for name in "xyxy":
        model.set_adapter(name)
        assert equal(play(rig, model), expected[name])
    with model.disable_adapter():
        assert equal(play(rig, model), forced())
    model.set_adapter("x")
    model.delete_adapter("y")
    assert equal(play(rig, model), expected["x"])


def test_an_adapter_is_exchanged_in_place_while_applied(peft: Any, rig: Rig, tmp_path: Path) -> None:
    hotswap = pytest.importorskip("peft.utils.hotswap")
    other = Rig(9)
    apply(other.model)
    theirs = adapted(peft, other, seed=1)
    apply(rig.model)
    model = adapted(peft, rig)
    assert not equal(play(rig, model), play(other, theirs))
    theirs.save_pretrained(tmp_path)
    hotswap.hotswap_adapter(model, str(tmp_path), "default")
    assert equal(play(rig, model), play(other, theirs))


def test_an_adapter_exchanged_in_the_middle_of_a_video_counts_from_the_next_pass(peft: Any, rig: Rig) -> None:
    """Keys and values of the chunks before stay as they were made."""
    apply(rig.model)
    model = adapted(peft, rig)
    whole, caches = play(rig, model), rig.caches()
    model.eval()
    rig.model = model.base_model.model
    first = rig.video(caches, 2)
    with model.disable_adapter():
        second = rig.video(caches, 1, first=2)
        assert equal(rig.video(rig.caches(), 3), forced())
    assert equal(first, whole[:4])
    assert not any(torch.equal(a, b) for a, b in zip(second, whole[4:], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(second, forced()[4:], strict=True))


# What PEFT does to a model, in an order drawn by chance; merging rounds, so the twin does it as well.
MOVES = ("load", "merge", "unmerge", "scale", "unload", "apply", "remove")


class Walk:
    """A rig to which PEFT and we do things, or PEFT alone."""

    def __init__(self, peft: Any, ours: bool) -> None:
        self.peft, self.ours, self.rig = peft, ours, Rig(9)
        self.model: Any = None

    def move(self, what: str, number: int) -> None:
        layers = [] if self.model is None else [m for m in self.model.modules() if hasattr(m, "lora_A")]
        if what in ("apply", "remove") and self.ours:
            (apply if what == "apply" else hf.remove_head_forcing)(self.rig.model)
        elif what == "load" and self.model is None:
            self.model = adapted(self.peft, self.rig, seed=number)
        elif what == "merge" and layers and not layers[0].merged:
            self.model.merge_adapter()
        elif what == "unmerge" and layers and layers[0].merged:
            self.model.unmerge_adapter()
        elif what == "scale":
            for layer in layers:
                layer.scale_layer(0.5)
        elif what == "unload" and layers and not layers[0].merged:
            self.model.unload()
            self.model = None


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_whatever_peft_does_in_whatever_order_only_the_weights_count(peft: Any, seed: int) -> None:
    ours, alone = Walk(peft, True), Walk(peft, False)
    before = snapshot(ours.rig.model)
    chance = random.Random(seed)
    for number in range(14):
        what = chance.choice(MOVES)
        for walk in (ours, alone):
            walk.move(what, number)
        if number % 5 == 4:
            apply(alone.rig.model)
            expected = play(alone.rig, alone.model, 2)
            apply(ours.rig.model)
            assert equal(play(ours.rig, ours.model, 2), expected), what
            hf.remove_head_forcing(alone.rig.model)
    hf.remove_head_forcing(ours.rig.model)
    assert equal(play(ours.rig, ours.model), play(alone.rig, alone.model))
    for walk in (ours, alone):
        walk.move("unmerge", 0)
        walk.move("unload", 0)
    left = before.diff(snapshot(ours.rig.model))
    assert [line for line in left if ".weight" not in line] == []  # merging and unmerging rounds
    assert equal(play(ours.rig), play(alone.rig))


def test_an_adapter_saved_and_loaded_while_applied_is_the_same_file(
    peft: Any, rig: Rig, tmp_path: Path
) -> None:
    model = adapted(peft, rig)
    model.save_pretrained(tmp_path / "before")
    apply(model)
    expected = play(rig, model)
    model.save_pretrained(tmp_path / "while")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert "adapter_model.safetensors" in names
    for name in names:
        assert (tmp_path / "while" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    other = Rig(9)
    apply(other.model)
    assert equal(play(other, peft.PeftModel.from_pretrained(other.model, tmp_path / "while")), expected)


@pytest.mark.parametrize("how", ["deep copy", pytest.param("pickle", marks=pytest.mark.slow)])
def test_a_copy_of_an_adapted_model_is_a_model_of_its_own(peft: Any, rig: Rig, how: str) -> None:
    model = adapted(peft, rig)
    apply(model)
    expected = play(rig, model)
    twin = copy.deepcopy(model) if how == "deep copy" else pickle.loads(pickle.dumps(model))
    assert equal(play(rig, twin), expected)
    for name, weight in twin.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(weight)
    assert equal(play(rig, twin), forced())
    assert equal(play(rig, model), expected)
    hf.remove_head_forcing(twin)
    assert not patched(twin)
    assert equal(play(rig, twin), plain())
    assert equal(play(rig, model), expected)


def whole_attention(peft: Any, rig: Rig) -> Any:
    """PEFT trains a copy of whole modules."""
    config = adapter(peft, target_modules=["ffn.0"], init_lora_weights=True, modules_to_save=["self_attn"])
    return peft.get_peft_model(rig.model, config).eval()


def test_attention_that_peft_copied_is_refused_and_can_be_merged_first(peft: Any, rig: Rig) -> None:
    model = whole_attention(peft, rig)
    before = snapshot(model)
    for roles in (Local(), ROLES):  # not that the table has too few rows
        with pytest.raises(PatchedModuleError, match=r"modules_to_save.*take it out.*or merge_and_unload"):
            hf.apply_head_forcing(model, roles)
    assert before.diff(snapshot(model)) == []
    merged = model.merge_and_unload()
    apply(merged)
    assert equal(play(rig, merged), forced())


def test_attention_that_peft_copies_while_applied_must_go_before_remove(peft: Any, rig: Rig) -> None:
    handle = apply(rig.model)
    model = whole_attention(peft, rig)
    assert equal(play(rig, model), forced())
    with pytest.raises(PatchedModuleError, match=r"beside a copy that it trains \(modules_to_save\)"):
        apply(rig.model)
    with pytest.raises(PatchedModuleError, match=r"ModulesToSaveWrapper was put around it.*take that out"):
        handle.remove()
    assert model.unload() is rig.model
    with pytest.raises(
        PatchedModuleError, match=r"a copy of our module took its place.*remove_head_forcing\(model"
    ):
        handle.remove()  # PEFT leaves its trained copy in
    assert equal(play(rig), forced())
    hf.remove_head_forcing(rig.model)
    handle.remove()
    assert not patched(rig.model)
    assert equal(play(rig), plain())


def test_two_threads_on_one_adapted_model_get_what_they_would_get_alone(peft: Any, rig: Rig) -> None:
    model = adapted(peft, rig)
    apply(model)
    rig.model = model.base_model.model
    expected = [rig.video(rig.caches(), 4, draw=10 * number) for number in range(2)]
    results: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        for _ in range(2):
            results[number] = rig.video(rig.caches(), 4, draw=10 * number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(results[number], expected[number]) for number in range(2))


# accelerate ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accelerate() -> Any:
    return pytest.importorskip("accelerate")


@pytest.fixture
def accelerator(accelerate: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(cpu=True, mixed_precision=request.param)
    state.AcceleratorState._reset_state(True)


def precision(accelerator: Any) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if accelerator.mixed_precision == "bf16" else nullcontext()


@each(
    ("accelerator", "first", "keep"),
    *(["no", "bf16"], [THEY, WE], [True, False]),
    fast=[("no", THEY, True), ("bf16", THEY, True), ("bf16", WE, False)],
)
def test_a_prepared_model_is_forced_and_unwrapped(accelerator: Any, rig: Rig, first: str, keep: bool) -> None:
    before = snapshot(rig.model)
    if first == WE:
        handle = apply(rig.model)
        model = accelerator.prepare(rig.model)
    else:
        model = accelerator.prepare(rig.model)
        handle = apply(model)
    got = play(rig, model)
    other = Rig(9)
    apply(other.model)
    with precision(accelerator):
        expected = [out.float() for out in play(other)]
    assert equal(got, expected)
    assert accelerator.unwrap_model(model, keep_fp32_wrapper=keep) is rig.model
    handle.remove()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    theirs = (
        "forward",
        "_original_forward",
        "_is_accelerate_prepared",
    )  # left on the root by accelerate, with or without us
    left = before.diff(snapshot(rig.model))
    assert [line for line in left if not line.startswith(theirs)] == []
    assert equal(play(rig), plain())


def offloaded(accelerate: Any, model: nn.Module, how: str, folder: Path) -> None:
    if how == "cpu":
        accelerate.cpu_offload(model, CPU)
    elif how == "disk":
        accelerate.disk_offload(model, str(folder), CPU)
    else:
        accelerate.cpu_offload_with_hook(model, CPU)


@each(
    ("how", "first"),
    *(["cpu", "disk", "whole model"], [THEY, WE]),
    fast=[("disk", THEY), ("whole model", WE)],
)
def test_offloaded_weights_come_in_when_they_are_needed(
    accelerate: Any, rig: Rig, tmp_path: Path, first: str, how: str
) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    if first == WE:
        handle = apply(rig.model)
        offloaded(accelerate, rig.model, how, tmp_path)
    else:
        offloaded(accelerate, rig.model, how, tmp_path)
        assert equal(play(rig), plain())
        before = modules(rig.model)
        handle = apply(rig.model)
    assert equal(play(rig), forced())
    handle.remove()
    if first == THEY:
        assert modules(rig.model) == before
    assert equal(play(rig), plain())
    hooks.remove_hook_from_submodules(rig.model)
    assert equal(play(rig), plain())
    apply(rig.model)
    assert equal(play(rig), forced())


def test_offloading_that_ends_while_applied_changes_nothing(accelerate: Any, rig: Rig) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    handle = apply(rig.model)
    accelerate.cpu_offload(rig.model, CPU)
    play(rig, chunks=1)
    hooks.remove_hook_from_submodules(rig.model)
    assert equal(play(rig), forced())
    handle.remove()
    assert equal(play(rig), plain())
    assert not patched(rig.model)


def test_a_model_dispatched_over_devices_before_apply_is_refused(accelerate: Any, rig: Rig) -> None:
    accelerate.dispatch_model(rig.model, {"": "cpu"}, force_hooks=True)
    before = snapshot(rig.model)
    with pytest.raises(
        PatchedModuleError, match=r"blocks\.0\.self_attn.*accelerate.*remove it, apply, then add"
    ):
        apply(rig.model)
    assert before.diff(snapshot(rig.model)) == []
    assert equal(play(rig), plain())


def test_a_model_dispatched_over_devices_after_apply_is_forced(accelerate: Any, rig: Rig) -> None:
    """What the refusal advises."""
    hooks = pytest.importorskip("accelerate.hooks")
    handle = apply(rig.model)
    accelerate.dispatch_model(rig.model, {"": "cpu"}, force_hooks=True)
    assert equal(play(rig), forced())
    with pytest.raises(
        PatchedModuleError, match=r"accelerate hook.*remove it first, then remove head forcing"
    ):
        handle.remove()
    assert equal(play(rig), forced())
    hooks.remove_hook_from_submodules(rig.model)
    handle.remove()
    assert not patched(rig.model)
    assert equal(play(rig), plain())


def trained(rig: Rig, model: Any, accelerator: Any, optimizer: Any) -> list[Tensor]:
    """One step; the gradients and the new weights."""
    model.train()
    optimizer.zero_grad()
    frames = rig.noise(0, 3)
    out = model(frames, t=torch.full((1,), 0.5), context=torch.arange(PROMPT_WORDS)[None])
    accelerator.backward((out - frames).square().mean())
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    grads = [weight.grad.clone() for weight in weights if weight.grad is not None]
    optimizer.step()
    model.eval()
    return [*grads, *(weight.detach().clone() for weight in weights)]


@each(
    ("accelerator", "whose", "while_applied"),
    *(["no", "bf16"], ["all weights", "adapter"], [False, True]),
    fast=[("no", "all weights", False), ("bf16", "adapter", True)],
)
def test_enable_evaluate_disable_train_enable(
    peft: Any, accelerator: Any, whose: str, while_applied: bool
) -> None:
    rigs = [Rig(9), Rig(9)]
    models = [
        rig.model.requires_grad_(True) if whose == "all weights" else adapted(peft, rig) for rig in rigs
    ]
    optimizers = [torch.optim.AdamW([w for w in m.parameters() if w.requires_grad], 1e-2) for m in models]
    (ours, step), (alone, other_step) = (
        accelerator.prepare(model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)
    )
    outs = []
    for _ in range(2):
        handle = apply(ours)
        outs.append(play(rigs[0], ours, 2))
        if not while_applied:
            handle.remove()
        got = trained(rigs[0], ours, accelerator, step)
        assert equal(got, trained(rigs[1], alone, accelerator, other_step))
        handle.remove()
    assert not equal(*outs)
    apply(ours), apply(alone)
    assert equal(play(rigs[0], ours, 2), play(rigs[1], alone, 2))


# diffusers and transformers -----------------------------------------------------------------------


def windowed() -> DemoModel:
    """What a rig holds, also on the meta device."""
    model = DemoModel(DemoConfig(dim=64, heads=4, layers=2, grid=(4, 4)))
    model.local_attn_size = 9
    return model


@functools.cache
def diffusers_class() -> Any:
    """The demo model as a citizen of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    loaders = pytest.importorskip("diffusers.loaders")
    register = pytest.importorskip("diffusers.configuration_utils").register_to_config

    class Citizen(diffusers.ModelMixin, diffusers.ConfigMixin, loaders.PeftAdapterMixin):  # type: ignore[misc]
        _supports_group_offloading = True

        @register
        def __init__(self) -> None:
            super().__init__()
            self.inner = windowed()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    return Citizen


@functools.cache
def transformers_class() -> Any:
    """The demo model as a citizen of transformers."""
    transformers = pytest.importorskip("transformers")

    class Settings(transformers.PretrainedConfig):  # type: ignore[misc]
        model_type = "headforcing-demo"

    class Citizen(transformers.PreTrainedModel):  # type: ignore[misc]
        config_class = Settings

        def __init__(self, config: Any = None) -> None:
            super().__init__(config or Settings())
            self.inner = windowed()
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    return Citizen


CITIZENS = {"diffusers": diffusers_class, "transformers": transformers_class}


def citizen(rig: Rig, of: str = "diffusers") -> Any:
    model = CITIZENS[of]()()
    model.inner = rig.model
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("of", CITIZENS)
def test_save_pretrained_while_applied_writes_the_model_alone(rig: Rig, tmp_path: Path, of: str) -> None:
    model = citizen(rig, of)
    model.save_pretrained(tmp_path / "before")
    apply(model)
    assert equal(play(rig, model), forced())
    model.save_pretrained(tmp_path / "while")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert any(name.endswith(".safetensors") for name in names)
    for name in names:
        assert (tmp_path / "while" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "while").eval().requires_grad_(False)
    assert not patched(loaded)
    loaded.inner.freqs = rig.model.freqs  # neither a parameter nor a buffer, so nobody saves it
    assert equal(play(rig, loaded), plain())


@each(
    ("level", "first"),
    *(["leaf_level", "block_level"], [THEY, WE]),
    fast=[("leaf_level", WE), ("block_level", THEY)],
)
def test_group_offloading(rig: Rig, level: str, first: str) -> None:
    model = citizen(rig)
    groups = {"num_blocks_per_group": 1} if level == "block_level" else {}
    if first == THEY:
        model.enable_group_offload(CPU, CPU, level, **groups)
        assert equal(play(rig, model), plain())
        before = snapshot(model)
        handle = apply(model)
    else:
        handle = apply(model)
        model.enable_group_offload(CPU, CPU, level, **groups)
    assert equal(play(rig, model), forced())
    handle.remove()
    assert equal(play(rig, model), plain())
    if first == THEY:
        assert before.diff(snapshot(model)) == []
    apply(model)
    assert equal(play(rig, model), forced())


def test_group_offloading_that_ends_while_applied_changes_nothing(rig: Rig) -> None:
    model = citizen(rig)
    handle = apply(model)
    model.enable_group_offload(CPU, CPU, "leaf_level")
    play(rig, model, 1)
    for module in model.modules():
        if hasattr(module, "_diffusers_hook"):
            for name in list(module._diffusers_hook.hooks):
                module._diffusers_hook.remove_hook(name, recurse=False)
    assert equal(play(rig, model), forced())
    handle.remove()
    assert equal(play(rig, model), plain())


def test_weights_stored_in_another_precision_are_cast_in_every_layer() -> None:
    outs = []
    for first in (True, False):
        rig = Rig(9)
        model = citizen(rig)
        handle = apply(model) if first else None
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        handle = handle or apply(model)
        outs.append(play(rig, model))
        handle.remove()
        outs.append(play(rig, model))
    assert equal(outs[0], outs[2])
    assert equal(outs[1], outs[3])
    assert not equal(outs[0], outs[1])


def test_adapters_of_diffusers_are_loaded_switched_mixed_and_unloaded_while_applied(
    peft: Any, rig: Rig
) -> None:
    outs: list[list[list[Tensor]]] = []
    for ours in (True, False):
        rig = Rig(9)
        model = citizen(rig)
        before = snapshot(model)
        handle = apply(model) if ours else None
        model.add_adapter(adapter(peft, 0), "a")
        with pytest.warns(UserWarning, match="peft_config"):
            model.add_adapter(adapter(peft, 0, r=3), "b")
        model.requires_grad_(False)
        played = []
        for names, weights in ((["a"], [1.0]), (["b"], [1.0]), (["a", "b"], [1.0, 0.5]), (["a"], [0.2])):
            model.set_adapters(names, weights)
            if not ours:
                handle = apply(model)
            played.append(play(rig, model, 2))
            if not ours and handle is not None:
                handle.remove()
        outs.append(played)
        model.disable_adapters()
        model.enable_adapters()
        model.delete_adapters(["b"])
        model.unload_lora()
        if ours and handle is not None:
            assert equal(play(rig, model), forced())
            handle.remove()
        left = before.diff(snapshot(model))
        assert [
            line for line in left if not line.startswith("_hf_peft_config_loaded")
        ] == []  # diffusers' mark
        assert equal(play(rig, model), plain())
    assert all(equal(a, b) for a, b in zip(*outs, strict=True))


def test_a_pipeline_is_refused_and_its_transformer_is_not(rig: Rig) -> None:
    diffusers = pytest.importorskip("diffusers")

    class Pipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]
        def __init__(self, transformer: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

    pipeline = Pipeline(citizen(rig))
    with pytest.raises(
        UnsupportedModelError, match=r"Pipeline is not a torch\.nn\.Module: pass.*transformer"
    ):
        apply(pipeline)
    apply(pipeline.transformer)
    assert equal(play(rig, pipeline.transformer), forced())


def test_none_of_them_makes_another_model_ours(peft: Any, accelerate: Any, rig: Rig) -> None:
    other = Rig(9)
    twin = citizen(other)
    before, cls = snapshot(twin), dict(vars(type(other.model.blocks[0].self_attn)))
    model = citizen(rig)
    apply(model)
    model.add_adapter(adapter(peft))
    model.enable_group_offload(CPU, CPU, "leaf_level")
    accelerate.Accelerator(cpu=True).prepare(model)
    play(rig, model, 2)
    assert before.diff(snapshot(twin)) == []
    assert dict(vars(type(other.model.blocks[0].self_attn))) == cls
    assert equal(play(other, twin), plain())


# torch's own wrappers -----------------------------------------------------------------------------


@pytest.mark.slow
@ORDERS
def test_a_compiled_model_compiles_nothing_more_once_it_is_warm(first: str) -> None:
    """The attention itself runs eagerly, so the graphs are those around it."""
    counter_class = pytest.importorskip("torch._dynamo.testing").CompileCounter
    expected, rig = Rig(9, layers=1), Rig(9, layers=1)
    roles = [MIXED]
    hf.apply_head_forcing(expected.model, roles)
    torch._dynamo.reset()
    counter = counter_class()
    if first == WE:
        hf.apply_head_forcing(rig.model, roles)
        model: Any = torch.compile(rig.model, backend=counter)
    else:
        model = torch.compile(rig.model, backend=counter)
        hf.apply_head_forcing(model, roles)
    wanted = play(expected, chunks=8)
    caches = rig.caches()
    rig.model = model
    try:
        for _ in range(2):  # the second video finds the dicts of cross-attention filled, which is news
            rig.video(caches, 2)
            caches.new_video()
        graphs = counter.frame_count
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = rig.video(caches, 8)
        assert counter.frame_count == graphs
    finally:
        torch._dynamo.reset()
    assert equal(got, wanted)


def test_attention_wrapped_by_compile_before_apply_is_refused(rig: Rig) -> None:
    block: Any = rig.model.blocks[1]
    block.self_attn = torch.compile(block.self_attn, backend="eager")
    before = snapshot(rig.model)
    with pytest.raises(
        PatchedModuleError, match=r"blocks\.1\.self_attn.*torch\.compile.*remove it, apply, then add"
    ):
        apply(rig.model)
    assert before.diff(snapshot(rig.model)) == []


def test_attention_wrapped_by_compile_while_applied_must_be_unwrapped_before_remove(rig: Rig) -> None:
    before = snapshot(rig.model)
    handle = apply(rig.model)
    block: Any = rig.model.blocks[1]
    ours = block.self_attn
    block.self_attn = torch.compile(ours, backend="eager")
    with pytest.raises(
        PatchedModuleError, match=r"blocks\.1\.self_attn: a OptimizedModule was put around it"
    ):
        handle.remove()
    block.self_attn = ours
    assert equal(play(rig), forced())
    handle.remove()
    left = before.diff(snapshot(rig.model))
    assert [line for line in left if "_is_torch_compile" not in line] == []  # a mark of PyTorch's
    assert equal(play(rig), plain())


@pytest.mark.usefixtures("group")
@ORDERS
def test_distributed_data_parallel(rig: Rig, first: str) -> None:
    rig.model.requires_grad_(True)
    before = snapshot(rig.model)
    if first == WE:
        handle = apply(rig.model)
        model = nn.parallel.DistributedDataParallel(rig.model)
    else:
        model = nn.parallel.DistributedDataParallel(rig.model)
        handle = apply(model)
    assert equal(play(rig, model), forced())
    handle.remove()
    assert before.diff(snapshot(rig.model)) == []
    assert equal(play(rig, model), plain())


def sharded(model: Any, what: str) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = pytest.importorskip("torch.distributed.device_mesh").init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fsdp.fully_shard(block.self_attn if what == "attention" else block, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("what", ["blocks", "attention"])
def test_a_model_sharded_before_apply_is_forced_and_given_back(rig: Rig, what: str) -> None:
    sharded(rig.model, what)
    assert equal(play(rig), plain())
    before = snapshot(rig.model)
    handle = apply(rig.model)
    assert equal(play(rig), forced())
    handle.remove()
    assert before.diff(snapshot(rig.model)) == []
    assert equal(play(rig), plain())


@pytest.mark.usefixtures("group")
def test_a_snapshot_of_a_sharded_model_sees_every_change_of_its_shards(rig: Rig) -> None:
    sharded(rig.model, "blocks")
    before = snapshot(rig.model)
    assert before.diff(snapshot(rig.model)) == []
    weight: Any = rig.model.blocks[1].self_attn.k.weight
    with torch.no_grad():
        weight.to_local()[0, 0] += 1
    (line,) = before.diff(snapshot(rig.model))
    assert line.startswith("blocks.1.self_attn.k.weight: ")
    assert "Shard(dim=0)" in line
    with torch.no_grad():
        weight.to_local()[0, 0] -= 1
    rig.model.blocks[1].self_attn.k.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    assert any(line.startswith("blocks.1.self_attn.k.weight: ") for line in before.diff(snapshot(rig.model)))


@pytest.mark.usefixtures("group")
def test_blocks_sharded_after_apply_are_forced_and_given_back(rig: Rig) -> None:
    handle = apply(rig.model)
    sharded(rig.model, "blocks")
    assert equal(play(rig), forced())
    handle.remove()
    assert not patched(rig.model)
    assert equal(play(rig), plain())


@pytest.mark.usefixtures("group")
def test_attention_sharded_after_apply_is_forced_but_not_given_back(rig: Rig) -> None:
    """FSDP gives our module another class, which the original would not have."""
    handle = apply(rig.model)
    sharded(rig.model, "attention")
    assert equal(play(rig), forced())
    refusal = pytest.raises(
        PatchedModuleError, match=r"its class became FSDPHeadForced.*shard first, then apply"
    )
    with refusal:
        handle.remove()
    del handle  # one that was dropped is made anew
    with refusal:
        hf.remove_head_forcing(rig.model)
    assert equal(play(rig), forced())
