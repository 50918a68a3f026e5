"""A measured map is applied to weights that were quantised, cast, sharded or sent elsewhere.

The fingerprint is equal, or unknown, with a warning that names a weight and what it is: never a crash, and
never the claim that these are other weights. Tensors that behave like those of torchao, bitsandbytes and GGUF
stand in where these are not installed; the real ones are tried where they are.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import headforcing as hf
from headforcing.adapters.base import find_adapter
from headforcing.errors import ForeignRolesWarning, RoleMapMismatchError
from headforcing.roles.maps import fingerprint as module
from headforcing.roles.maps.fingerprint import fingerprint
from headforcing.roles.maps.origin import ModelFacts, Origin
from tests.examples import examples
from tests.hosts.rig import Rig

CPU = torch.device("cpu")
LABELS = [["local", "anchor", "memory", "local"]] * 2
PLACES = [(layer, name) for layer in (0, 1) for name in "qkvo"]


def of(model: nn.Module) -> str | None:
    return fingerprint(model, find_adapter(model))


def attention(model: Any, layer: int) -> Any:
    return model.blocks[layer].self_attn


PLAIN = of(Rig().model)
FACTS = ModelFacts(
    layers=2, heads=4, head_dim=16, window=6, chunk=3, model_class="DemoModel", fingerprint=PLAIN
)
MEASURED = hf.RoleMap.from_labels(LABELS, None, Origin(model=FACTS))


def apply(model: nn.Module, **options: Any) -> tuple[hf.HeadForcing, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ForeignRolesWarning)
        handle = hf.apply_head_forcing(model, MEASURED, **options)
    return handle, [str(warning.message) for warning in caught]


def check(model: nn.Module) -> bool:
    """That the map is applied, and what is said of the weights is true; whether they are known."""
    found = of(model)
    handle, said = apply(model)
    assert handle.applied
    assert handle.roles.origin == MEASURED.origin
    if found == PLAIN:
        assert said == []
        return True
    assert found is None, "weights that were only stored otherwise are called other weights"
    (message,) = said
    assert "whether these are its weights cannot be checked, some of them are " in message
    assert ".self_attn." in message
    assert "fingerprint" not in message
    with pytest.raises(RoleMapMismatchError, match="cannot be checked, some of them are"):
        hf.apply_head_forcing(model, MEASURED, strict=True)
    return False


# Stand-ins ----------------------------------------------------------------------------------------


class Quantised(Tensor):
    """As torchao's: a wrapper around whole numbers that knows how to be multiplied, and little else."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.data8 = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            x, weight, *bias = args
            return functional.linear(x, weight.data8 * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data8 * args[0].scale)
        raise NotImplementedError(f"Quantised: {func}")


class Packed(nn.Parameter):
    """As those of bitsandbytes and GGUF: a parameter of packed bytes, which its layer unpacks."""


class Unpacks(nn.Linear):
    """A layer whose parameter is packed."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.kept, self.bias)


def subclass(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(Quantised(linear.weight.detach()), requires_grad=False)
    return linear


def parameter(linear: nn.Linear) -> nn.Module:
    other = Unpacks(linear.in_features, linear.out_features)
    other.kept = linear.weight.detach().clone()
    other.weight = Packed(torch.zeros(other.kept.numel(), dtype=torch.uint8), requires_grad=False)
    other.bias = linear.bias
    return other


def buffers(linear: nn.Linear) -> nn.Module:
    """As GPTQ's and AWQ's: no weight, but buffers of whole numbers."""
    other = Unpacks(linear.in_features, linear.out_features)
    other.kept, other.bias = linear.weight.detach().clone(), linear.bias
    del other.weight
    other.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))
    return other


def dynamic(linear: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized: Any = importlib.import_module("torch.ao.quantization").quantize_dynamic(
            nn.Sequential(linear)
        )
    return quantized[0]


def flattened(linear: nn.Linear) -> nn.Module:
    """As FSDP1 without the original parameters: plain tensors in their places."""
    for name in ("weight", "bias"):
        value = getattr(linear, name).detach()
        delattr(linear, name)
        setattr(linear, name, value)
    return linear


def elsewhere(linear: nn.Linear) -> nn.Module:
    return brought(linear, torch.empty_like(linear.weight, device="meta"))


def partitioned(linear: nn.Linear) -> nn.Module:
    """As DeepSpeed's: empty between two calls."""
    return brought(linear, torch.empty(0))


