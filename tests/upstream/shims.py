"""What lets a checkout written for CUDA be imported and run on a CPU."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode

IMPORTED_BUT_UNUSED = ("torchvision", "decord")
LOOK_FOR_TORCHVISION = (
    "diffusers.configuration_utils",
    "diffusers.models.modeling_utils",
    "diffusers.schedulers.scheduling_utils",
    "transformers.models.auto.tokenization_auto",
)


class _Empty(MetaPathFinder, Loader):
    """Finds every module below some top-level names, and leaves it empty."""

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = frozenset(roots)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Claim the names below the roots."""
        if fullname.partition(".")[0] not in self._roots:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module empty."""


class OnCpu(TorchFunctionMode):
    """Takes the device that is written `"cuda"` for the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call with the other device."""
        moved = {"device": "cpu"} if (kwargs or {}).get("device") == "cuda" else {}
        return func(*args, **{**(kwargs or {}), **moved})


def make_importable(checkout: Path) -> None:
    """Put a checkout first on the path, and stand in for what its imports ask of the machine."""
    for name in LOOK_FOR_TORCHVISION:
        importlib.import_module(name)
    missing = [name for name in IMPORTED_BUT_UNUSED if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Empty(missing))
    torch.cuda.current_device = lambda: 0
    sys.path.insert(0, str(checkout))


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **unused: object) -> torch.Tensor:
    """Attend in the dtype of the query; tensors are `[B, L, H, D]`."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def cached_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache_seqlens: torch.Tensor
) -> torch.Tensor:
    """Attend likewise to a cache of which every sample has filled its own length."""
    ends = cache_seqlens.tolist()
    rows = zip(q.split(1), k_cache.split(1), v_cache.split(1), ends, strict=True)
    return torch.cat([plain_attention(q, k[:, :end], v[:, :end]) for q, k, v, end in rows])


def use_plain_attention() -> None:
    """Replace the CUDA kernels in every imported module of the checkout that holds one."""
    stand_ins = {
        "attention": plain_attention,
        "flash_attention": plain_attention,
        "flex_attention": flex_attention,
        "attention_with_kvcache_fallback": cached_attention,
    }
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("wan", "wan_5b", "causvid", "fastvideo", "models"):
            continue
        for attribute, stand_in in stand_ins.items():
            if callable(getattr(module, attribute, None)):
                setattr(module, attribute, stand_in)
