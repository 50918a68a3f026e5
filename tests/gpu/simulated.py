"""Two simulated CUDA devices for a PyTorch without CUDA: tensors that say `cuda:1` and compute on the CPU.

Inside `simulated()`, a tensor on a device is a `DeviceTensor` around a CPU tensor. What a CPU forgives is an
error, as there: operators that mix devices; a gather out of range, after which nothing runs on any device
again; DLPack with another current device. A copy to the host that nobody waited for holds zeros. Every
place where the host would wait for the device is written down.

Kernels of Triton and CUDA are not run: the compiled rotation is its specification, softmax attention is the
CPU's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from headforcing import types
from headforcing.adapters import rope, rope_fused
from headforcing.attention import ragged, requirements
from headforcing.attention.backends import auto

aten = torch.ops.aten
GUARD = Path(__file__).with_name("guard.cpp")
BUILT = GUARD.parents[2] / ".cache" / "simulated-device"
CURRENT = torch.device("cuda", 0)
DEVICES = (CURRENT, torch.device("cuda", 1))
"""The current device, which it stays, and another one."""

COPIES = (aten.copy_.default, aten._to_copy.default)
READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
INDEXES = ("gather", "index_select", "index", "index_put_", "_index_put_impl_", "scatter", "scatter_")
MASKED = (aten.index.Tensor,)
"""Operators whose result has a shape that depends on data only where a mask is given."""
BY_INDEX_TENSORS = ("index", "index_put_", "_index_put_impl_")
"""Operators that take index tensors of the CPU, too; these are copied, and the host waits."""


@functools.cache
def missing() -> str | None:
    """Why there is no simulated device here; else it is built, if this was not done before, and loaded."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "simulates a device for a PyTorch without CUDA; this one has its own"
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        return "requires a C++ compiler"
    root = Path(torch.__file__).parent
    key = f"{torch.__version__}{compiler}".encode() + GUARD.read_bytes()
    library = BUILT / f"guard-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        own = library.with_suffix(f".{os.getpid()}")  # other processes build at the same time
        options = ("-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10")
        built = subprocess.run(
            [compiler, str(GUARD), *options, "-o", str(own)], capture_output=True, text=True, check=False
        )
        if built.returncode:
            return f"the C++ compiler cannot build it: {built.stderr.strip().splitlines()[-1:]}"
        own.replace(library)
    ctypes.CDLL(str(library))
    return None