def cast_to(dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    return lambda linear: brought(linear, linear.weight.detach().to(dtype))


def brought(linear: nn.Linear, stored: Tensor) -> nn.Module:
    """A layer whose weight is `stored`, and is brought for every call."""
    weight = linear.weight.detach() if stored.is_meta or not stored.numel() else stored.float()
    linear.weight = nn.Parameter(stored, requires_grad=False)

    def bring(layer: Any, _: Any) -> None:
        layer.weight.data = weight

    def take(layer: Any, *_: Any) -> None:
        layer.weight = nn.Parameter(stored, requires_grad=False)

    if not stored.is_meta:
        linear.register_forward_pre_hook(bring)
        linear.register_forward_hook(take)
    return linear


def same(linear: nn.Linear) -> nn.Module:
    return linear


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "a tensor subclass": subclass,
    "a parameter subclass": parameter,
    "packed buffers": buffers,
    "packed outside of parameters": dynamic,
    "flattened": flattened,
    "meta": elsewhere,
    "partitioned": partitioned,
    "float8": cast_to(torch.float8_e4m3fn),
    "bfloat16": cast_to(torch.bfloat16),
    "float64": cast_to(torch.float64),
    "nothing": same,
}
EQUAL = {"bfloat16", "float64", "nothing"}
CANNOT_RUN = {"meta"}


@given(st.sampled_from(list(KINDS)), st.sets(st.sampled_from(PLACES), min_size=1), st.booleans())
@settings(max_examples=examples(30, 1000))
def test_a_map_is_applied_and_its_fingerprint_equal_or_unknown(
    kind: str, places: set[tuple[int, str]], first: bool
) -> None:
    rig = Rig()
    if first:
        assert apply(rig.model, strict=True)[1] == []
    for layer, name in places:
        own = attention(rig.model, layer)
        setattr(own, name, KINDS[kind](getattr(own, name)))
    assert check(rig.model) == (kind in EQUAL)
    if kind not in CANNOT_RUN:
        outs = rig.video(rig.caches(), 1)
        assert all(out.isfinite().all() for out in outs)
    hf.remove_head_forcing(rig.model)
    assert (of(rig.model) == PLAIN) == (kind in EQUAL)


BROKEN = [kind for kind in KINDS if kind not in EQUAL and kind != "meta"]


