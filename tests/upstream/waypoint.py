"""Waypoint's own classes, tiny, with random weights, and the calls that its engine makes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from .harness import VARIABLE

REPOSITORY = "world_engine"
NEEDED = ("einops", "omegaconf", "rotary_embedding_torch", "tensordict")
GRID, CHANNELS, BUTTONS = (2, 4), 5, 3
FRAMES, LONG = 32, 64
"""Frames in the table of RoPE, and in a longer one."""
LOCAL, GLOBAL, DILATION = 3, 8, 2
SIGMAS = (1.0, 0.5, 0.0)


def checkout() -> Path:
    """The folder of the checkout, or a skipped test."""
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(f"{VARIABLE} is not set; it names a folder with a checkout of {REPOSITORY}")
    folder = Path(root) / REPOSITORY / "src"
    if not (folder / "model" / "kv_cache.py").is_file():
        pytest.skip(f"{VARIABLE} has no checkout of {REPOSITORY} at {folder.parent}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{REPOSITORY} requires packages that are not installed: {', '.join(missing)}")
    return folder


@contextmanager
def imported() -> Iterator[ModuleType]:
    """The package without its `__init__`, which loads an autoencoder."""
    package = ModuleType(REPOSITORY)
    package.__path__ = [str(checkout())]
    sys.modules[REPOSITORY] = package
    try:
        for name in ("model.world_model", "model.kv_cache", "patch_model"):
            importlib.import_module(f"{REPOSITORY}.{name}")
        yield package
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == REPOSITORY]:
            del sys.modules[name]


class World:
    """A model, a cache, and a video of them.

    Args:
        package: from `imported`.
        dtype: of the weights.
        patched: whether queries, keys and values have one projection, as the engine patches the model.
        frames: in the table of RoPE.
        residual: whether values are mixed with those of the first layer.
    """

    def __init__(
        self,
        package: Any,
        dtype: torch.dtype = torch.float32,
        patched: bool = True,
        frames: int = FRAMES,
        residual: bool = True,
    ) -> None:
        from omegaconf import OmegaConf

        self.dtype = dtype
        self.config = OmegaConf.create(
            {
                "d_model": 128,
                "n_heads": 4,
                "n_kv_heads": 2,
                "n_layers": 4,
                "mlp_ratio": 2,
                "channels": CHANNELS,
                "height": GRID[0],
                "width": GRID[1],
                "tokens_per_frame": GRID[0] * GRID[1],
                "n_frames": frames,
                "local_window": LOCAL,
                "global_window": GLOBAL,
                "global_attn_period": 2,
                "global_attn_offset": 1,
                "global_pinned_dilation": DILATION,
                "value_residual": residual,
                "gated_attn": True,
                "n_buttons": BUTTONS,
                "ctrl_conditioning": "mlp_fusion",
                "ctrl_conditioning_period": 2,
                "ctrl_cond_dropout": 0.0,
                "prompt_conditioning": None,
                "noise_conditioning": "wan",
                "scheduler_sigmas": list(SIGMAS),
            }
        )
        model = package.model.world_model.WorldModel(self.config)
        generator = torch.Generator().manual_seed(7)
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.data.copy_(noise * (weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.3))
        self.model = model.eval().requires_grad_(False).to(dtype)
        if patched:
            package.patch_model.patch_Attn_merge_qkv(self.model)
            package.patch_model.patch_MLPFusion_split(self.model)
        self.cache = package.model.kv_cache.StaticKVCache(self.config, 1, dtype)

    def video(self, frames: int, seed: int = 0, model: Any = None) -> list[Tensor]:
        """What every pass returns, of a new video; the cache is emptied first, as the engine does."""
        self.cache.reset()
        return [out for frame in range(frames) for out in self.frame(frame, seed, model)]

    @torch.inference_mode()
    def frame(self, frame: int, seed: int = 0, model: Any = None) -> list[Tensor]:
        """One frame: denoised while the cache is frozen, then written."""
        generator = torch.Generator().manual_seed(1000 * seed + frame)
        x = torch.randn(1, 1, CHANNELS, *GRID, generator=generator).to(self.dtype)
        pressed = {
            name: torch.randn(1, 1, size, generator=generator).to(self.dtype)
            for name, size in (("mouse", 2), ("button", BUTTONS), ("scroll", 1))
        }
        at, run, outs = torch.tensor([[frame]]), self.model if model is None else model, []
        for sigma, following in zip(SIGMAS, (*SIGMAS[1:], None), strict=True):
            self.cache.set_frozen(following is not None)
            level = torch.full((1, 1), sigma, dtype=self.dtype)
            outs.append(run(x, level, at, kv_cache=self.cache, **pressed))
            x = x if following is None else x + (following - sigma) * outs[-1]
        return outs