class DeviceTensor(Tensor):
    """A tensor of a simulated device.

    Attributes:
        held: its numbers, on the CPU.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> DeviceTensor:
        """Without memory of its own."""
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=device, **layout)
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Attention is one kernel; everything else is seen as operators."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            simulation = Simulation.now()
            simulation._check_alive()
            simulation._check_devices("attention", [*_tensors(args)])
            return simulation.run(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a simulated tensor outside of the simulation")

    # What the library asks of memory, which PyTorch would answer from the wrapper.

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def stride(self, dim: int | None = None) -> Any:
        return self.held.stride() if dim is None else self.held.stride(dim)

    def storage_offset(self) -> int:
        return int(self.held.storage_offset())

    def is_contiguous(self, **kwargs: Any) -> bool:
        return self.held.is_contiguous(**kwargs)

    def set_(self, *args: Any) -> DeviceTensor:
        self.held.set_(*args)
        return self

    def tolist(self) -> Any:
        Simulation.now().wait("tolist")
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.device} {self.held!r}"


class Simulation(TorchDispatchMode):
    """Runs operators on tensors of the simulated devices.

    Attributes:
        waits: what the host waited for, in order.
        step: a number that whoever runs passes may set: waiting for what was asked for in an earlier step
            is no wait.
        broken: whether a kernel failed; nothing runs after that.
    """

    _entered: ClassVar[list[Simulation]] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.step = 0
        self.broken = False
        self.in_flight: list[tuple[Tensor, Tensor]] = []
        self._counting = True

    @classmethod
    def now(cls) -> Simulation:
        """The one that runs."""
        return cls._entered[-1]

    def __enter__(self) -> Any:
        self._entered.append(self)
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is made here, then copied
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lift)
        self._entered.pop()
        super().__exit__(*error)

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        if self._counting:
            self.waits.append(what)

    @staticmethod
    def off() -> contextlib.AbstractContextManager[None]:
        """For what runs on the CPU, which is faster without a look at every operator."""
        return _disable_current_modes()

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What the base model's pipeline does."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [*_tensors((args, *kwargs.values()))]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not any(isinstance(x, DeviceTensor) for x in tensors) and (asked is None or asked.type != "cuda"):
            return func(*args, **kwargs)
        self._check_alive()
        if func in COPIES:
            return self._copy(func, args, kwargs, asked)
        self._check_devices(func.overloadpacket.__name__, tensors)
        if any(tag in func.tags for tag in READS) and (func not in MASKED or _masks(tensors[1:])):
            self.wait(str(func))
        return self.run(func, args, kwargs, asked)

    def run(self, func: Any, args: Any, kwargs: Any, asked: torch.device | None = None) -> Any:
        """Runs an operator on the tensors held; what it returns lies where it was asked for or taken from."""
        wrappers: dict[int, Tensor] = {}
        homes = []

        def down(x: Any) -> Any:
            if not isinstance(x, DeviceTensor):
                return x
            wrappers[id(x.held)] = x
            homes.append(x.device)
            return x.held

        args, kwargs = _mapped(down, args), {key: _mapped(down, x) for key, x in kwargs.items()}
        if asked is not None:
            kwargs["device"] = "cpu"
        device = asked or homes[0]
        try:
            out = func(*args, **kwargs)
        except (IndexError, RuntimeError) as error:
            if isinstance(func, torch._ops.OpOverload) and func.overloadpacket.__name__ in INDEXES:
                self.broken = True
                raise RuntimeError(f"CUDA error: device-side assert triggered: {func}: {error}") from error
            raise

        def up(x: Any) -> Any:
            if not isinstance(x, Tensor) or device.type != "cuda":
                return x
            return wrappers[id(x)] if id(x) in wrappers else DeviceTensor(x, _indexed(device))

        return _mapped(up, out)

    def _check_alive(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: device-side assert triggered, earlier")

    def _check_devices(self, name: str, tensors: list[Tensor]) -> None:
        found = {x.device for x in tensors if isinstance(x, DeviceTensor) or x.dim()}
        if name in BY_INDEX_TENSORS and torch.device("cpu") in found:
            self.wait("an index tensor of the CPU")
            found.discard(torch.device("cpu"))
        if len(found) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} got {found}")

    def _copy(self, func: Any, args: Any, kwargs: Any, asked: torch.device | None) -> Any:
        """Within a device, between two, up or down; down without waiting, the numbers come later."""
        later = kwargs.pop("non_blocking", False)
        if func is aten.copy_.default:
            to, source = args[:2]
            later = later or (len(args) > 2 and args[2])
            self._note_transfer(source, to.device, later)
            own, numbers = (getattr(x, "held", x) for x in (to, source))
            if to.device.type == "cpu" and later:
                numbers, source = numbers.clone(), numbers
                own.zero_()
                self.in_flight.append((own, numbers))
            else:
                own.copy_(numbers)
            return to
        (source,) = args
        device = source.device if asked is None else _indexed(asked)
        kept = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        self._note_transfer(source, device, later)
        out = func(getattr(source, "held", source), **kept)
        if device.type == "cuda":
            return DeviceTensor(out, device)
        if later:
            self.in_flight.append((out, out.clone()))
            out.zero_()
        return out

    def _note_transfer(self, source: Tensor, to: torch.device, later: bool) -> None:
        if "cpu" not in (source.device.type, to.type) or source.device == to:
            return
        pinned = source.device.type == "cuda" or getattr(source, "pinned", False)
        if not (later and pinned):
            self.wait(f"copy of {tuple(source.shape)} from {source.device} to {to}")

    def arrive(self, count: int) -> None:
        """The first copies to the host are done."""
        for to, numbers in self.in_flight[:count]:
            to.copy_(numbers)
        self.in_flight[:count] = []


class Event:
    """A `torch.Event`."""

    def __init__(self, device: Any = None) -> None:
        self._device = _indexed(torch.device(device))

    def record(self) -> None:
        """Everything that was asked for so far comes before it."""
        simulation = Simulation.now()
        simulation._check_alive()
        self._last, self._step = [x for x, _ in simulation.in_flight][-1:], simulation.step

    def synchronize(self) -> None:
        """Waits for it."""
        simulation = Simulation.now()
        simulation._check_alive()
        if self._step == simulation.step:
            simulation.wait("event of this step")
        for number, (to, _) in enumerate(simulation.in_flight):
            if any(to is last for last in self._last):
                simulation.arrive(number + 1)
                return


def _pinned(x: Tensor, *_: Any) -> Tensor:
    copy: Any = x.clone()
    copy.pinned = True
    return copy


def kernel(*tensors: Tensor) -> Any:
    """The rotation, as `headforcing.adapters.rope_triton.rotate`: launched on the current device."""
    simulation = Simulation.now()
    simulation._check_alive()
    simulation._check_devices("rotate", list(tensors))
    if tensors[0].device != (current := torch.device("cuda", torch.cuda.current_device())):
        raise RuntimeError(f"a kernel launched on {current} was given tensors on {tensors[0].device}")
    with simulation.off():
        return simulation.run(rope_fused.rotated, tensors, {})


class _Device:
    """`torch.cuda.device`: another current device while entered."""

    current: ClassVar[list[torch.device]] = [CURRENT]

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        self.current.append(self._device)

    def __exit__(self, *_: object) -> None:
        self.current.pop()


def _tensors(x: Any) -> Iterator[Tensor]:
    """Of what an operator is given: tensors, numbers, lists of them."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for item in x:
            yield from _tensors(item)


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """A function of everything in lists and tuples."""
    return type(x)([_mapped(change, item) for item in x]) if type(x) in (list, tuple) else change(x)


def _masks(tensors: list[Tensor]) -> bool:
    return any(x.dtype is torch.bool for x in tensors)


def _indexed(device: torch.device) -> torch.device:
    return CURRENT if device.type == "cuda" and device.index is None else device


CACHES = (
    types.numbers_on,
    rope.temporal_tables,
    ragged.index_tensors,
    requirements._capability,
    requirements._flash_built,
    auto._chosen,
)
"""What keeps tensors of a device, or what is known of it."""


@contextlib.contextmanager
def simulated() -> Iterator[Simulation]:
    """Two devices while it runs; requires that nothing is `missing()`."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    for cache in CACHES:
        cache.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "current_device", lambda: _Device.current[-1].index)
        patch.setattr(torch.cuda, "device", _Device)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch, "Event", Event)
        patch.setattr(Tensor, "pin_memory", _pinned)
        patch.setattr(rope_fused, "kernel", lambda: kernel)
        try:
            with Simulation() as simulation:
                yield simulation
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
            for cache in CACHES:
                cache.cache_clear()