@pytest.mark.parametrize("kind", BROKEN)
def test_reading_what_is_no_plain_weight_would_be_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done before: only meta tensors are asked for."""

    def only_meta(model: nn.Module, _: Any) -> str | None:
        return "meta tensors" if any(weight.is_meta for weight in model.parameters()) else None

    monkeypatch.setattr(module, "unreadable", only_meta)
    monkeypatch.setattr("headforcing.apply.unreadable", only_meta)
    rig = Rig()
    own = attention(rig.model, 0)
    own.q = KINDS[kind](own.q)
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        check(rig.model)


def test_other_weights_are_still_told_apart() -> None:
    """The rest of the model may be quantised: it does not count."""
    rig = Rig()
    rig.model.head = KINDS["a tensor subclass"](rig.model.head)
    assert check(rig.model)
    attention(rig.model, 1).v.weight.data[0, 0] += 1
    hf.remove_head_forcing(rig.model)
    _, (message,) = apply(rig.model)
    assert "its attention weights have the fingerprint" in message
    assert "float16" not in message


def test_the_float16_copy_of_a_checkpoint_is_perhaps_the_same_checkpoint() -> None:
    """Its small numbers are rounded more, which may be all that differs."""
    rig = Rig(dtype=torch.float16)
    assert of(rig.model) not in (None, PLAIN)
    _, (message,) = apply(rig.model)
    assert "(some are float16, which alone may be the difference)" in message


# The real ones ------------------------------------------------------------------------------------


def torchao(config: str) -> Callable[[Any], None]:
    def quantise(model: Any) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, config)())

    return quantise


def replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> None:
    for layer, name in PLACES:
        own = attention(model, layer)
        setattr(own, name, make(getattr(own, name)).requires_grad_(False))


def bitsandbytes(bits: int) -> Callable[[Any], None]:
    def quantise(model: Any) -> None:
        layers = pytest.importorskip("bitsandbytes").nn
        options = {"has_fp16_weights": False} if bits == 8 else {"compute_dtype": torch.float32}
        kind = layers.Linear8bitLt if bits == 8 else layers.LinearNF4

        def make(linear: nn.Linear) -> nn.Module:
            other: nn.Module = kind(linear.in_features, linear.out_features, **options)
            other.load_state_dict(linear.state_dict())
            return other.to("cpu")  # quantises

        replaced(model, make)

    return quantise


def gguf(model: Any) -> None:
    quants = pytest.importorskip("gguf").quants
    kind = pytest.importorskip("gguf").GGMLQuantizationType.Q8_0
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")

    def make(linear: nn.Linear) -> nn.Module:
        other: nn.Module = utils.GGUFLinear(
            linear.in_features, linear.out_features, compute_dtype=torch.float32
        )
        data = torch.from_numpy(quants.quantize(linear.weight.numpy(), kind))
        other.weight, other.bias = utils.GGUFParameter(data, quant_type=kind), linear.bias
        return other

    replaced(model, make)


def quanto(model: Any) -> None:
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)


def casting(dtype: torch.dtype) -> Callable[[Any], None]:
    def cast(model: Any) -> None:
        hooks = pytest.importorskip("diffusers.hooks")
        hooks.apply_layerwise_casting(model, storage_dtype=dtype, compute_dtype=torch.float32)

    return cast


def offloading(how: str) -> Callable[[Any], None]:
    def offload(model: Any) -> None:
        accelerate = pytest.importorskip("accelerate")
        if how == "disk":
            folder = tempfile.mkdtemp()
            accelerate.disk_offload(model, folder, CPU)
        else:
            getattr(accelerate, how)(model, CPU)

    return offload


def groups(model: Any) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_group_offloading(model, CPU, CPU, offload_type="leaf_level")


def of_torch(model: Any) -> None:
    quantization = importlib.import_module("torch.ao.quantization")
    quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


REAL: dict[str, Callable[[Any], None]] = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes 8 bit": bitsandbytes(8),
    "bitsandbytes nf4": bitsandbytes(4),
    "gguf": gguf,
    "quanto": quanto,
    "torch, dynamic": of_torch,
    "layerwise casting to float8": casting(torch.float8_e4m3fn),
    "layerwise casting to bfloat16": casting(torch.bfloat16),
    "offloaded to the CPU": offloading("cpu_offload"),
    "offloaded to a disk": offloading("disk"),
    "offloaded as a whole": offloading("cpu_offload_with_hook"),
    "offloaded in groups": groups,
}
REAL_EQUAL = {"layerwise casting to bfloat16", "offloaded as a whole", "offloaded in groups"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["they come first", pytest.param("we come first", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", REAL)
def test_real_libraries(kind: str, order: str) -> None:
    rig = Rig()
    if order == "we come first":
        apply(rig.model, strict=True)
    REAL[kind](rig.model)
    assert check(rig.model) == (kind in REAL_EQUAL)
    assert all(out.isfinite().all() for out in rig.video(rig.caches(), 2))
    hf.remove_head_forcing(rig.model)
    assert not any("_headforcing" in vars(part) for part in rig.model.modules())
    assert all(out.isfinite().all() for out in rig.video(rig.caches(), 1))


# Processes ----------------------------------------------------------------------------------------


def fsdp1(model: Any, **options: Any) -> Any:
    fsdp = importlib.import_module("torch.distributed.fsdp")
    policy = importlib.import_module("torch.distributed.fsdp.wrap").ModuleWrapPolicy
    whole = options.pop("whole")
    own = {type(attention(model, 0))} if whole == "attention" else {type(model.blocks[0])}
    return fsdp.FullyShardedDataParallel(model, auto_wrap_policy=policy(own), device_id=CPU, **options)


def fsdp2(model: Any) -> Any:
    fsdp = importlib.import_module("torch.distributed.fsdp")
    mesh = importlib.import_module("torch.distributed.device_mesh")
    for block in model.blocks:
        fsdp.fully_shard(block, mesh=mesh.init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return model


def ddp(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model.requires_grad_(True))


SHARDED: dict[str, Callable[[Any], Any]] = {
    "ddp": ddp,
    "fsdp1": lambda model: fsdp1(model, whole="block", use_orig_params=True),
    "fsdp1 around attention": lambda model: fsdp1(model, whole="attention", use_orig_params=True),
    "fsdp1, flat": lambda model: fsdp1(model, whole="block", use_orig_params=False),
    "fsdp1, flat around attention": lambda model: fsdp1(model, whole="attention", use_orig_params=False),
    "fsdp2": fsdp2,
}


FAST_SHARDED = [("ddp", True), ("fsdp1, flat", False), ("fsdp2", False)]


def shardings() -> list[str]:
    """Those that this torch has."""
    if not torch.distributed.is_available():
        return []
    known = hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard")
    return [kind for kind in SHARDED if known or kind != "fsdp2"]


def on_processes(kind: str, first: bool) -> None:
    """One of the processes of a group."""
    rig, other = Rig(), Rig()
    apply(other.model)
    caches, expected = rig.caches(), other.video(other.caches(), 2)
    if first:
        apply(rig.model, strict=True)
    model = SHARDED[kind](rig.model).eval()
    assert check(model) == (kind == "ddp")
    rig.model = model
    got = rig.video(caches, 2)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "first"),
    [
        pytest.param(kind, first, marks=() if (kind, first) in FAST_SHARDED else pytest.mark.slow)
        for kind in SHARDED
        for first in (False, True)
    ],
)
def test_sharded_over_one_process(kind: str, first: bool) -> None:
    if kind not in shardings():
        pytest.skip("this torch has none")
    on_processes(kind, first)


def process(rank: int, world: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("ignore")
    distributed = torch.distributed
    store = distributed.FileStore(str(Path(folder, "store")), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for kind in shardings():
        for first in (False, True):
            on_processes(kind, first)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_over_two_processes(tmp_path: Path) -> None:
    if not shardings():
        pytest.skip("this torch has no torch.distributed")
    torch.multiprocessing.spawn(process, (2, str(tmp_path)), 2)
