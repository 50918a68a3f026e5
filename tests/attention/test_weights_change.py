"""Weights that change in the middle of a video are told of once; weights that are only moved are not."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headforcing as hf
from headforcing.attention.weights import Marks
from headforcing.errors import WeightsChangedWarning
from headforcing.roles import Anchor, HeadRole, Local, Memory, SlidingWindow
from tests.hosts.rig import Rig

MIXED: tuple[HeadRole, ...] = (Local(), Anchor(), Memory(), SlidingWindow(6, positions="absolute"))
CPU = torch.device("cpu")
ORDERS = pytest.mark.parametrize("first", ["they come first", "we come first"])


def apply(model: Any) -> hf.HeadForcing:
    return hf.apply_head_forcing(model, [MIXED, MIXED[::-1]])


@pytest.fixture
def rig() -> Rig:
    return Rig(9)


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def accelerate() -> Any:
    return pytest.importorskip("accelerate")


def lora(peft: Any, **options: Any) -> Any:
    targets = {"r": 2, "target_modules": ["q", "k", "v", "o"], "init_lora_weights": False}
    return peft.LoraConfig(**{**targets, **options})


class Video:
    """A video on the calls of a rig, through a wrapper of its model, and what was warned of meanwhile."""

    def __init__(self, rig: Rig, model: Any = None) -> None:
        self.rig, self.model = rig, rig.model if model is None else model
        self.caches, self.chunk = rig.caches(), 0

    def run(self, chunks: int = 1) -> list[str]:
        """More chunks; the warnings of changed weights."""
        own, self.rig.model = self.rig.model, self.model
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                self.rig.video(self.caches, chunks, first=self.chunk)
        finally:
            self.rig.model = own
        self.chunk += chunks
        return [str(one.message) for one in heard if issubclass(one.category, WeightsChangedWarning)]


def told(video: Video, change: Callable[[], object]) -> list[str]:
    """What is said of a change in the middle of a video; of nothing before, and nothing twice."""
    assert video.run(2) == []
    change()
    said = video.run()
    assert video.run(2) == []
    return said


# What changes weights -----------------------------------------------------------------------------


def doubled(model: nn.Module) -> dict[str, Tensor]:
    return {name: 2 * weight for name, weight in model.state_dict().items()}


def write(weight: Tensor, value: float = 0.5) -> None:
    with torch.no_grad():
        weight.fill_(value)


def step(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(model.parameters(), 1e-3).step()


def write_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model.blocks[0].self_attn.k.weight.fill_(0.5)


WRITES: dict[str, Callable[[Any], object]] = {
    "load_state_dict": lambda model: model.load_state_dict(doubled(model)),
    "one layer": lambda model: write(model.blocks[1].self_attn.norm_k.weight),
    "an optimizer": step,
    "in inference mode": write_in_inference_mode,
}


@pytest.mark.parametrize("how", WRITES)
def test_weights_written_in_place_are_told_of_once(rig: Rig, how: str) -> None:
    apply(rig.model)
    (said,) = told(Video(rig), lambda: WRITES[how](rig.model))
    layers = {"one layer": "layer 1:", "in inference mode": "layer 0:"}.get(how, "layers 0..1:")
    assert said.startswith(layers)
    assert "remembered of frames before 6" in said
    assert "handle.reset()" in said


def test_a_change_behind_the_first_chunk_is_told_of_in_every_layer(rig: Rig) -> None:
    apply(rig.model)
    video = Video(rig)
    rig.call(video.caches, 0, 3)  # its only pass
    video.chunk = 1
    write(rig.model.blocks[1].self_attn.k.weight)
    assert [said.split(":")[0] for said in video.run()] == ["layer 1"]


SWITCHES: dict[str, Callable[[Any], object]] = {
    "set_adapter": lambda model: model.set_adapter("y"),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "merge": lambda model: model.merge_adapter(),
    "scale": lambda model: [part.scale_layer(0.5) for part in model.modules() if hasattr(part, "lora_A")],
    "delete": lambda model: model.delete_adapter("x"),
    "unload": lambda model: model.unload(),
    "merge and unload": lambda model: model.merge_and_unload(),
    "write": lambda model: [write(w) for name, w in model.named_parameters() if "lora_B.x" in name],
    "write its base": lambda model: [write(w) for name, w in model.named_parameters() if "k.base" in name],
}


def with_two(peft: Any, rig: Rig, **options: Any) -> Any:
    model = peft.get_peft_model(rig.model, lora(peft, **options), "x")
    model.add_adapter("y", lora(peft))
    return model.eval().requires_grad_(False)


@ORDERS
@pytest.mark.parametrize("how", SWITCHES)
def test_adapters_of_peft_that_change_are_told_of_once(peft: Any, rig: Rig, how: str, first: str) -> None:
    if first == "we come first":
        apply(rig.model)
    model = with_two(peft, rig)
    apply(model)
    (said,) = told(Video(rig, model.base_model.model), lambda: SWITCHES[how](model))
    assert said.startswith("layers 0..1:")


def test_adapters_that_are_put_in_and_switched_back_are_told_of_every_time(peft: Any, rig: Rig) -> None:
    apply(rig.model)
    video = Video(rig)
    assert video.run(2) == []
    model = with_two(peft, rig)
    assert len(video.run()) == 1
    for switch in (
        lambda: model.set_adapter("y"),
        lambda: model.set_adapter("x"),
        model.merge_adapter,
        model.unmerge_adapter,
        model.merge_adapter,
        model.base_model.disable_adapter_layers,  # which unmerges, too
        model.base_model.enable_adapter_layers,
        model.unload,
    ):
        switch()
        assert len(video.run()) == 1
        assert video.run() == []


KINDS = {
    "dora": lambda peft: lora(peft, use_dora=True),
    "rslora": lambda peft: lora(peft, use_rslora=True),
    "ia3": lambda peft: peft.IA3Config(target_modules=["k", "v"], feedforward_modules=[]),
    "loha": lambda peft: peft.LoHaConfig(r=2, target_modules=["q"]),
    "norms": lambda peft: lora(peft, target_modules=["ffn.0"], modules_to_save=["norm_k"]),
    "second layer": lambda peft: lora(peft, layers_to_transform=[1], layers_pattern="blocks"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_adapters_and_a_single_layer(peft: Any, rig: Rig, kind: str) -> None:
    model = peft.get_peft_model(rig.model, KINDS[kind](peft)).eval().requires_grad_(False)
    apply(model)
    video = Video(rig, model.base_model.model)
    (said,) = told(video, model.base_model.disable_adapter_layers)
    assert said.startswith("layer 1:" if kind == "second layer" else "layers 0..1:")
    assert len(told(video, model.base_model.enable_adapter_layers)) == 1


def test_a_factor_that_is_a_tensor_is_not_read_but_its_writes_are_counted(peft: Any, rig: Rig) -> None:
    """As PEFT makes it where adapters are exchanged under torch.compile."""
    hotswap = pytest.importorskip("peft.utils.hotswap")
    model = peft.get_peft_model(rig.model, lora(peft)).eval().requires_grad_(False)
    hotswap.prepare_model_for_compiled_hotswap(model, config=lora(peft), target_rank=4)
    apply(model)
    factors = [part.scaling["default"] for part in model.modules() if hasattr(part, "lora_A")]
    assert all(isinstance(factor, Tensor) for factor in factors)
    assert (
        len(told(Video(rig, model.base_model.model), lambda: [factor.fill_(0.1) for factor in factors])) == 1
    )


def test_guidance_branches_are_told_of_one_change_together(rig: Rig) -> None:
    apply(rig.model)
    branches = [Video(rig), Video(rig)]
    for video in branches:
        video.run(2)
    write(rig.model.blocks[0].self_attn.k.weight)
    assert [len(video.run()) for video in branches] == [1, 0]
    write(rig.model.blocks[0].self_attn.k.weight, 0.2)
    assert [len(video.run()) for video in branches] == [1, 0]


def test_a_change_inside_of_a_chunk_is_told_of_when_the_next_begins(rig: Rig) -> None:
    apply(rig.model)
    video = Video(rig)
    video.run(2)
    rig.call(video.caches, 6, 3, draw=1)
    write(rig.model.blocks[0].self_attn.k.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeightsChangedWarning)
        rig.call(video.caches, 6, 3)
    video.chunk = 3
    assert len(video.run()) == 1


@pytest.mark.parametrize("how", ["deep copy", "pickle"])
def test_a_copy_watches_its_own_weights(rig: Rig, how: str) -> None:
    apply(rig.model)
    twin = copy.deepcopy(rig.model) if how == "deep copy" else pickle.loads(pickle.dumps(rig.model))
    ours, theirs = Video(rig), Video(rig, twin)
    ours.run(2), theirs.run(2)
    write(twin.blocks[1].self_attn.k.weight)
    assert ours.run() == []
    assert [said.split(":")[0] for said in theirs.run()] == ["layer 1"]
    write(rig.model.blocks[0].self_attn.k.weight)
    assert theirs.run() == []
    assert [said.split(":")[0] for said in ours.run()] == ["layer 0"]


# What does not ------------------------------------------------------------------------------------


def test_a_new_video_a_reset_and_another_application_have_no_past(rig: Rig) -> None:
    handle = apply(rig.model)
    video = Video(rig)
    for number, begin in enumerate((video.caches.new_video, handle.reset, handle.remove)):
        assert video.run(2) == []
        write(rig.model.blocks[0].self_attn.k.weight, 0.1 * number)
        begin()
        apply(rig.model)
        if begin == handle.remove:
            video = Video(rig)
        video.chunk = 0
    assert video.run(2) == []
    write(rig.model.blocks[0].self_attn.k.weight)
    assert len(video.run()) == 1


def test_the_same_change_in_the_next_video_is_told_of_again(peft: Any, rig: Rig) -> None:
    model = with_two(peft, rig)
    apply(model)
    for _ in range(2):
        model.set_adapter("x")
        assert len(told(Video(rig, model.base_model.model), lambda: model.set_adapter("y"))) == 1


def test_adapters_that_are_not_on_may_come_change_and_go(peft: Any, rig: Rig) -> None:
    model = peft.get_peft_model(rig.model, lora(peft), "x").eval().requires_grad_(False)
    apply(model)
    video = Video(rig, model.base_model.model)

    def change() -> None:
        model.add_adapter("y", lora(peft))
        model.requires_grad_(False)
        for name, weight in model.named_parameters():
            if ".y." in name:
                write(weight)
        model.delete_adapter("y")

    assert told(video, change) == []


def test_adapters_that_are_not_on_may_be_written_to(peft: Any, rig: Rig) -> None:
    model = with_two(peft, rig)
    apply(model)
    weights = [weight for name, weight in model.named_parameters() if ".y." in name]
    assert weights
    assert told(Video(rig, model.base_model.model), lambda: [write(weight) for weight in weights]) == []


def test_adapters_that_are_scaled_up_and_down_again(peft: Any, rig: Rig) -> None:
    """As diffusers does with a scale among the arguments of a call; down and up again rounds."""
    model = peft.get_peft_model(rig.model, lora(peft, lora_alpha=3)).eval().requires_grad_(False)
    apply(model)
    layers = [part for part in model.modules() if hasattr(part, "lora_A")]
    before = layers[0].scaling["default"]

    def change() -> None:
        for layer in layers:
            layer.scale_layer(0.7)
            layer.unscale_layer(0.7)

    assert told(Video(rig, model.base_model.model), change) == []
    assert layers[0].scaling["default"] != before


@pytest.mark.parametrize("how", ["state_dict", "save", "double and back", "deep copy", "no_grad", "autocast"])
def test_what_only_looks_at_the_weights(rig: Rig, tmp_path: Path, how: str) -> None:
    apply(rig.model)
    video = Video(rig)
    looks: dict[str, Callable[[], object]] = {
        "state_dict": rig.model.state_dict,
        "save": lambda: torch.save(rig.model.state_dict(), tmp_path / "weights"),
        "double and back": lambda: rig.model.double().float(),
        "deep copy": lambda: step(copy.deepcopy(rig.model)),
        "no_grad": lambda: rig.model.requires_grad_(True).requires_grad_(False),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16).__enter__(),
    }
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert video.run(4) == []
    else:
        assert told(video, looks[how]) == []


def offloaded(accelerate: Any, model: nn.Module, how: str, folder: Path) -> None:
    if how == "cpu":
        accelerate.cpu_offload(model, CPU)
    elif how == "disk":
        accelerate.disk_offload(model, str(folder), CPU)
    elif how == "every module":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        accelerate.cpu_offload_with_hook(model, CPU)


OFFLOADS = ["cpu", "disk", "whole model", "every module"]


@ORDERS
@pytest.mark.parametrize("how", OFFLOADS)
def test_offloading_is_no_change(accelerate: Any, rig: Rig, tmp_path: Path, first: str, how: str) -> None:
    if first == "we come first":
        apply(rig.model)
    elif how == "every module":
        pytest.skip("apply is refused then")
    offloaded(accelerate, rig.model, how, tmp_path)
    apply(rig.model) if first == "they come first" else None
    assert Video(rig).run(5) == []


@pytest.mark.parametrize("how", OFFLOADS)
def test_offloading_that_comes_and_goes_in_the_middle_is_no_change(
    accelerate: Any, rig: Rig, tmp_path: Path, how: str
) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    apply(rig.model)
    video = Video(rig)
    assert told(video, lambda: offloaded(accelerate, rig.model, how, tmp_path)) == []
    assert told(video, lambda: hooks.remove_hook_from_submodules(rig.model)) == []


@pytest.mark.parametrize("how", ["cpu", "whole model"])
def test_adapters_switched_under_offloading_are_told_of(
    peft: Any, accelerate: Any, rig: Rig, tmp_path: Path, how: str
) -> None:
    model = with_two(peft, rig)
    apply(model)
    offloaded(accelerate, rig.model, how, tmp_path)
    assert len(told(Video(rig, model.base_model.model), lambda: model.set_adapter("y"))) == 1


def citizen(rig: Rig) -> Any:
    """The demo model as a citizen of diffusers."""
    diffusers, loaders = pytest.importorskip("diffusers"), pytest.importorskip("diffusers.loaders")

    class Citizen(diffusers.ModelMixin, diffusers.ConfigMixin, loaders.PeftAdapterMixin):  # type: ignore[misc]
        _supports_group_offloading = True

        def __init__(self) -> None:
            super().__init__()
            self.inner = rig.model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    return Citizen().eval().requires_grad_(False)


@ORDERS
@pytest.mark.parametrize("level", ["leaf_level", "block_level", "casting"])
def test_group_offloading_and_casts_of_diffusers_are_no_change(rig: Rig, first: str, level: str) -> None:
    model = citizen(rig)
    if first == "we come first":
        apply(model)
    if level == "casting":
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    else:
        groups = {"num_blocks_per_group": 1} if level == "block_level" else {}
        model.enable_group_offload(CPU, CPU, level, **groups)
    apply(model)
    video = Video(rig, model)
    assert video.run(4) == []
    if level != "casting":
        write(rig.model.blocks[0].self_attn.k.weight)
        assert len(video.run()) == 1


def test_adapters_of_diffusers_that_are_weighted_anew_are_told_of(peft: Any, rig: Rig) -> None:
    model = citizen(rig)
    apply(model)
    model.add_adapter(lora(peft), "a")
    model.requires_grad_(False)
    video = Video(rig, model)
    assert len(told(video, lambda: model.set_adapters(["a"], [0.3]))) == 1
    assert told(video, lambda: model.set_adapters(["a"], [0.3])) == []
    assert len(told(video, model.disable_adapters)) == 1
    assert len(told(video, model.enable_adapters)) == 1


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("no process group of our own")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("stays", [True, False], ids=["gathered anew", "gathered once"])
@pytest.mark.parametrize("what", ["blocks", "attention"])
@ORDERS
def test_sharded_weights_are_gathered_without_a_change(rig: Rig, what: str, first: str, stays: bool) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = pytest.importorskip("torch.distributed.device_mesh").init_device_mesh("cpu", (1,))
    if first == "we come first":
        apply(rig.model)
    write(rig.model.blocks[0].self_attn.k.weight, 0.1)
    for block in rig.model.blocks:
        part: Any = block
        fsdp.fully_shard(
            part.self_attn if what == "attention" else part, mesh=mesh, reshard_after_forward=stays
        )
    fsdp.fully_shard(rig.model, mesh=mesh, reshard_after_forward=stays)
    apply(rig.model)
    video = Video(rig)
    assert video.run(4) == []

    def shrink() -> None:
        with torch.no_grad():
            for weight in rig.model.parameters():
                weight.mul_(0.9)

    if stays:  # else the shards are written to, which nobody gathers again
        assert len(told(video, shrink)) == 1


@pytest.mark.usefixtures("group")
def test_distributed_data_parallel_is_no_change(rig: Rig) -> None:
    apply(rig.model)
    model = nn.parallel.DistributedDataParallel(rig.model.requires_grad_(True))
    assert Video(rig, model).run(4) == []


def test_compiling_is_no_change_and_changes_are_told_of(rig: Rig) -> None:
    apply(rig.model)
    try:
        video = Video(rig, torch.compile(rig.model, backend="eager"))
        (said,) = told(video, lambda: write(rig.model.blocks[0].self_attn.k.weight))
    finally:
        torch._dynamo.reset()
    assert said.startswith("layer 0:")


def test_weights_made_in_inference_mode_have_no_count() -> None:
    with torch.inference_mode():
        rig = Rig(9)
    apply(rig.model)
    assert told(Video(rig), lambda: None) == []


def test_tensors_can_still_be_exchanged(rig: Rig) -> None:
    """PyTorch refuses that where somebody holds a weak reference."""
    apply(rig.model)
    video = Video(rig)
    video.run(2)
    weight = rig.model.blocks[0].self_attn.k.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone(), requires_grad=False))
    assert video.run(2) == []


# What cannot be told ------------------------------------------------------------------------------

UNSEEN: dict[str, Callable[[Any], object]] = {
    "assign": lambda model: model.load_state_dict(doubled(model), assign=True),
    "data": lambda model: model.blocks[0].self_attn.k.weight.data.fill_(0.5),
    "the MLP": lambda model: write(model.blocks[0].ffn[0].weight),
}


@pytest.mark.parametrize("how", UNSEEN)
def test_what_looks_like_offloading_is_not_told_of(rig: Rig, how: str) -> None:
    """A limit, which the documentation names; where this fails, it can go."""
    apply(rig.model)
    assert told(Video(rig), lambda: UNSEEN[how](rig.model)) == []


def test_marks_of_weights_that_are_the_same_do_not_differ(peft: Any, rig: Rig) -> None:
    model = with_two(peft, rig)
    attention = rig.model.blocks[0].self_attn
    before = Marks.of(attention)
    assert before == Marks.of(attention)
    assert len(before.writes) > 8
    model.set_adapter("y")
    assert before.differ(Marks.of(attention))
