"""Rolling Forcing (arXiv:2509.25161): the attention skeleton of Wan, called on several chunks at once.

Its facts: a call brings up to five chunks, each at its own noise level, and the next one begins a chunk
later; the first of them runs once more alone, clean, with `updating_cache`; only that one is written to the
cache, and a full cache is rolled behind its first chunk. Sizes in tokens are attributes of the attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from headforcing.adapters.wan import CALL
from headforcing.adapters.wan_counted import CountingWan
from headforcing.errors import OptionError
from headforcing.types import AttentionCall, Phase


class RollingForcing(CountingWan):
    """The `CausalWanSelfAttention` skeleton that is told when it writes its cache.

    Args:
        chunks: how many are denoised at once, as many as the host has denoising steps.
    """

    name = "rolling_forcing"
    forward = (*CALL, "cache_start", "updating_cache")
    numbers = ("num_heads", "head_dim", "frame_length", "block_length", "max_attention_size")

    def __init__(self, chunks: int = 5) -> None:
        super().__init__()
        self.chunks = chunks

    def window(self, model: nn.Module) -> int:
        """Frames that the attention sees at most."""
        _, module = next(self.attentions(model))
        return int(module.max_attention_size) // int(module.frame_length)  # type: ignore[arg-type]

    def chunk(self, model: nn.Module) -> int:
        """Frames that are denoised at once."""
        return self.chunks * super().chunk(model)

    def step(self, chunk: int) -> int:
        """Those of one chunk.

        Raises:
            OptionError: they are not so many chunks.
        """
        if chunk % self.chunks:
            raise OptionError(
                f"chunk is {chunk}: expected the frames of all {self.chunks} chunks denoised at once; for "
                "another number of them pass adapter=RollingForcing(chunks=...)"
            )
        return chunk // self.chunks

    def read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | None:
        """The call, whose later chunks come again."""
        call = super().read(module, args, kwargs)
        return None if call is None else dataclasses.replace(call, rolling=True)

    def phase(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Phase:
        """The model is told when it writes its cache, as its fifth argument or by name."""
        return "clean" if kwargs.get("updating_cache", len(args) > 4 and args[4]) else "denoise"

    def written(self, module: nn.Module, call: AttentionCall) -> int:
        """Of the first chunk."""
        frames = int(module.block_length) // int(module.frame_length)  # type: ignore[arg-type]
        return frames * call.tokens_per_frame

    def evicts(self, module: nn.Module) -> bool:
        """Always."""
        return True


ADAPTER = RollingForcing()
